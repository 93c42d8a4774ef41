"""MPII's annotations, as the JSON of the published pose networks' code and as the original MATLAB file.

Both count pixels from 1; persons here count from 0. A person is given by a centre c and a scale s, its height in units
of 200 pixels. HRNet's code moves c down by 15 s, since c lies at the torso, enlarges s to 1.25 s, and crops a square of
200 s around c. ``Person.box`` is that square before it is enlarged: 1.25 is the padding that every crop here has.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrpose.data.coco import Annotations, Person
from hrpose.data.fields import is_number, kind, read_json
from hrpose.errors import check, check_choice, shown
from hrpose.matlab import read_mat
from hrpose.skeleton import MPII16

PIXELS_PER_SCALE = 200.0
_DOWN = 15.0  # pixels per unit of scale
_JOINTS = MPII16.num_joints
SPLITS = ("train", "test")

Corners = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class MpiiAnnotations(Annotations):
    """An MPII file: `persons` are all of its entries, in its order; those of a test set have no joints.

    head_boxes: of each person two corners x, y in 1-based pixels, or None; () if the file holds none, as the JSON.
    rectangles: of each person its position in annorect of its image, from 0; () for the JSON. `images` are numbered by
                position in annolist, and hold centre and scale of all "rectangles", which a submission repeats.
    left_out:   how many persons of the split have no scale or no centre, and so cannot be cropped.
    """

    head_boxes: tuple[Corners | None, ...] = ()
    rectangles: tuple[int, ...] = ()
    left_out: int = 0


def load_mpii(path: str | Path) -> MpiiAnnotations:
    """Read and check an MPII file in JSON: a list of {image, center, scale, joints, joints_vis}, pixels from 1.

    A test set's entries have neither joints nor joints_vis. A joint with joints_vis 1 counts as visible (2 in
    ``Person.visible``): the file does not tell hidden joints from others.
    Raises: InputError naming the file, the entry (counted from 0), the field and the valid values.
    """
    where = f"annotations {path}"
    data = read_json(path, where)
    rule = "must be a list of {image, center, scale, joints, joints_vis}"
    check(isinstance(data, list) and bool(data), where, f"{rule}, got {kind(data) if data != [] else 'an empty list'}")
    ids: dict[str, int] = {}
    persons = []
    for position, entry in enumerate(data):
        here = f"{where}: entry {position}"
        check(isinstance(entry, dict), here, f"must be an object, got {kind(entry)}")
        for key in ("image", "center", "scale"):
            check(key in entry, here, f"{key} is missing; an entry has image, center, scale, joints and joints_vis")
        name, center, scale = entry["image"], entry["center"], entry["scale"]
        check(isinstance(name, str) and bool(name), here, f"image must be a name, got {shown(name)}")
        valid = isinstance(center, list) and len(center) == 2 and all(map(is_number, center))
        check(valid, here, f"center must be 2 finite numbers x, y, got {shown(center)}")
        check(is_number(scale) and scale > 0, here, f"scale must be a finite number > 0, got {shown(scale)}")
        joints, visible = _joints(entry, here)
        box = person_box((float(center[0]), float(center[1])), float(scale))
        persons.append(Person(ids.setdefault(name, len(ids)), name, box, position, joints, visible))
    images = {number: {"id": number, "file_name": name} for name, number in ids.items()}
    return MpiiAnnotations(str(path), MPII16, 1, images, tuple(persons), {})


def load_mpii_mat(path: str | Path, split: str = "train", single_person: bool = False) -> MpiiAnnotations:
    """Read and check the original mpii_human_pose_v1_u12_1.mat, which takes scipy (``pip install 'hrpose[mpii]'``) and,
    for its 25,000 images, about a minute.

    Args:
        split:         "train": the annotated persons of images with img_train 1. "test": the persons of the other
                       images whose poses a submission predicts, those in single_person, published without joints.
        single_person: in training too, only persons far enough from others (RELEASE.single_person).
    A joint is visible where is_visible is 1 or not given, as for all heads, and hidden (1 in ``Person.visible``) where
    it is 0; these are numbers or texts. Where a joint is listed twice the last one counts.
    Raises: InputError naming the file, the image, the rectangle (both counted from 1, as in MATLAB) and the field.
    """
    where = f"annotations {path}"
    check_choice(split, SPLITS, where, "split")
    variables = read_mat(path, where, structs=True)
    found = ", ".join(variables) or "nothing"
    check("RELEASE" in variables, where, f"must hold RELEASE, as mpii_human_pose_v1_u12_1.mat does, holds {found}")
    release = _struct(variables["RELEASE"], where, "RELEASE")
    columns = [_items(release, name) for name in ("annolist", "img_train", "single_person")]
    for name, column in zip(("img_train", "single_person"), columns[1:], strict=True):
        rule = f"RELEASE.{name} must have an element for each of the {len(columns[0])} images of annolist"
        check(len(column) == len(columns[0]), where, f"{rule}, has {len(column)}")

    images: dict[int, dict[str, Any]] = {}
    persons, heads, rectangles, left_out = [], [], [], 0
    for number, (image, train, single) in enumerate(zip(*columns, strict=True)):
        here = f"{where}: annolist({number + 1})"
        train = _number(train, here, "img_train")
        check(train in (0, 1), here, f"img_train must be 0 or 1, got {shown(train)}")
        if (train == 1) != (split == "train"):
            continue
        name = _text(_only(image, "image", here), "name", f"{here}.image")
        separate = {_number(ridx, here, "single_person") for ridx in np.ravel(single)}
        placed = []
        for ridx, rectangle in enumerate(_items(image, "annorect")):
            inside = f"{here}.annorect({ridx + 1})"
            center, scale = _place(rectangle, inside)
            placed.append((center, scale))
            joints, visible = _points(rectangle, inside)
            alone = ridx + 1 in separate
            if not (joints if split == "train" else alone) or (single_person and not alone):
                continue
            if center is None or scale is None:
                left_out += 1
                continue
            box = person_box(center, scale)
            persons.append(Person(number, name, box, len(persons), joints, visible))
            heads.append(_head(rectangle, inside))
            rectangles.append(ridx)
        images[number] = {"id": number, "file_name": name, "rectangles": placed}
    check(bool(persons), where, f"holds no person to {'train on' if split == 'train' else 'predict'} in split {split}")
    boxes = tuple(heads) if any(heads) else ()
    return MpiiAnnotations(str(path), MPII16, 1, images, tuple(persons), {}, boxes, tuple(rectangles), left_out)


def person_box(center: tuple[float, float], scale: float) -> tuple[float, float, float, float]:
    """The box of an MPII person (x, y, width, height in 0-based pixels), from centre and scale as the files have them.

        c = center + (0, 15 scale) - 1,   side = 200 scale

    ``geometry.box_regions`` with the padding of 1.25 makes of it the region of the published code, 200 * (1.25 scale)
    pixels wide around c, for inputs that are square or higher than wide: exactly, but for float64's rounding. (In a
    wider input that code would cut off the top and bottom of the square; here the region grows to hold it.)
    """
    side = PIXELS_PER_SCALE * scale
    x, y = center[0] - 1, center[1] + _DOWN * scale - 1
    return x - side / 2, y - side / 2, side, side


def _joints(entry: dict[str, Any], here: str) -> tuple[tuple[tuple[float, float], ...], tuple[int, ...]]:
    """Joints in 0-based pixels and their visibility, of an entry of the JSON; () for both in a test set."""
    given = [key for key in ("joints", "joints_vis") if entry.get(key) is not None]
    if not given:
        return (), ()
    check(len(given) == 2, here, f"joints and joints_vis must be given together, got {given[0]} alone")
    points, visible = entry["joints"], entry["joints_vis"]
    for key, values in (("joints", points), ("joints_vis", visible)):
        check(isinstance(values, list), here, f"{key} must be a list of {_JOINTS}, got {kind(values)}")
        check(len(values) == _JOINTS, here, f"{key} must be {_JOINTS}, one per joint, got {len(values)}")
    for i, point in enumerate(points):
        valid = isinstance(point, list) and len(point) == 2 and all(map(is_number, point))
        check(valid, here, f"joints[{i}] must be 2 finite numbers x, y, got {shown(point)}")
    for i, value in enumerate(visible):
        check(is_number(value) and value in (0, 1), here, f"joints_vis[{i}] must be 0 or 1, got {shown(value)}")
    return tuple((float(x) - 1, float(y) - 1) for x, y in points), tuple(2 * int(v) for v in visible)


# The MATLAB file: whatever may be missing is, in places, an empty array instead, or a field that the struct lacks.


def _place(rectangle: Any, here: str) -> tuple[tuple[float, float] | None, float | None]:
    """Centre in 1-based pixels and scale; None for what is missing."""
    scale = _field(rectangle, "scale")
    if scale is not None:
        scale = _number(scale, here, "scale")
        check(scale > 0, here, f"scale must be > 0, got {scale}")
    position = _field(rectangle, "objpos")
    if position is None:
        return None, scale
    position = _struct(position, here, "objpos")
    return (_number_of(position, "x", f"{here}.objpos"), _number_of(position, "y", f"{here}.objpos")), scale


def _points(rectangle: Any, here: str) -> tuple[tuple[tuple[float, float], ...], tuple[int, ...]]:
    """Joints in 0-based pixels and their visibility; () for both where nobody annotated any."""
    points = _field(rectangle, "annopoints")
    listed = [] if points is None else _items(_struct(points, here, "annopoints"), "point")
    joints, visible = [(0.0, 0.0)] * _JOINTS, [0] * _JOINTS
    for k, point in enumerate(listed):
        inside = f"{here}.annopoints.point({k + 1})"
        joint = _number_of(point, "id", inside)
        valid = joint == int(joint) and 0 <= joint < _JOINTS
        check(valid, inside, f"id must be a whole number 0..{_JOINTS - 1}, got {joint:g}")
        x, y = _number_of(point, "x", inside), _number_of(point, "y", inside)
        joints[int(joint)], visible[int(joint)] = (x - 1, y - 1), 1 + _is_visible(point, inside)
    return (tuple(joints), tuple(visible)) if listed else ((), ())


def _is_visible(point: Any, here: str) -> int:
    value = _field(point, "is_visible")
    if value is None:
        return 1
    value = np.ravel(value)[0]
    if isinstance(value, str) and value.strip() in ("0", "1"):
        return int(value)
    valid = isinstance(value, numbers.Real) and value in (0, 1)
    check(valid, here, f"is_visible must be 0, 1, '0', '1' or empty, got {_said(value)}")
    return int(value)


def _head(rectangle: Any, here: str) -> Corners | None:
    """Two corners of the head's box in 1-based pixels; None where one is missing."""
    x1, y1, x2, y2 = (
        None if (value := _field(rectangle, name)) is None else _number(value, here, name)
        for name in ("x1", "y1", "x2", "y2")
    )
    return None if None in (x1, y1, x2, y2) else ((x1, y1), (x2, y2))


def _field(struct: Any, name: str) -> np.ndarray | None:
    """A field of a struct as an array, or None if the struct has no such field or an empty one."""
    value = getattr(struct, name, None)
    return None if value is None or np.size(value) == 0 else np.asarray(value)


def _items(struct: Any, name: str) -> list[Any]:
    """The elements of a field that is a struct or cell array; none where it is missing."""
    value = _field(struct, name)
    return [] if value is None else list(value.ravel())


def _struct(value: Any, here: str, name: str) -> Any:
    """The one struct in an array."""
    found = list(np.ravel(value))
    valid = len(found) == 1 and hasattr(found[0], "_fieldnames")
    check(valid, here, f"{name} must be a struct, got {_said(value)}")
    return found[0]


def _only(struct: Any, name: str, here: str) -> Any:
    value = _field(struct, name)
    check(value is not None, here, f"{name} is missing")
    return _struct(value, here, name)


def _text(struct: Any, name: str, here: str) -> str:
    value = _field(struct, name)
    check(value is not None, here, f"{name} is missing")
    value = value.ravel()[0]
    check(isinstance(value, str) and bool(value), here, f"{name} must be a name, got {_said(value)}")
    return str(value)


def _number_of(struct: Any, name: str, here: str) -> float:
    value = _field(struct, name)
    check(value is not None, here, f"{name} is missing")
    return _number(value, here, name)


def _number(value: Any, here: str, name: str) -> float:
    """The one finite number in an array."""
    found = np.ravel(value)
    valid = found.size == 1 and isinstance(found[0], numbers.Real) and is_number(float(found[0]))
    check(valid, here, f"{name} must be a finite number, got {_said(value)}")
    return float(found[0])


def _said(value: Any) -> str:
    """What an array of MATLAB holds, as a message quotes it."""
    found = np.ravel(value).tolist()
    if any(hasattr(element, "_fieldnames") for element in found):
        return f"{len(found)} structs" if len(found) > 1 else "a struct"
    return shown(found[0] if len(found) == 1 else found)
