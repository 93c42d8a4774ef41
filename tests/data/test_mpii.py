"""MPII's files: the conversion to 0-based pixels and crops is the published code's; malformed ones are named."""

import json
import math
import re

import numpy as np
import pytest
import torch

from hrpose.data import PoseDataset, load_annotations, load_any, load_mpii, load_mpii_mat
from hrpose.data.mixture import load_mixture
from hrpose.errors import InputError
from hrpose.geometry import apply, box_regions, crop_transforms
from hrpose.skeleton import MPII16


def entry(**changes):
    joints = [[10.0 * i + 1, 5.0 * i + 2] for i in range(16)]
    return {"image": "a.jpg", "center": [101.0, 52.0], "scale": 0.5, "joints": joints, "joints_vis": [1] * 16} | changes


@pytest.fixture
def load(tmp_path):
    def write_and_load(content, loader=load_mpii):
        path = tmp_path / "file.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return loader(path)

    return write_and_load


# The JSON -------------------------------------------------------------------------------------------------------------


def test_a_sound_file(load):
    found = load([entry(), entry(image="b.jpg", joints_vis=[0] * 15 + [1]), entry()])
    assert found.skeleton == MPII16 and [p.file_name for p in found.persons] == ["a.jpg", "b.jpg", "a.jpg"]
    assert [p.image_id for p in found.persons] == [0, 1, 0] and [p.annotation_id for p in found.persons] == [0, 1, 2]
    assert found.persons[0].joints[:2] == ((0, 1), (10, 6)) and found.persons[0].visible == (2,) * 16
    assert found.persons[1].visible == (0,) * 15 + (2,)
    assert found.images[1]["file_name"] == "b.jpg" and found.head_boxes == () and found.left_out == 0


def test_a_test_set_has_no_joints(load):
    data = [{"image": "a.jpg", "center": [101, 52], "scale": 2}, entry(joints=None, joints_vis=None)]
    found = load(data)
    assert [p.joints for p in found.persons] == [(), ()] and found.persons[0].visible == ()


def official_region(center, scale):
    """MPIIDataset._get_db, restated: centre and scale of an entry as that code passes them on."""
    center, scale = np.array(center, float), np.array([scale, scale], float)
    center[1] = center[1] + 15 * scale[1]
    scale = scale * 1.25
    return center - 1, scale


def official_transform(center, scale, size):
    """get_affine_transform without rotation, restated: the affine map of three points."""
    width = scale[0] * 200
    source = np.array([center, (center[0], center[1] - width / 2)])
    target = np.array([[size[0] / 2, size[1] / 2], [size[0] / 2, size[1] / 2 - size[0] / 2]])

    def third(a, b):
        return b + np.array([-(a - b)[1], (a - b)[0]])

    source, target = (np.array([*points, third(*points)]) for points in (source, target))
    return np.linalg.solve(np.c_[source, np.ones(3)], target).T


@pytest.mark.parametrize("size", [(256, 256), (192, 256), (288, 384), (256, 384), (64, 64)])
def test_the_crop_is_the_published_one(load, rng, size):
    entries = [
        entry(center=rng.uniform(1, 900, 2).tolist(), scale=scale) for scale in (0.3, 4.718488, *rng.uniform(0.2, 9, 9))
    ]
    boxes = [p.box for p in load(entries).persons]
    centers, extents = box_regions(boxes, size)
    for i, one in enumerate(entries):
        center, scale = official_region(one["center"], one["scale"])
        np.testing.assert_allclose(centers[i], center, rtol=0, atol=1e-9)
        width = 200 * scale[0]
        np.testing.assert_allclose(extents[i], [width, width * size[1] / size[0]], rtol=1e-14)
        mine = crop_transforms(boxes[i : i + 1], size)[0]
        np.testing.assert_allclose(mine, official_transform(center, scale, size), rtol=1e-9, atol=1e-9)


def test_a_wide_crop_holds_the_whole_square(load):
    (person,) = load([entry(center=[301, 201], scale=1.0)]).persons
    centers, extents = box_regions([person.box], (384, 256))
    assert centers.tolist() == [[300, 215]] and extents.tolist() == [[375, 250]]


def test_an_entry_by_hand(load):
    (person,) = load([entry(center=[101.0, 52.0], scale=0.5)]).persons
    assert person.box == (100 - 50, 51 + 7.5 - 50, 100, 100)


MALFORMED = {
    "an object": ({"a": 1}, "must be a list of {image, center, scale, joints, joints_vis}, got an object"),
    "nothing": ([], "must be a list of {image, center, scale, joints, joints_vis}, got an empty list"),
    "numbers": ([entry(), 5], "entry 1: must be an object, got a number"),
    "no JSON": ("[{", "is not valid JSON"),
    "image missing": ([{k: v for k, v in entry().items() if k != "image"}], "entry 0: image is missing"),
    "center missing": ([{k: v for k, v in entry().items() if k != "center"}], "entry 0: center is missing"),
    "scale missing": ([{k: v for k, v in entry().items() if k != "scale"}], "entry 0: scale is missing"),
    "a detection file": ([{"image_id": 1, "bbox": [1, 2, 3, 4]}], "entry 0: image is missing; an entry has image, cen"),
    "image a number": ([entry(image=5)], "entry 0: image must be a name, got 5"),
    "image empty": ([entry(image="")], "entry 0: image must be a name, got ''"),
    "center one number": ([entry(), entry(center=[5])], "entry 1: center must be 2 finite numbers x, y, got [5]"),
    "center NaN": ([entry(center=[math.nan, 5])], "entry 0: center must be 2 finite numbers x, y, got [nan, 5]"),
    "center texts": ([entry(center=["1", "2"])], "entry 0: center must be 2 finite numbers x, y, got ['1', '2']"),
    "scale 0": ([entry(scale=0)], "entry 0: scale must be a finite number > 0, got 0"),
    "scale unknown": ([entry(scale=-1.0, center=[-1, -1])], "entry 0: scale must be a finite number > 0, got -1.0"),
    "scale infinite": ([entry(scale=math.inf)], "entry 0: scale must be a finite number > 0, got inf"),
    "scale true": ([entry(scale=True)], "entry 0: scale must be a finite number > 0, got True"),
    "joints alone": (
        [entry(joints_vis=None)],
        "entry 0: joints and joints_vis must be given together, got joints alone",
    ),
    "joints_vis alone": ([entry(joints=None)], "joints and joints_vis must be given together, got joints_vis alone"),
    "joints an object": ([entry(joints={})], "entry 0: joints must be a list of 16, got an object"),
    "joints too few": ([entry(joints=[[1, 2]] * 15)], "entry 0: joints must be 16, one per joint, got 15"),
    "joint of three": (
        [entry(joints=[[1, 2, 1]] * 16)],
        "entry 0: joints[0] must be 2 finite numbers x, y, got [1, 2,",
    ),
    "joint NaN": ([entry(joints=[[1, 2]] * 15 + [[1, math.nan]])], "entry 0: joints[15] must be 2 finite numbers x, y"),
    "visible too many": ([entry(joints_vis=[1] * 17)], "entry 0: joints_vis must be 16, one per joint, got 17"),
    "visible 2": ([entry(joints_vis=[1] * 15 + [2])], "entry 0: joints_vis[15] must be 0 or 1, got 2"),
    "visible a text": ([entry(joints_vis=["1"] * 16)], "entry 0: joints_vis[0] must be 0 or 1, got '1'"),
    "visible half": ([entry(joints_vis=[0.5] * 16)], "entry 0: joints_vis[0] must be 0 or 1, got 0.5"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_json(load, tmp_path, name):
    content, message = MALFORMED[name]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(content)
    assert str(caught.value).startswith(f"annotations {tmp_path / 'file.json'}: ") and "\n" not in str(caught.value)


def test_the_kind_of_a_file_is_recognised(load, tmp_path, data_root):
    assert load([entry()], load_any).skeleton == MPII16
    assert load("\n [ \n" + json.dumps(entry()) + "]", load_any).skeleton == MPII16
    coco = data_root / "coco_mini" / "annotations" / "person_keypoints_val2017.json"
    assert load_any(coco) == load_annotations(coco)
    for content, message in (("[]", "must be an object with images"), ("x", "is not valid JSON")):
        with pytest.raises(InputError, match=message):
            load(content, load_any)
    with pytest.raises(InputError, match="no such file"):
        load_any(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="no such file"):
        load_any(tmp_path / "nowhere.mat")


def test_joints_of_real_photographs(data_root):
    """The sample's persons are the first of gt_valid.mat, whose joints and head boxes were written by others."""
    scipy_io = pytest.importorskip("scipy.io")
    found = load_mpii(data_root / "mpii_sample" / "test_mpii.json")
    truth = scipy_io.loadmat(data_root / "mpii_valid" / "gt_valid.mat")
    for i, person in enumerate(found.persons):
        seen = truth["jnt_missing"][:, i] == 0
        assert [v > 0 for v in person.visible] == seen.tolist()
        np.testing.assert_allclose(np.array(person.joints)[seen] + 1, truth["pos_gt_src"][seen, :, i], atol=1e-4)
    for size in ((256, 256), (192, 256)):  # what a network sees: all joints within the crop, none at its edge
        data = PoseDataset(found.persons, data_root / "mpii_sample", size, MPII16)
        for i, person in enumerate(found.persons):
            sample = data[0, i]
            seen = sample.visible > 0
            expected = apply(crop_transforms([person.box], size)[0], torch.tensor(person.joints).double())
            np.testing.assert_allclose(sample.joints[seen], expected[seen], atol=1e-3)
            assert (sample.joints[seen] > 0).all() and (sample.joints[seen] < torch.tensor(size)).all()
            height = float(np.ptp(sample.joints[seen].numpy(), axis=0).max())
            assert 0.3 * size[0] < height < 0.85 * size[1]


# The MATLAB file ------------------------------------------------------------------------------------------------------

EMPTY = np.zeros((0, 0))


def struct(*rows, **fields):
    """A 1 x n MATLAB struct array of dicts with the same keys."""
    rows = rows or (fields,)
    array = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        for name, value in row.items():
            array[0, i][name] = value
    return array


def cell(*values):
    array = np.empty((len(values), 1), object)
    for i, value in enumerate(values):
        array[i, 0] = value
    return array


def point(joint, x=None, y=None, **more):
    return {"x": 10.0 * joint + 1 if x is None else x, "y": 5.0 * joint + 2 if y is None else y, "id": joint} | more


POINTS = struct(*(point(j, is_visible=v) for j, v in ((0, "1"), (1, "0"), (2, 1), (3, 0), (8, EMPTY), (9, ""))))


def rectangle(**changes):
    fields = {"scale": 0.5, "objpos": struct(x=101, y=52), "annopoints": struct(point=POINTS)}
    return fields | {"x1": 90, "y1": 30, "x2": 120.5, "y2": 60} | changes


def image(name, *rectangles):
    return {"image": struct(name=name), "annorect": struct(*rectangles) if rectangles else EMPTY, "vididx": 3}


def release():
    """Three training images with all that a rectangle may lack, a test image of three persons and an empty one."""
    without_visibility = struct(point=struct(*(point(j) for j in range(16))))
    bare = {"objpos": struct(x=40, y=50), "scale": 1.25}
    return {
        "annolist": [
            image("a.jpg", rectangle(), rectangle(annopoints=EMPTY), rectangle(annopoints=without_visibility)),
            image("b.jpg", {"x1": 1, "y1": 2, "x2": 3, "y2": 4}),
            image("c.jpg", rectangle(scale=EMPTY), rectangle(objpos=EMPTY), rectangle(x2=EMPTY)),
            image("d.jpg", bare, bare | {"objpos": struct(x=400.5, y=51)}, {"objpos": EMPTY, "scale": EMPTY}),
            image("e.jpg"),
        ],
        "img_train": [1, 1, 1, 0, 0],
        "single_person": [np.array([[1]]), EMPTY, np.array([[1], [2]]), np.array([[2], [3]]), EMPTY],
    }


def save_release(path, parts):
    scipy_io = pytest.importorskip("scipy.io")
    fields = {
        "annolist": struct(*parts["annolist"]),
        "img_train": np.array([parts["img_train"]]),
        "single_person": cell(*parts["single_person"]),
        "version": "12",
    }
    scipy_io.savemat(path, {"RELEASE": struct(**fields)})
    return path


@pytest.fixture
def mat(tmp_path):
    return lambda parts: save_release(tmp_path / "mpii_human_pose_v1_u12_1.mat", parts)


def test_training_persons_of_the_original_file(mat):
    path = mat(release())
    found = load_mpii_mat(path)
    assert found == load_any(path) and found.skeleton == MPII16
    first, second, third = found.persons
    assert (first.file_name, first.image_id, second.file_name) == ("a.jpg", 0, "a.jpg")
    assert first.box == (50, 8.5, 100, 100) and first.joints[:4] == ((0, 1), (10, 6), (20, 11), (30, 16))
    assert first.visible == (2, 1, 2, 1, 0, 0, 0, 0, 2, 2) + (0,) * 6 and second.visible == (2,) * 16
    assert found.rectangles == (0, 2, 2) and found.head_boxes == (((90, 30), (120.5, 60)),) * 2 + (None,)
    assert found.left_out == 2 and set(found.images) == {0, 1, 2}
    assert [p.annotation_id for p in found.persons] == [0, 1, 2] and third.file_name == "c.jpg"
    alone = load_mpii_mat(path, single_person=True)
    assert alone.persons == found.persons[:1] and alone.left_out == 2 and len(alone.images) == 3


def test_test_persons_of_the_original_file(mat):
    found = load_mpii_mat(mat(release()), "test")
    (person,) = found.persons
    assert person.file_name == "d.jpg" and person.image_id == 3 and person.joints == () == person.visible
    assert person.box == (399.5 - 125, 50 + 15 * 1.25 - 125, 250, 250) and found.rectangles == (1,)
    assert found.head_boxes == () and found.left_out == 1  # the third has no place
    assert found.images[3]["rectangles"] == [((40, 50), 1.25), ((400.5, 51), 1.25), (None, None)] and set(
        found.images
    ) == {3, 4}


def test_a_file_of_one_image_and_one_person(mat):
    parts = {"annolist": [image("a.jpg", rectangle(annopoints=struct(point=struct(point(4)))))], "img_train": [1]}
    found = load_mpii_mat(mat(parts | {"single_person": [np.array([[1]])]}), single_person=True)
    assert [p.visible for p in found.persons] == [(0, 0, 0, 0, 2) + (0,) * 11]


def test_training_on_the_original_file_says_who_is_left_out(mat, load):
    path = mat(release())
    for name in "abcde":
        (path.parent / f"{name}.jpg").write_bytes(b"")
    mixture = load_mixture([path], [path.parent])
    assert len(mixture.persons) == 3 and mixture.summary == "3 persons, 2 left out without scale or centre"
    with pytest.raises(InputError, match="must hold joints for all persons to train on, is that of a test set"):
        load([entry(joints=None, joints_vis=None)], lambda path: load_mixture([path], [path.parent]))


def test_the_last_of_two_points_counts(mat):
    parts = {"img_train": [1], "single_person": [EMPTY]}
    points = struct(point=struct(point(4, x=1), point(4, x=7.5)))
    found = load_mpii_mat(mat(parts | {"annolist": [image("a.jpg", rectangle(annopoints=points))]}))
    assert found.persons[0].joints[4] == (6.5, 21)


def test_both_forms_of_a_file_give_the_same_persons(mat, load):
    points = struct(point=struct(*(point(j) for j in range(16))))
    parts = {"annolist": [image("a.jpg", rectangle(annopoints=points))], "img_train": [1], "single_person": [EMPTY]}
    assert load_mpii_mat(mat(parts)).persons == load([entry()]).persons


def one(**changes):
    return {"annolist": [image("a.jpg", rectangle(**changes))], "img_train": [1], "single_person": [EMPTY]}


def with_point(**changes):
    return one(annopoints=struct(point=struct(point(0) | changes)))


RECT = "annolist(1).annorect(1)"
MALFORMED_MAT = {
    "scale 0": (one(scale=0), f"{RECT}: scale must be > 0, got 0.0"),
    "scale NaN": (one(scale=math.nan), f"{RECT}: scale must be a finite number, got nan"),
    "scale a text": (one(scale="big"), f"{RECT}: scale must be a finite number, got 'big'"),
    "scale two": (one(scale=[1, 2]), f"{RECT}: scale must be a finite number, got [1, 2]"),
    "objpos a number": (one(objpos=5), f"{RECT}: objpos must be a struct, got 5"),
    "objpos two": (
        one(objpos=struct({"x": 1, "y": 2}, {"x": 1, "y": 2})),
        f"{RECT}: objpos must be a struct, got 2 structs",
    ),
    "objpos without y": (one(objpos=struct(x=5)), f"{RECT}.objpos: y is missing"),
    "objpos infinite": (one(objpos=struct(x=5, y=math.inf)), f"{RECT}.objpos: y must be a finite number, got "),
    "annopoints a number": (one(annopoints=5), f"{RECT}: annopoints must be a struct, got "),
    "id 16": (with_point(id=16), f"{RECT}.annopoints.point(1): id must be a whole number 0..15, got 16"),
    "id half": (with_point(id=1.5), f"{RECT}.annopoints.point(1): id must be a whole number 0..15, got 1.5"),
    "id negative": (with_point(id=-1), f"{RECT}.annopoints.point(1): id must be a whole number 0..15, got -1"),
    "id empty": (with_point(id=EMPTY), f"{RECT}.annopoints.point(1): id is missing"),
    "x NaN": (with_point(x=math.nan), f"{RECT}.annopoints.point(1): x must be a finite number, got "),
    "x a text": (with_point(x="5"), f"{RECT}.annopoints.point(1): x must be a finite number, got "),
    "y empty": (with_point(y=EMPTY), f"{RECT}.annopoints.point(1): y is missing"),
    "is_visible 2": (with_point(is_visible=2), f"{RECT}.annopoints.point(1): is_visible must be 0, 1, '0', '1' or emp"),
    "is_visible yes": (with_point(is_visible="yes"), f"{RECT}.annopoints.point(1): is_visible must be 0, 1, '0', '1'"),
    "head NaN": (one(x1=math.nan), f"{RECT}: x1 must be a finite number, got "),
    "scale a struct": (one(scale=struct(x=1)), f"{RECT}: scale must be a finite number, got a struct"),
    "img_train 2": (one() | {"img_train": [2]}, "annolist(1): img_train must be 0 or 1, got 2.0"),
    "img_train short": (
        one() | {"img_train": [1, 1]},
        "RELEASE.img_train must have an element for each of the 1 images",
    ),
    "single_person short": (
        one() | {"single_person": []},
        "RELEASE.single_person must have an element for each of the",
    ),
    "name missing": (
        {"annolist": [{"image": EMPTY, "annorect": EMPTY}], "img_train": [1], "single_person": [EMPTY]},
        "annolist(1): image is missing",
    ),
    "name a number": (
        {"annolist": [{"image": struct(name=5), "annorect": EMPTY}], "img_train": [1], "single_person": [EMPTY]},
        "annolist(1).image: name must be a name, got",
    ),
    "nobody": (one(annopoints=EMPTY), "holds no person to train on in split train"),
}


@pytest.mark.parametrize("name", MALFORMED_MAT)
def test_malformed_mat(mat, name):
    parts, message = MALFORMED_MAT[name]
    path = mat(parts)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_mpii_mat(path)
    assert str(caught.value).startswith(f"annotations {path}: ") and "\n" not in str(caught.value)


def test_other_files_and_splits(tmp_path, mat):
    scipy_io = pytest.importorskip("scipy.io")
    path = tmp_path / "other.mat"
    scipy_io.savemat(path, {"preds": np.zeros(3)})
    with pytest.raises(InputError, match=r"must hold RELEASE, as mpii_human_pose_v1_u12_1.mat does, holds preds"):
        load_mpii_mat(path)
    scipy_io.savemat(path, {"RELEASE": np.zeros(3)})
    with pytest.raises(InputError, match="RELEASE must be a struct, got"):
        load_mpii_mat(path)
    with pytest.raises(InputError, match="split must be 'train' or 'test', got 'val'"):
        load_mpii_mat(mat(release()), "val")
    with pytest.raises(InputError, match="holds no person to predict in split test"):
        load_mpii_mat(mat(one()), "test")
