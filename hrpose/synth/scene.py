"""One picture: who stands where, how it is put together, and the annotations that follow from it."""

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from hrpose.errors import check, shown
from hrpose.skeleton import COCO17, LSP14, Skeleton
from hrpose.synth.backdrop import draw_backdrop, sample_prop
from hrpose.synth.body import Body, sample_body
from hrpose.synth.figure import Outfit, dress, flesh_over, paint_figure, sample_outfit
from hrpose.synth.relief import Layer, Light, Relief, Shape, View, extent_of

MAX_PEOPLE = 16  # also the room for annotation ids of one image
REFERENCE_HEIGHT_M = 1.75  # a person this tall has the height that `size_range` asks for
NOBODY, PROP = -1, -2  # in the owner map, besides a person's number >= 0

# A person is annotated if this much of it shows; who shows less is left out of the picture too, not only of the
# annotations, because an unlabelled person would teach a detector that people are background.
MIN_AREA_SHARE = 0.001  # of the image
MIN_VISIBLE_SHARE = 0.25  # of what there is of the person within the image
MIN_LABELLED = 5  # keypoints inside the image
MIN_HEIGHT_PX = 16  # of a standing person; below, arms and legs are thinner than half a pixel and vanish
FRAME_MARGIN = 0.02  # of the image's width and height, around a person that is to be seen whole
MOST_PROPS = 5  # at difficulty 1
CUT_OFF_SHARE = 0.3  # of people reach over the edge of the image at difficulty 1


@dataclass(frozen=True)
class SceneOptions:
    """What the pictures look like; validated when made.

    Args:
        width, height: of the image in pixels, 64..4096.
        max_people:    1 to this many people per image, all equally likely; at most 16.
        difficulty:    0: an empty studio and whole, upright people who about face the camera. 1: furnished places, all
                       poses and directions, things and people in front of each other, people cut off by the image's
                       edge, noise.
        supersample:   samples per pixel and direction, 1..4; 1 is quick and jagged.
        size_range:    least and greatest height of a standing person as shares of the image's height,
                       0 < least <= greatest <= 1, and 16 pixels or more; sitting people are smaller, as in life, and
                       who would not fit is made smaller.
    Raises: InputError naming the field.
    """

    width: int = 640
    height: int = 480
    max_people: int = 4
    difficulty: float = 1.0
    supersample: int = 2
    size_range: tuple[float, float] = (0.35, 0.95)

    def __post_init__(self) -> None:
        self._check_integer("width", 64, 4096)
        self._check_integer("height", 64, 4096)
        self._check_integer("max_people", 1, MAX_PEOPLE)
        self._check_integer("supersample", 1, 4)
        difficulty = self.difficulty
        valid = _is_number(difficulty) and 0 <= difficulty <= 1
        check(valid, "scene options", f"difficulty must be a number 0..1, got {shown(difficulty)}")
        sizes = self.size_range
        valid = isinstance(sizes, (tuple, list)) and len(sizes) == 2 and all(_is_number(size) for size in sizes)
        valid = valid and 0 < sizes[0] <= sizes[1] <= 1
        rule = "size_range must be (least, greatest) with 0 < least <= greatest <= 1"
        check(valid, "scene options", f"{rule}, got {shown(sizes)}")
        least = f"size_range must start at {MIN_HEIGHT_PX} pixels of the height {self.height} or more"
        check(sizes[0] * self.height >= MIN_HEIGHT_PX, "scene options", f"{least}, got {shown(sizes)}")
        object.__setattr__(self, "difficulty", float(difficulty))
        object.__setattr__(self, "size_range", (float(sizes[0]), float(sizes[1])))

    def _check_integer(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        valid = isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= value <= high
        check(valid, "scene options", f"{field} must be an integer {low}..{high}, got {shown(value)}")
        object.__setattr__(self, field, int(value))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as JSON gives them back."""
        return {**dataclasses.asdict(self), "size_range": list(self.size_range)}


@dataclass(frozen=True)
class Scene:
    """A finished picture and what is known about it; persons in the order of their annotations."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    annotations: list[dict[str, Any]]  # without ids
    masks: list[np.ndarray]  # (H, W) bool, the pixels that show the person
    bodies: list[Body]  # 3-D joints and frames


@dataclass(frozen=True)
class _Thing:
    """A person or a prop, rendered. ground_y: image row of the ground under it, which orders the things by nearness."""

    layer: Layer
    relief: Relief
    view: View
    ground_y: float
    shadow: tuple[float, float]  # half width in metres, strength 0..1
    body: Body | None = None


@dataclass(frozen=True)
class _Stage:
    """The geometry that all things of a scene share.

    The camera looks along the ground from `eye_m` above it: what is `scale` pixels per metre large stands at row
    horizon + scale * eye_m.
    """

    options: SceneOptions
    horizon_y: float
    eye_m: float
    largest_scale: float
    light: Light

    def ground_y(self, scale: float) -> float:
        return self.horizon_y + scale * self.eye_m


def render_scene(
    seed: int, index: int, options: SceneOptions | None = None, skeleton: Skeleton = COCO17
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Scene `index` of the series `seed`, whose picture depends on nothing else but the options.

    Args:
        skeleton: the joints to annotate: COCO17, LSP14, or any whose joints have names of theirs.
    Returns: the image (H, W, 3) uint8 RGB, and one COCO annotation per person, without ids: bbox [x, y, width, height]
        = first column, first row, columns and rows of the pixels that show the person; area their number; keypoints
        K x (x, y, v) with x, y in image pixels (centres at integers), v = 2 visible, 1 hidden, 0 (and x = y = 0)
        outside the image; num_keypoints those with v > 0. Every person in the picture is annotated.
    Raises: InputError if seed or index is negative or not an integer, or a drawn person has no such joint.
    """
    scene = compose_scene(seed, index, options, skeleton)
    return scene.image, scene.annotations


def compose_scene(seed: int, index: int, options: SceneOptions | None = None, skeleton: Skeleton = COCO17) -> Scene:
    """`render_scene` with the masks and 3-D bodies behind the annotations."""
    options = SceneOptions() if options is None else options
    check_joints(skeleton)
    check(isinstance(options, SceneOptions), "scene", f"options must be SceneOptions, got {shown(options)}")
    for name, value in (("seed", seed), ("index", index)):
        valid = isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 0
        check(valid, "scene", f"{name} must be an integer >= 0, got {shown(value)}")
    rng = np.random.default_rng([int(seed), int(index)])
    stage = _set_stage(rng, options)
    horizon = stage.horizon_y / options.height
    backdrop = draw_backdrop(rng, options.width, options.height, horizon, options.difficulty, options.supersample)
    people = _place_people(rng, stage)
    things = _place_props(rng, stage) + people
    things, owner = _keep_annotatable(sorted(things, key=lambda thing: thing.ground_y), options)
    image = _grade(rng, _composite(backdrop, things, stage), options.difficulty)

    annotations, masks, bodies = [], [], []
    for number, thing in enumerate(things):
        if thing.body is not None:
            mask = owner == number
            annotations.append(_annotate(thing, number, owner, mask, skeleton))
            masks.append(mask)
            bodies.append(thing.body)
    return Scene(image, annotations, masks, bodies)


def _set_stage(rng: Generator, options: SceneOptions) -> _Stage:
    horizon_y = options.height * rng.uniform(0.40, 0.56)
    largest_scale = options.size_range[1] * options.height / REFERENCE_HEIGHT_M
    # the largest people stand just inside the lower edge, unless they are small: then in the middle of the floor
    nearest_y = min(0.97 * options.height, horizon_y + 0.60 * largest_scale * REFERENCE_HEIGHT_M)
    eye_m = (nearest_y - horizon_y) / largest_scale
    sideways, upwards = rng.uniform(0.25, 0.6) * (1 if rng.random() < 0.5 else -1), rng.uniform(0.45, 0.75)
    length = math.sqrt(sideways * sideways + upwards * upwards + 0.49)
    light = Light((sideways / length, -upwards / length, 0.7 / length), ambient=rng.uniform(0.38, 0.55))
    return _Stage(options, horizon_y, eye_m, largest_scale, light)


# -------------------------------------------------------------------------------------------------------- placing


def _place_people(rng: Generator, stage: _Stage) -> list[_Thing]:
    options = stage.options
    count = int(rng.integers(1, options.max_people + 1))
    smallest_scale = options.size_range[0] * options.height / REFERENCE_HEIGHT_M
    crowd = 1.0 if count < 3 else 0.75  # many people need smaller ones
    people: list[_Thing] = []
    taken: list[float] = []
    for _ in range(count):
        body, pose = sample_body(rng, options.difficulty)
        outfit = sample_outfit(rng)
        shapes = dress(body, outfit, pose)
        scale = smallest_scale + crowd * rng.random() * (stage.largest_scale - smallest_scale)
        cut_off = rng.random() < CUT_OFF_SHARE * options.difficulty
        zoom = rng.uniform(1.0, 1.5)
        sideways = [rng.random() for _ in range(5)]
        view = None
        if cut_off:
            view = _view_cut_off(body, shapes, stage, scale * zoom, sideways[0], pose.lift_m)
        if view is None:
            view = _view_whole(shapes, stage, scale, sideways, taken, pose.lift_m)
        thing = _make_person(body, outfit, shapes, view, stage, pose.lift_m)
        if thing is not None:
            people.append(thing)
            taken.append(view.origin_x)
    return people


def _view_on_ground(stage: _Stage, shapes: list[Shape], scale: float, lift_m: float, origin_x: float) -> View:
    lowest_m = extent_of(shapes)[1][1]
    return View(scale, origin_x, stage.ground_y(scale) - (lowest_m + lift_m) * scale)


def _view_whole(
    shapes: list[Shape], stage: _Stage, scale: float, sideways: list[float], taken: list[float], lift_m: float
) -> View:
    """The person within the image, made smaller where it must be, in the loneliest of the places tried (0..1)."""
    low, high = extent_of(shapes)
    wide, tall = high[0] - low[0], high[1] - low[1] + lift_m
    inside = 1 - 2 * FRAME_MARGIN
    options = stage.options
    scale = min(scale, inside * options.width / wide, inside * options.height / tall)
    if tall > stage.eye_m:  # the top is at horizon_y - scale * (tall - eye_m)
        scale = min(scale, (stage.horizon_y - FRAME_MARGIN * options.height) / (tall - stage.eye_m))
    margin = FRAME_MARGIN * options.width
    left, right = margin - low[0] * scale, options.width - 1 - margin - high[0] * scale
    places = [left + share * (right - left) for share in sideways]
    apart = [min((abs(place - other) for other in taken), default=0.0) for place in places]
    return _view_on_ground(stage, shapes, scale, lift_m, places[apart.index(max(apart))])


def _view_cut_off(
    body: Body, shapes: list[Shape], stage: _Stage, scale: float, sideways: float, lift_m: float
) -> View | None:
    """The person wherever it falls, also across the image's edges; None if too little of it would be inside."""
    options = stage.options
    view = _view_on_ground(stage, shapes, scale, lift_m, sideways * options.width)
    inside = sum(_in_image(view.project(body.joints[name]), options) for name in COCO17.joints)
    return view if inside >= len(COCO17.joints) // 2 + 1 else None


def _make_person(
    body: Body, outfit: Outfit, shapes: list[Shape], view: View, stage: _Stage, lift_m: float
) -> _Thing | None:
    relief = Relief(shapes, view, stage.options.width, stage.options.height, stage.options.supersample)
    if relief.empty:
        return None
    layer = paint_figure(relief, body, outfit, stage.light)
    low, high = extent_of(shapes)
    shadow = 0.10 + 0.33 * float(high[0] - low[0]), 0.5 / (1 + 6 * lift_m)
    return _Thing(layer, relief, view, stage.ground_y(view.scale), shadow, body)


def _place_props(rng: Generator, stage: _Stage) -> list[_Thing]:
    options = stage.options
    things = []
    for _ in range(int(rng.random() * (MOST_PROPS * options.difficulty + 1))):
        prop = sample_prop(rng)
        scale = stage.largest_scale * rng.uniform(0.45, 1.15)
        view = View(scale, rng.random() * options.width, stage.ground_y(scale))
        relief = Relief(prop.shapes, view, options.width, options.height, options.supersample)
        if not relief.empty:
            layer = relief.shade(prop.colours, {}, stage.light, solid_below=len(prop.colours))
            low, high = extent_of(prop.shapes)
            things.append(_Thing(layer, relief, view, view.origin_y, (0.5 * float(high[0] - low[0]), 0.4)))
    return things


# ---------------------------------------------------------------------------------------------------- composition


def _owner_map(things: list[_Thing], options: SceneOptions) -> np.ndarray:
    """(H, W) int16: index of the person that each pixel shows, or PROP or NOBODY; `things` run from far to near."""
    owner = np.full((options.height, options.width), NOBODY, np.int16)
    for number, thing in enumerate(things):
        window = owner[thing.layer.window()]
        window[thing.layer.coverage >= 0.5] = PROP
        if thing.body is not None:
            window[thing.layer.solid] = number
    return owner


def _keep_annotatable(things: list[_Thing], options: SceneOptions) -> tuple[list[_Thing], np.ndarray]:
    """Leave out people of whom too little shows, the least visible first; the last one loses its props instead."""
    while True:
        owner = _owner_map(things, options)
        people = [number for number, thing in enumerate(things) if thing.body is not None]
        shown_share = {number: _visible_share(things[number], number, owner, options) for number in people}
        worst = min(people, key=lambda number: shown_share[number])
        if shown_share[worst] >= MIN_VISIBLE_SHARE:
            return things, owner
        if len(people) > 1:
            things = things[:worst] + things[worst + 1 :]
        elif len(things) > 1:
            things = [things[worst]]
        else:
            return things, owner


def _visible_share(thing: _Thing, number: int, owner: np.ndarray, options: SceneOptions) -> float:
    """Visible part of the person's pixels within the image; 0 for who is too small or has too few keypoints inside."""
    window = owner[thing.layer.window()]
    area, whole = int((window == number).sum()), int(thing.layer.solid.sum())
    labelled = sum(_in_image(thing.view.project(thing.body.joints[name]), options) for name in COCO17.joints)
    if area < MIN_AREA_SHARE * options.width * options.height or labelled < MIN_LABELLED:
        return 0.0
    return area / whole


def _in_image(point: tuple[float, float], options: SceneOptions) -> bool:
    return 0 <= point[0] <= options.width - 1 and 0 <= point[1] <= options.height - 1


def _composite(backdrop: np.ndarray, things: list[_Thing], stage: _Stage) -> np.ndarray:
    """Shadows, then things from far to near, over the backdrop; changes it in place. (H, W, 3) float32 0..255."""
    for thing in things:
        _cast_shadow(backdrop, thing, stage)
    for thing in things:
        window = backdrop[thing.layer.window()]
        window *= (np.float32(1) - thing.layer.coverage)[:, :, None]
        window += thing.layer.rgb
    return backdrop


def _cast_shadow(image: np.ndarray, thing: _Thing, stage: _Stage) -> None:
    """A soft ellipse on the ground, shifted away from the light."""
    half_metres, strength = thing.shadow
    half_width = max(half_metres * thing.view.scale, 2.0)
    half_height = max(0.22 * half_width, 1.5)
    centre_x = thing.view.origin_x - 0.35 * half_width * stage.light.direction[0]
    centre_y = thing.ground_y - 0.4 * half_height  # ground_y is where the nearest toe stands
    height, width = image.shape[:2]
    left, right = max(math.floor(centre_x - half_width), 0), min(math.ceil(centre_x + half_width) + 1, width)
    top = max(math.floor(centre_y - half_height), 0)
    bottom = min(math.ceil(centre_y + half_height) + 1, height)
    if left >= right or top >= bottom:
        return
    across = ((np.arange(left, right) - centre_x) / half_width).astype(np.float32)
    along = ((np.arange(top, bottom) - centre_y) / half_height).astype(np.float32)
    inside = np.maximum(np.float32(1) - (across * across)[None] - (along * along)[:, None], 0)
    image[top:bottom, left:right] *= (np.float32(1) - np.float32(strength) * inside * np.sqrt(inside))[:, :, None]


def _grade(rng: Generator, image: np.ndarray, difficulty: float) -> np.ndarray:
    """Exposure, tint and grain of a camera, all absent at difficulty 0. (H, W, 3) uint8."""
    gain = np.float32(1 + difficulty * rng.uniform(-0.28, 0.18))
    tint = (1 + difficulty * rng.uniform(-0.05, 0.05, 3)).astype(np.float32)
    lift = np.float32(difficulty * rng.uniform(-6, 14))
    grain = np.float32(difficulty * rng.uniform(0, 9))
    image *= gain * tint
    image += lift + np.float32(0.5)
    if grain > 0:
        image += (grain * rng.standard_normal(image.shape[:2], dtype=np.float32))[:, :, None]
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------- annotation


def check_joints(skeleton: Skeleton) -> None:
    """Raise an InputError unless a drawn person has all of the joints."""
    names = dict.fromkeys(COCO17.joints + LSP14.joints)
    unknown = [name for name in skeleton.joints if name not in names]
    check(not unknown, "scene", f"joints must be among {', '.join(names)}, got {', '.join(unknown)}")


def _annotate(thing: _Thing, number: int, owner: np.ndarray, mask: np.ndarray, skeleton: Skeleton) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    keypoints: list[float] = []
    labelled = 0
    for name in skeleton.joints:
        joint = thing.body.joints[name]
        x, y = (round(value, 2) for value in thing.view.project(joint))
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            keypoints += [0.0, 0.0, 0]
            continue
        labelled += 1
        in_sight = owner[round(y), round(x)] == number
        covering_m = thing.relief.depth_at(joint) - float(joint[2])
        visible = in_sight and covering_m <= flesh_over(name, thing.body.height)
        keypoints += [x, y, 2 if visible else 1]
    left, top = int(columns[0]), int(rows[0])
    return {
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "keypoints": keypoints,
        "num_keypoints": labelled,
        "iscrowd": 0,
        "category_id": 1,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
