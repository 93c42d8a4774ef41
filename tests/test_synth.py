"""Drawn people: the same everywhere, annotated as drawn, and safe on disk."""

import contextlib
import hashlib
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hrpose.data.coco import load_annotations
from hrpose.errors import InputError
from hrpose.skeleton import COCO17, LSP14, Skeleton
from hrpose.synth import Scene, SceneOptions, compose_scene, render_scene, write_dataset
from hrpose.synth.body import (
    HEIGHT_RANGE_M,
    JOINT_LIMITS_DEG,
    LIMB_ANGLES,
    POSES,
    TRUNK_ANGLES,
    Pose,
    pose_body,
    sample_body,
    sample_pose,
)
from hrpose.synth.relief import EMPTY_DEPTH, Cone, Ellipsoid, Light, Relief, View

SMALL = SceneOptions(width=120, height=96, max_people=1)
CROWD = SceneOptions(width=160, height=120, max_people=4)
JOINT = {name: i for i, name in enumerate(COCO17.joints)}


@pytest.fixture(scope="module")
def crowd_scenes() -> list[Scene]:
    return [compose_scene(5, index, CROWD) for index in range(40)]


def digest(scene: tuple[np.ndarray, list[dict]]) -> str:
    image, annotations = scene
    return hashlib.sha256(image.tobytes() + json.dumps(annotations).encode()).hexdigest()


def keypoints_of(annotation: dict) -> np.ndarray:
    return np.array(annotation["keypoints"], float).reshape(17, 3)


def still_pose(yaw_deg: float) -> Pose:
    angles = {name: 0.0 for name in TRUNK_ANGLES}
    angles |= {f"{side}_{name}": 0.0 for name in LIMB_ANGLES for side in ("left", "right")}
    return Pose("still", angles, yaw_deg, roll_deg=0.0)


# ---------------------------------------------------------------------------------------------------- determinism


def test_scene_depends_on_seed_and_index_only():
    forwards = [digest(render_scene(3, index, CROWD)) for index in range(4)]
    backwards = [digest(render_scene(3, index, CROWD)) for index in reversed(range(4))]
    assert backwards == forwards[::-1]
    assert len(set(forwards)) == 4
    assert digest(render_scene(4, 0, CROWD)) != forwards[0]
    assert digest(render_scene(3, 0, SceneOptions(width=160, height=120, difficulty=0.5))) != forwards[0]


def test_image_shape_and_type():
    image, annotations = render_scene(0, 0, SceneOptions(width=70, height=64, max_people=1, supersample=3))
    assert image.shape == (64, 70, 3) and image.dtype == np.uint8
    assert len(annotations) == 1
    assert image.std() > 10  # not blank


# ----------------------------------------------------------------------------------------------------- annotation


def test_boxes_and_areas_are_the_masks(crowd_scenes: list[Scene]):
    for scene in crowd_scenes:
        assert len(scene.annotations) == len(scene.masks) == len(scene.bodies) >= 1
        assert np.sum(scene.masks, 0).max() == 1  # a pixel shows one person
        for annotation, mask in zip(scene.annotations, scene.masks, strict=True):
            ys, xs = np.nonzero(mask)
            box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert annotation["bbox"] == box
            assert annotation["area"] == mask.sum()


def test_visible_keypoints_lie_on_the_person(crowd_scenes: list[Scene]):
    seen = {0: 0, 1: 0, 2: 0}
    for scene in crowd_scenes:
        for annotation, mask in zip(scene.annotations, scene.masks, strict=True):
            for x, y, v in keypoints_of(annotation):
                seen[int(v)] += 1
                assert (x, y) == (0, 0) if v == 0 else 0 <= x <= 159 and 0 <= y <= 119
                assert v != 2 or mask[round(y), round(x)]
            assert annotation["num_keypoints"] == (keypoints_of(annotation)[:, 2] > 0).sum()
    assert min(seen.values()) > 15  # all three kinds occur


def test_who_hardly_shows_is_not_in_the_picture(crowd_scenes: list[Scene]):
    for annotation in (a for scene in crowd_scenes if len(scene.annotations) > 1 for a in scene.annotations):
        assert annotation["area"] >= 0.001 * 160 * 120
        assert annotation["num_keypoints"] >= 5
    assert max(len(scene.annotations) for scene in crowd_scenes) >= 3


@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 256), (400, 64)])
def test_everyone_is_annotated_however_small_or_crowded(width: int, height: int):
    for difficulty in (0.0, 1.0):
        for size_range in ((16 / height, 17 / height), (0.9, 1.0)):
            options = SceneOptions(width, height, 16, difficulty, supersample=1, size_range=size_range)
            for index in range(3):
                annotations = render_scene(9, index, options)[1]
                assert annotations
                assert all(a["area"] > 0 and a["num_keypoints"] > 0 for a in annotations)


def test_nose_is_visible_from_the_front_and_hidden_from_behind(crowd_scenes: list[Scene]):
    front, behind = [], []
    for scene in crowd_scenes + [compose_scene(6, index, SMALL) for index in range(40)]:
        for annotation, body in zip(scene.annotations, scene.bodies, strict=True):
            visibility = keypoints_of(annotation)[JOINT["nose"], 2]
            facing = body.frames["head"][2, 2]
            if visibility > 0 and abs(facing) > 0.6:
                (front if facing > 0 else behind).append(visibility == 2)
    assert len(front) > 15 and len(behind) > 15
    assert not any(behind)
    assert np.mean(front) > 0.7  # the rest is behind things, hands, or other people


def test_people_are_seen_whole_at_difficulty_0():
    easy = SceneOptions(width=120, height=96, max_people=1, difficulty=0.0)
    for index in range(25):
        annotations = render_scene(8, index, easy)[1]
        keypoints = keypoints_of(annotations[0])
        assert (keypoints[:, 2] > 0).all()
        assert keypoints[JOINT["left_shoulder"], 0] > keypoints[JOINT["right_shoulder"], 0]  # facing the camera
        x, y, width, height = annotations[0]["bbox"]
        assert x > 0 and y > 0 and x + width < 120 and y + height < 96


# ----------------------------------------------------------------------------------------------------------- body


def test_left_is_on_the_right_of_the_image_when_facing_the_camera():
    segments = sample_body(np.random.default_rng(0), 0.0)[0].segments
    for yaw_deg, sign in ((0.0, 1), (180.0, -1)):
        body = pose_body(still_pose(yaw_deg), segments, 1.7)
        for part in ("eye", "ear", "shoulder", "hip", "knee", "ankle"):
            assert sign * (body.joints[f"left_{part}"][0] - body.joints[f"right_{part}"][0]) > 0.02
        assert sign * body.joints["nose"][2] > 0.05  # towards the camera
    profile = pose_body(still_pose(90.0), segments, 1.7)
    assert profile.joints["nose"][0] > 0.05  # positive yaw turns towards +x
    assert profile.joints["left_shoulder"][2] < profile.joints["right_shoulder"][2]


def test_limbs_bend_the_right_way():
    segments = sample_body(np.random.default_rng(0), 0.0)[0].segments
    pose = still_pose(0.0)
    pose.angles.update(left_elbow_flex=90.0, right_knee_flex=90.0, left_shoulder_abduct=90.0, right_hip_flex=90.0)
    joints = pose_body(pose, segments, 1.7).joints
    arm, forearm = segments["upper_arm"], segments["forearm"]
    np.testing.assert_allclose(joints["left_elbow"] - joints["left_shoulder"], [arm, 0, 0], atol=2e-5)
    np.testing.assert_allclose(joints["left_wrist"] - joints["left_elbow"], [0, 0, forearm], atol=2e-5)
    thigh = joints["right_knee"] - joints["right_hip"]
    assert thigh[2] == pytest.approx(segments["thigh"], abs=2e-5)  # forwards
    shank = joints["right_ankle"] - joints["right_knee"]
    assert shank[1] == pytest.approx(segments["shank"] * math.cos(math.radians(8)), abs=2e-5)  # down, toes outwards


def test_segments_keep_their_lengths_in_every_pose():
    # shares of body height: Winter's figure 4.1, +- the spread that the data set states
    share = {("shoulder", "elbow"): 0.186, ("elbow", "wrist"): 0.146, ("hip", "knee"): 0.245, ("knee", "ankle"): 0.246}
    rng = np.random.default_rng(1)
    for _ in range(60):
        body, _ = sample_body(rng, 1.0)
        assert HEIGHT_RANGE_M[0] <= body.height <= HEIGHT_RANGE_M[1]
        for (first, second), typical in share.items():
            lengths = [
                np.linalg.norm(body.joints[f"{side}_{first}"] - body.joints[f"{side}_{second}"]) / body.height
                for side in ("left", "right")
            ]
            assert 0.94 * typical - 1e-4 <= lengths[0] <= 1.06 * typical + 1e-4
            assert lengths[0] == pytest.approx(lengths[1], abs=5e-5)


def test_poses_stay_within_the_joint_limits():
    rng = np.random.default_rng(2)
    poses = [sample_pose(rng, 1.0) for _ in range(300)]
    assert {pose.name for pose in poses} == set(POSES)
    for pose in poses:
        for name, value in pose.angles.items():
            low, high = JOINT_LIMITS_DEG[name.removeprefix("left_").removeprefix("right_")]
            assert low <= value <= high
    assert min(pose.yaw_deg for pose in poses) < -150 and max(pose.yaw_deg for pose in poses) > 150
    assert max(abs(sample_pose(rng, 0.0).yaw_deg) for _ in range(100)) <= 35


# --------------------------------------------------------------------------------------------------------- relief


def relief_of(shape: Cone | Ellipsoid) -> Relief:
    return Relief([shape], View(50.0, 50.0, 50.0), width=100, height=100, supersample=2)


def test_sphere_depth_and_coverage():
    radius = 0.5
    relief = relief_of(Ellipsoid(np.zeros(3), np.eye(3), np.full(3, radius), 1))
    assert relief.depth_at(np.zeros(3)) == pytest.approx(radius, abs=1e-4)
    assert relief.depth_at(np.array([0.3, 0.0, 0.0])) == pytest.approx(0.4, abs=0.01)  # half a sample off
    assert relief.depth_at(np.array([0.5, 0.5, 0.0])) == EMPTY_DEPTH
    layer = relief.shade(np.full((2, 3), 200.0), {}, Light((0.0, -0.6, 0.8), 0.4), solid_below=2)
    assert layer.coverage.sum() == pytest.approx(math.pi * 25**2, rel=0.01)
    assert layer.solid.sum() == pytest.approx(math.pi * 25**2, rel=0.025)  # half covered pixels count as whole
    upper, lower = np.array_split(layer.rgb.sum((1, 2)), 2)
    assert upper.sum() > 1.1 * lower.sum()  # lit from above


@pytest.mark.parametrize("end", [(0.4, 0.1, 0.6), (-0.3, 0.5, -0.5), (0.0, 0.0, 0.7), (0.5, 0.2, 0.0)])
def test_cone_is_the_hull_of_its_spheres(end: tuple[float, float, float]):
    start, end, radius = np.array([-0.1, -0.2, 0.0]), np.array(end), 0.2
    relief = relief_of(Cone(start, end, radius, radius, 1))
    points_x, points_y = relief.xs[None].astype(float), relief.ys[:, None].astype(float)
    expected = np.full(relief.depth.shape, float(EMPTY_DEPTH))
    for share in np.linspace(0, 1, 800):
        x, y, z = start + share * (end - start)
        square = radius**2 - (points_x - x) ** 2 - (points_y - y) ** 2
        expected = np.maximum(expected, np.where(square > 0, z + np.sqrt(np.maximum(square, 0)), EMPTY_DEPTH))
    drawn, hull = relief.depth > EMPTY_DEPTH, expected > EMPTY_DEPTH
    assert (drawn != hull).sum() <= 0.01 * hull.sum()
    np.testing.assert_allclose(relief.depth[drawn & hull], expected[drawn & hull], atol=0.005)


def test_ellipsoid_surface_satisfies_its_equation():
    turn = pose_body(still_pose(30.0), sample_body(np.random.default_rng(0), 0.0)[0].segments, 1.7).frames["chest"]
    frame = turn @ np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
    centre, radii = np.array([0.1, -0.1, 0.3]), np.array([0.2, 0.5, 0.3])
    index, points = relief_of(Ellipsoid(centre, frame, radii, 1)).points(1)
    assert len(index) > 1000
    level = ((((points - centre) @ frame) / radii) ** 2).sum(1)
    np.testing.assert_allclose(level, 1, atol=1e-3)


# -------------------------------------------------------------------------------------------------------- on disk


def test_dataset_loads_and_perfect_predictions_score_1(tmp_path):
    path = write_dataset(tmp_path, "val", 8, 1, CROWD, start=20)
    assert path == tmp_path / "val.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        people = [a for a in truth.dataset["annotations"] if a["num_keypoints"] > 0]
        found = [{key: a[key] for key in ("image_id", "category_id", "keypoints")} | {"score": 1.0} for a in people]
        scores = COCOeval(truth, truth.loadRes(found), "keypoints")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    assert scores.stats[0] == 1.0
    ids = [a["id"] for a in truth.dataset["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) > 0
    assert all(a["area"] > 0 and np.isfinite(a["keypoints"]).all() for a in truth.dataset["annotations"])
    assert truth.dataset["images"][0]["file_name"] == "000020.jpg"
    for image in truth.dataset["images"]:
        with Image.open(tmp_path / "val" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (160, 120)
    category = truth.dataset["categories"][0]
    assert category["keypoints"][0] == "nose" and [16, 14] in category["skeleton"]  # as in COCO's own files
    loaded = load_annotations(path)
    assert loaded.skeleton == COCO17
    assert len(loaded.persons) == len(people)


def test_dataset_with_other_joints(tmp_path):
    coco = load_annotations(write_dataset(tmp_path / "coco", "val", 4, 6, SMALL))
    lsp = load_annotations(write_dataset(tmp_path / "lsp", "val", 4, 6, SMALL, skeleton=LSP14))
    assert lsp.skeleton == LSP14
    assert (tmp_path / "coco/val/000002.jpg").read_bytes() == (tmp_path / "lsp/val/000002.jpg").read_bytes()
    shared = [name for name in LSP14.joints if name in COCO17.joints]
    assert len(shared) == 12
    for mine, theirs in zip(lsp.persons, coco.persons, strict=True):
        for name in shared:
            i, j = LSP14.joints.index(name), COCO17.joints.index(name)
            assert (mine.joints[i], mine.visible[i]) == (theirs.joints[j], theirs.visible[j])
    unknown = Skeleton("other", ("nose", "tail"))
    with pytest.raises(InputError, match=r"joints must be among nose, .*head_top, got tail"):
        write_dataset(tmp_path / "other", "val", 1, 6, SMALL, skeleton=unknown)
    assert not (tmp_path / "other").exists()


def test_head_top_and_neck_are_at_the_ends_of_the_head():
    for index in range(20):
        scene = compose_scene(11, index, SMALL, LSP14)
        for body in scene.bodies:
            head, neck, top = (body.joints[name] for name in ("head", "neck", "head_top"))
            up = body.frames["head"] @ (0.0, -1.0, 0.0)
            assert np.allclose(top - head, up * body.head_radii[1], atol=1e-4)
            middle = (body.joints["left_shoulder"] + body.joints["right_shoulder"]) / 2
            assert np.linalg.norm(neck - middle) < 0.02 * body.height


def test_images_are_independent_of_count_and_start(tmp_path):
    write_dataset(tmp_path, "few", 1, 2, SMALL, start=3)
    write_dataset(tmp_path, "many", 3, 2, SMALL, start=2)
    assert (tmp_path / "few/000003.jpg").read_bytes() == (tmp_path / "many/000003.jpg").read_bytes()


def test_finished_dataset_is_used_again(tmp_path):
    drawn: list[int] = []
    path = write_dataset(tmp_path, "train", 3, 2, SMALL, progress=drawn.append)
    before = path.read_bytes()
    assert drawn == [1, 1, 1]
    assert write_dataset(tmp_path, "train", 3, 2, SMALL, progress=drawn.append) == path
    assert drawn == [1, 1, 1] and path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train", "train.json"]

    for changed, message in (
        ({"count": 4}, "count 3 instead of 4"),
        ({"seed": 5}, "seed 2 instead of 5"),
        ({"options": CROWD}, "options .* instead of"),
    ):
        with pytest.raises(InputError, match=f"train.json: holds another data set .*{message}"):
            write_dataset(tmp_path, "train", **({"count": 3, "seed": 2, "options": SMALL} | changed))
    (tmp_path / "train/000001.jpg").unlink()
    with pytest.raises(InputError, match=r"its images must be in .*, missing: \['000001.jpg'\]"):
        write_dataset(tmp_path, "train", 3, 2, SMALL)
    assert path.read_bytes() == before


def test_interrupted_dataset_is_not_one_and_is_finished_later(tmp_path):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "a", "train", 2, 2, SMALL, progress=stop)
    assert not (tmp_path / "a/train.json").exists()
    with pytest.raises(InputError, match=r"train\.partial: was left by another data set that was interrupted"):
        write_dataset(tmp_path / "a", "train", 2, 3, SMALL)
    resumed = write_dataset(tmp_path / "a", "train", 2, 2, SMALL)
    at_once = write_dataset(tmp_path / "b", "train", 2, 2, SMALL)
    assert resumed.read_bytes() == at_once.read_bytes()
    assert not (tmp_path / "a/train.partial").exists()


def test_files_of_others_stay_as_they_are(tmp_path):
    (tmp_path / "mine").mkdir()
    photo = tmp_path / "mine/000000.jpg"
    photo.write_bytes(b"a photo")
    with pytest.raises(InputError, match="mine: must be new or an empty folder"):
        write_dataset(tmp_path, "mine", 1, 0, SMALL)
    assert photo.read_bytes() == b"a photo" and list(tmp_path.iterdir()) == [tmp_path / "mine"]
    for content, message in (("{", "cannot be read as JSON"), ('{"info": {}}', "not written by hrpose.synth")):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(InputError, match=f"other.json: is in the way and .*{message}"):
            write_dataset(tmp_path, "other", 1, 0, SMALL)
        assert (tmp_path / "other.json").read_text() == content
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        write_dataset(tmp_path / "file", "train", 1, 0, SMALL)


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 8}, r"scene options: width must be an integer 64\.\.4096, got 8"),
        ({"height": 99.5}, r"height must be an integer 64\.\.4096, got 99\.5"),
        ({"max_people": 0}, r"max_people must be an integer 1\.\.16, got 0"),
        ({"max_people": True}, r"max_people must be an integer 1\.\.16, got True"),
        ({"supersample": 9}, r"supersample must be an integer 1\.\.4, got 9"),
        ({"difficulty": 1.5}, r"difficulty must be a number 0\.\.1, got 1\.5"),
        ({"difficulty": math.nan}, r"difficulty must be a number 0\.\.1, got nan"),
        ({"size_range": (0.9, 0.2)}, r"size_range must be .* got \(0\.9, 0\.2\)"),
        (
            {"size_range": (0.1, 0.2), "height": 100},
            r"size_range must start at 16 pixels of the height 100 or more, got",
        ),
        ({"size_range": 0.5}, r"size_range must be .* got 0\.5"),
    ],
)
def test_options_are_checked(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        SceneOptions(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "../up"}, "split must be letters, digits, _ and -, got '../up'"),
        ({"count": 0}, "count must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"start": 1.0}, "start must be an integer >= 0, got 1.0"),
        ({"start": 999_999, "count": 2}, "start \\+ count must be <= 1000000, got 1000001"),
        ({"options": {}}, "options must be SceneOptions"),
    ],
)
def test_dataset_arguments_are_checked(tmp_path, arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        write_dataset(tmp_path, **({"split": "train", "count": 1, "seed": 0, "options": SMALL} | arguments))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="scene: index must be an integer >= 0, got -1"):
        render_scene(0, -1, SMALL)
