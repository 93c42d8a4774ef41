"""Several data sets as one: every joint keeps its name, its place and its picture; what is missing is not labelled."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hrpose.data.augment import Augmentation
from hrpose.data.coco import load_annotations
from hrpose.data.dataset import PoseDataset
from hrpose.data.mixture import load_mixture
from hrpose.errors import InputError

ARM = ["left_hand", "right_hand", "head", "neck"]
OTHER = ["head", "right_hand", "tail", "left_hand"]  # another order, one joint less, one that ARM lacks


def write(folder, name, joints, keypoints, grey):
    """One image and person for each list of `keypoints`."""
    (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for i, points in enumerate(keypoints, 1):
        Image.new("RGB", (60, 50), (grey,) * 3).save(folder / name / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 60, "height": 50})
        person = {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 40, 40], "area": 1600}
        annotations.append(person | {"keypoints": [value for point in points for value in point]})
    category = {"id": 1, "name": name, "keypoints": joints}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [category]}))
    return path


@pytest.fixture
def files(tmp_path):
    first = write(tmp_path / "a", "arm", ARM, [[(1, 2, 2), (3, 4, 1), (5, 6, 2), (7, 8, 0)]] * 2, 50)
    people = [
        [(10, 11, 2), (12, 13, 1), (14, 15, 2), (0, 0, 0)],
        [(0, 0, 0), (0, 0, 0), (16, 17, 2), (0, 0, 0)],  # a tail and nothing else
        [(18, 19, 1), (0, 0, 0), (20, 21, 2), (22, 23, 2)],
    ]
    return [first, write(tmp_path / "b" / "c", "other", OTHER, people, 200)]


@pytest.fixture
def folders(tmp_path):
    return [tmp_path / "a" / "arm", tmp_path / "b" / "c" / "other"]


def test_joints_are_matched_by_name(files, folders, tmp_path):
    mixture = load_mixture(files, folders)
    assert mixture.skeleton == load_annotations(files[0]).skeleton and mixture.folder == tmp_path
    assert [p.file_name for p in mixture.persons] == [
        "a/arm/1.png", "a/arm/2.png", "b/c/other/1.png", "b/c/other/3.png",
    ]  # fmt: skip
    assert mixture.persons[0].joints == ((1, 2), (3, 4), (5, 6), (7, 8)) and mixture.persons[0].visible == (2, 1, 2, 0)
    assert mixture.persons[2].visible == (0, 1, 2, 0) and mixture.persons[3].visible == (2, 0, 1, 0)
    assert mixture.persons[2].joints[1:3] == ((12, 13), (10, 11)) and mixture.persons[3].joints[0] == (22, 23)
    assert mixture.summary.startswith("4 persons: 2 of ") and "(3 of 4 joints)" in mixture.summary


def test_samples_come_from_the_right_pictures_with_weight_0_for_what_is_missing(files, folders):
    mixture = load_mixture(files, folders)
    data = PoseDataset(mixture.persons, mixture.folder, (32, 32), mixture.skeleton, Augmentation())
    greys = [data[0, i].image.max() for i in range(4)]
    assert greys[0] == greys[1] < greys[2] == greys[3]
    joints, visible = data[0, 2].joints, data[0, 2].visible
    assert int(visible.sum()) == 2 and bool(torch.isfinite(joints).all())


def test_one_file_alone_is_taken_as_it_is(files, folders):
    mixture = load_mixture(files[:1], folders[:1])
    assert mixture.persons == load_annotations(files[0]).persons and mixture.folder == folders[0]
    assert mixture.summary == "2 persons"


def test_a_file_given_twice_counts_twice(files, folders):
    mixture = load_mixture([*files, files[1]], [*folders, folders[1]])
    assert len(mixture.persons) == 6 and mixture.persons[2:4] == mixture.persons[4:]


def test_what_is_refused(files, folders, tmp_path):
    stranger = write(tmp_path, "stranger", ["tail", "fin"], [[(1, 1, 2), (2, 2, 2)]], 9)
    with pytest.raises(
        InputError, match=r"stranger\.json: must have a joint of .*arm\.json \(left_hand, .*, has tail, fin"
    ):
        load_mixture([files[0], stranger], [folders[0], tmp_path / "stranger"])
    (folders[1] / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png is missing"):
        load_mixture(files, folders)


def test_lspet_and_coco_share_twelve_joints(data_root):
    lsp, coco = data_root / "lspet", data_root / "coco_mini"
    files = [lsp / "val.json", coco / "annotations" / "person_keypoints_val2017.json"]
    mixture = load_mixture(files, [lsp / "val", coco / "val2017"])
    assert mixture.skeleton.num_joints == 14 and "(12 of 14 joints)" in mixture.summary
    added = mixture.persons[1000:]
    assert added and all(p.visible[12:] == (0, 0) for p in added)  # COCO labels no neck and no head top
    original = {p.annotation_id: p for p in load_annotations(files[1]).persons}
    for person in added:
        assert person.joints[5] == original[person.annotation_id].joints[15]  # left ankle
        assert np.all(np.isfinite(person.joints))
