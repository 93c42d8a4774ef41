"""Annotation and detection files: sound ones give the official persons, malformed ones an error that says where."""

import copy
import json
import random
import re

import numpy as np
import pytest

from hrpose.data.coco import check_images, load_annotations, load_boxes, load_detections
from hrpose.errors import InputError
from hrpose.skeleton import COCO17

TRIPLES = [10, 20, 2, 30, 40, 1, 50, 60, 0]


def valid():
    """A small file with a person, a crowd, a person without labels and a dog."""
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 0, "file_name": "a.jpg", "width": 100, "height": 80},
            {"id": 7, "file_name": "b.jpg", "width": 64, "height": 48},
        ],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [5, 6.5, 50, 60], "area": 900.5, "iscrowd": 0,
             "num_keypoints": 2, "keypoints": list(TRIPLES), "segmentation": [[1, 2, 3, 4, 5, 6]]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 50, "iscrowd": 1,
             "num_keypoints": 0, "keypoints": [0] * 9},
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 0},
            {"id": 4, "image_id": 7, "category_id": 18, "bbox": [0, 0, 9, 9]},
        ],
        "categories": [
            {"id": 18, "name": "dog"},
            {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2], [1, 3]],
             "sigmas": [0.026, 0.025, 0.025]},
        ],
    }  # fmt: skip


@pytest.fixture
def load(tmp_path):
    def write_and_load(content, loader=load_annotations, *arguments):
        path = tmp_path / "file.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return loader(path, *arguments)

    return write_and_load


# Sound files ----------------------------------------------------------------------------------------------------------


def test_a_sound_file(load, tmp_path):
    found = load(valid())
    assert found.path == str(tmp_path / "file.json") and found.category_id == 1
    assert found.skeleton.joints == ("nose", "left_eye", "right_eye") and found.skeleton.flip_pairs == ((1, 2),)
    assert found.skeleton.edges == ((0, 1), (0, 2)) and found.skeleton.sigmas == (0.026, 0.025, 0.025)
    (person,) = found.persons
    assert person.annotation_id == 1 and (person.image_id, person.file_name) == (0, "a.jpg")
    assert person.box == (5, 6.5, 49, 59) and person.area == 900.5 and person.image_size == (100, 80)
    assert person.joints == ((10, 20), (30, 40), (50, 60)) and person.visible == (2, 1, 0)
    assert [a["id"] for a in found.json["annotations"]] == [1, 2, 3]  # for pycocotools: crowds and unlabelled, no dog
    assert found.json["annotations"][2]["keypoints"] == [0] * 9
    assert set(found.images) == {0, 7} and len(found.json["images"]) == 2


def test_what_may_be_left_out(load):
    data = valid()
    for annotation in data["annotations"]:
        for key in ("num_keypoints", "iscrowd", "segmentation"):
            annotation.pop(key, None)
    found = load(data)
    assert len(found.persons) == 1
    assert [a["num_keypoints"] for a in found.json["annotations"]] == [2, 0, 0]


def test_byte_order_mark(load):
    assert len(load(b"\xef\xbb\xbf" + json.dumps(valid()).encode()).persons) == 1


def test_persons_beyond_the_image_are_left_out(load):
    data = valid()
    for box, kept in (([99, 0, 5, 5], True), ([100, 0, 5, 5], False), ([0, 80, 5, 5], False), ([5, 5, 1, 1], False)):
        data["annotations"].append({**data["annotations"][0], "id": 100 + len(data["annotations"]), "bbox": box})
        assert (data["annotations"][-1]["id"] in {p.annotation_id for p in load(data).persons}) == kept, box


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_persons_of_real_files_are_the_official_ones(data_root, split):
    """_load_coco_keypoint_annotation_kernal, restated: sanitise boxes, drop crowds and persons without keypoints."""
    path = data_root / "coco_mini" / "annotations" / f"person_keypoints_{split}.json"
    data = json.loads(path.read_text())
    expected = []
    for image in data["images"]:
        for obj in (a for a in data["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]):
            x, y, w, h = obj["bbox"]
            x1, y1 = np.max((0, x)), np.max((0, y))
            x2 = np.min((image["width"] - 1, x1 + np.max((0, w - 1))))
            y2 = np.min((image["height"] - 1, y1 + np.max((0, h - 1))))
            if obj["area"] > 0 and x2 >= x1 and y2 >= y1 and max(obj["keypoints"]) != 0:
                joints = np.reshape(obj["keypoints"], (-1, 3))
                expected.append((obj["id"], (x1, y1, x2 - x1, y2 - y1), joints.tolist()))
    found = load_annotations(path)
    assert found.skeleton == COCO17 and len(expected) > 60
    joints = [[[x, y, v] for (x, y), v in zip(p.joints, p.visible, strict=True)] for p in found.persons]
    given = [(p.annotation_id, p.box, j) for p, j in zip(found.persons, joints, strict=True)]
    assert sorted(given) == sorted(expected)


def test_the_custom_skeleton_of_real_files(data_root):
    found = load_annotations(data_root / "lspet" / "val.json")
    assert len(found.persons) == 1000 and found.skeleton.num_joints == 14
    assert found.skeleton.flip_pairs and found.skeleton.sigmas


# Malformed annotation files -------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def person_1(**changes):
    return lambda data: data["annotations"][0].update(changes)


def without(part, key, at=0):
    return lambda data: data[part][at].pop(key)


def part(name, value):
    return lambda data: data.update({name: value})


def keypoint(at, value):
    return lambda data: data["annotations"][0]["keypoints"].__setitem__(at, value)


def category(**changes):
    return lambda data: data["categories"][1].update(changes)


MALFORMED = {
    "images missing": (lambda data: data.pop("images"), "images is missing"),
    "annotations missing": (lambda data: data.pop("annotations"), "annotations is missing"),
    "categories missing": (lambda data: data.pop("categories"), "categories is missing"),
    "images null": (part("images", None), "images must be a list of objects, got None"),
    "annotations an object": (part("annotations", {"1": 2}), "annotations must be a list of objects"),
    "annotations of numbers": (part("annotations", [1, 2]), "annotations must be a list of objects, got [1, 2]"),
    "no annotations": (part("annotations", []), "must hold at least one person with a labelled keypoint"),
    "no categories": (part("categories", []), "categories must hold exactly one category with keypoints, got []"),
    "no person category": (lambda d: d["categories"].pop(), "must hold exactly one category with keypoints, got []"),
    "two keypoint categories": (
        lambda d: d["categories"][0].update(keypoints=["nose"]),
        "categories must hold exactly one category with keypoints, got ['dog', 'person']",
    ),
    "category id missing": (without("categories", "id", 1), "categories: id must be an integer > 0, got None"),
    "category id text": (category(id="1"), "categories: id must be an integer > 0, got '1'"),
    "category id 0": (category(id=0), "categories: id must be an integer > 0, got 0"),
    "category id twice": (category(id=18), "categories: id must be unique, 18 is used 2 times"),
    "joint names twice": (category(keypoints=["a", "b", "a"]), "categories: skeleton 'person-3': joints must"),
    "joint names numbers": (category(keypoints=[1, 2, 3]), "keypoints must be a list of joint names, got [1, 2, 3]"),
    "edges from 0": (category(skeleton=[[0, 1]]), "skeleton must be a list of pairs of joint numbers 1..3"),
    "sigmas too few": (category(sigmas=[0.1]), "sigmas must be 3 numbers, one per joint, got 1"),
    "sigma NaN": (category(sigmas=[0.1, 0.1, NAN]), "sigmas must be numbers > 0"),
    "wrong flip pairs": (category(flip_pairs=[[0, 1]]), "flip_pairs must pair left_eye with right_eye"),
    "image id missing": (without("images", "id"), "image at position 0: id is missing"),
    "image id text": (lambda d: d["images"][0].update(id="0"), "image '0': id must be an integer >= 0"),
    "image id negative": (lambda d: d["images"][0].update(id=-1), "image -1: id must be an integer >= 0"),
    "image id true": (lambda d: d["images"][0].update(id=True), "image True: id must be an integer >= 0"),
    "image id beyond float64": (lambda d: d["images"][0].update(id=2**60), "id must be an integer >= 0"),
    "image id twice": (lambda d: d["images"][1].update(id=0), "image 0: id must be unique, is used twice"),
    "image name missing": (without("images", "file_name"), "image 0: file_name is missing"),
    "image name empty": (lambda d: d["images"][0].update(file_name=""), "image 0: file_name must be a name, got ''"),
    "image name number": (lambda d: d["images"][0].update(file_name=5), "image 0: file_name must be a name, got 5"),
    "image width missing": (without("images", "width", 1), "image 7: width is missing"),
    "image height 0": (lambda d: d["images"][1].update(height=0), "image 7: height must be an integer > 0, got 0"),
    "image width float": (lambda d: d["images"][1].update(width=64.5), "image 7: width must be an integer > 0, got 64"),
    "id missing": (without("annotations", "id"), "annotation at position 0: id is missing"),
    "id 0": (person_1(id=0), "annotation 0: id must be an integer > 0, got 0"),
    "id negative": (person_1(id=-3), "annotation -3: id must be an integer > 0, got -3"),
    "id text": (person_1(id="1"), "annotation '1': id must be an integer > 0, got '1'"),
    "id true": (person_1(id=True), "annotation True: id must be an integer > 0, got True"),
    "id float": (person_1(id=1.0), "annotation 1.0: id must be an integer > 0, got 1.0"),
    "id huge": (person_1(id=10**30), "id must be an integer > 0, got 1000"),
    "id twice": (person_1(id=2), "annotation 2: id must be unique, is used twice"),
    "image_id missing": (without("annotations", "image_id"), "annotation 1: image_id is missing"),
    "image_id unknown": (person_1(image_id=3), "annotation 1: image_id must be one of the 2 ids in images, got 3"),
    "image_id text": (person_1(image_id="0"), "annotation 1: image_id must be one of the 2 ids in images, got '0'"),
    "image_id false": (person_1(image_id=False), "annotation 1: image_id must be one of the 2 ids in images, got F"),
    "image_id list": (person_1(image_id=[0]), "annotation 1: image_id must be one of the 2 ids in images, got [0]"),
    "category_id missing": (without("annotations", "category_id"), "annotation 1: category_id is missing"),
    "category_id unknown": (person_1(category_id=5), "annotation 1: category_id must be that of one of cat"),
    "category_id text": (person_1(category_id="1"), "annotation 1: category_id must be that of one of categories"),
    "category_id true": (person_1(category_id=True), "annotation 1: category_id must be that of one of categories"),
    "category_id list": (person_1(category_id=[]), "annotation 1: category_id must be that of one of categories"),
    "iscrowd 2": (person_1(iscrowd=2), "annotation 1: iscrowd must be 0 or 1, got 2"),
    "iscrowd true": (person_1(iscrowd=True), "annotation 1: iscrowd must be 0 or 1, got True"),
    "iscrowd text": (person_1(iscrowd="0"), "annotation 1: iscrowd must be 0 or 1, got '0'"),
    "iscrowd list": (person_1(iscrowd=[]), "annotation 1: iscrowd must be 0 or 1, got []"),
    "bbox missing": (without("annotations", "bbox"), "annotation 1: bbox is missing"),
    "bbox null": (person_1(bbox=None), "annotation 1: bbox must be 4 finite numbers x, y, width, height, got None"),
    "bbox of 3": (person_1(bbox=[1, 2, 3]), "annotation 1: bbox must be 4 finite numbers"),
    "bbox text": (person_1(bbox=[1, 2, 3, "4"]), "annotation 1: bbox must be 4 finite numbers"),
    "bbox NaN": (person_1(bbox=[1, NAN, 3, 4]), "annotation 1: bbox must be 4 finite numbers"),
    "bbox infinite": (person_1(bbox=[1, 2, INF, 4]), "annotation 1: bbox must be 4 finite numbers"),
    "bbox huge": (person_1(bbox=[1, 2, 10**400, 4]), "annotation 1: bbox must be 4 finite numbers"),
    "bbox negative": (person_1(bbox=[1, 2, 3, -4]), "annotation 1: bbox must have width and height >= 0"),
    "area missing": (without("annotations", "area"), "annotation 1: area is missing"),
    "area 0": (person_1(area=0), "annotation 1: area must be > 0 for a person with keypoints, got 0"),
    "area negative": (person_1(area=-5.5), "annotation 1: area must be > 0 for a person with keypoints, got -5.5"),
    "area NaN": (person_1(area=NAN), "annotation 1: area must be a finite number, got nan"),
    "area text": (person_1(area="9"), "annotation 1: area must be a finite number, got '9'"),
    "area true": (person_1(area=True), "annotation 1: area must be a finite number, got True"),
    "area of a crowd negative": (lambda d: d["annotations"][1].update(area=-1), "annotation 2: area must be >= 0"),
    "keypoints missing": (without("annotations", "keypoints"), "annotation 1: keypoints is missing, but"),
    "keypoints text": (person_1(keypoints="10 20 2"), "annotation 1: keypoints must be a list of numbers"),
    "one joint too many": (person_1(keypoints=[1] * 12), "annotation 1: keypoints must be 9 numbers (x, y, v"),
    "no visibilities": (person_1(keypoints=[1] * 6), "annotation 1: keypoints must be 9 numbers (x, y, v"),
    "keypoints in triples": (person_1(keypoints=[[1, 2, 2]] * 9), "keypoints[0] must be a finite number, got [1"),
    "keypoint NaN": (keypoint(3, NAN), "annotation 1: keypoints[3] must be a finite number, got nan"),
    "keypoint infinite": (keypoint(4, -INF), "annotation 1: keypoints[4] must be a finite number, got -inf"),
    "keypoint text": (keypoint(0, "10"), "annotation 1: keypoints[0] must be a finite number, got '10'"),
    "keypoint null": (keypoint(1, None), "annotation 1: keypoints[1] must be a finite number, got None"),
    "keypoint true": (keypoint(1, True), "annotation 1: keypoints[1] must be a finite number, got True"),
    "keypoint huge": (keypoint(1, 10**40), "annotation 1: keypoints[1] must be a finite number, got 1000"),
    "visibility 3": (keypoint(5, 3), "annotation 1: keypoints[5] must be a visibility 0, 1 or 2, got 3"),
    "visibility a half": (keypoint(2, 0.5), "annotation 1: keypoints[2] must be a visibility 0, 1 or 2, got 0.5"),
    "visibility negative": (keypoint(8, -1), "annotation 1: keypoints[8] must be a visibility 0, 1 or 2, got -1"),
    "num_keypoints wrong": (person_1(num_keypoints=3), "annotation 1: num_keypoints must be 2, the number of joints"),
    "num_keypoints NaN": (person_1(num_keypoints=NAN), "annotation 1: num_keypoints must be 2"),
    "num_keypoints true": (
        lambda d: d["annotations"][0].update(num_keypoints=True, keypoints=[1, 2, 2, 0, 0, 0, 0, 0, 0]),
        "annotation 1: num_keypoints must be 1",
    ),
    "nobody labelled": (
        lambda d: d["annotations"][0].update(num_keypoints=0, keypoints=[0] * 9),
        "must hold at least one person with a labelled keypoint and a box inside its image",
    ),
    "only crowds": (person_1(iscrowd=1), "must hold at least one person with a labelled keypoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_annotations(load, tmp_path, case):
    change, message = MALFORMED[case]
    data = valid()
    change(data)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(data)
    assert str(caught.value).startswith(f"annotations {tmp_path / 'file.json'}: ") and "\n" not in str(caught.value)


def test_the_malformed_files_are_malformed_by_one_change_each():
    before = json.dumps(valid())
    for name, (change, _) in MALFORMED.items():
        data = valid()
        change(data)
        assert json.dumps(data) != before, name
    assert len(MALFORMED) >= 45


NO_JSON = {
    "empty": b"",
    "spaces": b"  \n",
    "text": b"images, annotations",
    "truncated": json.dumps(valid()).encode()[:-200],
    "trailing comma": b'{"images": [],}',
    "two values": b"{} {}",
    "binary": bytes(range(256)),
    "utf-16": json.dumps(valid()).encode("utf-16"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"images":' * 100_000,
    "a number of a million digits": b"1" * 1_000_000,
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "a list of objects": b'[{"image_id": 1}]',
}


@pytest.mark.parametrize("case", NO_JSON)
def test_files_that_are_no_annotations_at_all(load, tmp_path, case):
    for loader, what in ((load_annotations, "annotations"), (load_boxes, "boxes")):
        with pytest.raises(InputError) as caught:
            load(NO_JSON[case], loader)
        assert str(caught.value).startswith(f"{what} {tmp_path / 'file.json'}: ") and len(str(caught.value)) < 400


def test_deep_nesting_in_a_field(load):
    """Deep enough for a naive repr, or copy, to fail where the parser did not."""
    for depth in (50, 300, 500, 900):
        nest = "[" * depth + "]" * depth
        text = json.dumps(valid())
        with pytest.raises(InputError, match=r"bbox must be 4 finite numbers|is not valid JSON"):
            load(text.replace('"bbox": [5, 6.5, 50, 60]', f'"bbox": {nest}'))
        for field in ('"segmentation": [[1, 2, 3, 4, 5, 6]]', '"name": "person"'):
            assert field in text
            try:
                found = load(text.replace(field, f"{field.split(':')[0]}: {nest}"))
            except InputError as error:
                assert "is not valid JSON" in str(error)
            else:
                copy.deepcopy(found.json["annotations"])


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_annotations(tmp_path / "missing.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_annotations(tmp_path)


# Detections -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def annotations(load):
    return load(valid())


def detection(**changes):
    return {"image_id": 0, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.9} | changes


def test_detections(load, annotations):
    given = [detection(), detection(score=0.3, image_id=7), detection(category_id=18), detection(bbox=[1, 2, 0, 0]),
             detection(image_id=99), detection(score=-0.5), detection(bbox=[-5, -6, 3, 0])]  # fmt: skip
    persons, elsewhere = load(given, load_detections, annotations)
    assert elsewhere == 1
    assert [(p.image_id, p.file_name, p.score, p.box) for p in persons] == [
        (0, "a.jpg", 0.9, (1, 2, 30, 40)), (7, "b.jpg", 0.3, (1, 2, 30, 40)), (0, "a.jpg", 0.9, (-5, -6, 3, 0)),
    ]  # fmt: skip
    assert persons[0].joints == () and persons[0].image_size == (100, 80)
    for min_score in (0.5, 0.9):  # the least score that is kept
        persons, _ = load(given, load_detections, annotations, min_score)
        assert [p.score for p in persons] == [0.9, 0.9]
    assert load(given, load_detections, annotations, 0.95) == ([], 0)
    assert load([], load_detections, annotations) == ([], 0)


MALFORMED_DETECTIONS = {
    "an object": ({"a": 1}, "must be a list of {image_id, category_id, bbox, score}, got an object"),
    "entry a number": ([5], "entry 0: must be an object, got a number"),
    "image_id missing": ([{"category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}], "entry 0: image_id is missing"),
    "score missing": (
        [detection(), {"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "entry 1: score is missing",
    ),
    "score NaN": ([detection(score=NAN)], "entry 0: score must be a finite number, got nan"),
    "score infinite": ([detection(score=INF)], "entry 0: score must be a finite number, got inf"),
    "score text": ([detection(score="0.9")], "entry 0: score must be a finite number, got '0.9'"),
    "score true": ([detection(score=True)], "entry 0: score must be a finite number, got True"),
    "score null": ([detection(score=None)], "entry 0: score must be a finite number, got None"),
    "bbox of 5": ([detection(bbox=[1, 2, 3, 4, 5])], "entry 0: bbox must be 4 finite numbers"),
    "bbox NaN": ([detection(bbox=[NAN, 2, 3, 4])], "entry 0: bbox must be 4 finite numbers"),
    "bbox negative": ([detection(bbox=[1, 2, -3, 4])], "entry 0: bbox must have width and height >= 0"),
    # these would be left out without a word, one box after the other
    "image_id text": ([detection(image_id="0")], "entry 0: image_id must be an integer, got '0'"),
    "image_id float": ([detection(image_id=0.0)], "entry 0: image_id must be an integer, got 0.0"),
    "image_id false": ([detection(image_id=False)], "entry 0: image_id must be an integer, got False"),
    "category_id text": ([detection(category_id="1")], "entry 0: category_id must be an integer, got '1'"),
    "category_id true": ([detection(category_id=True)], "entry 0: category_id must be an integer, got True"),
    "all of another category": (
        [detection(category_id=0)] * 3,
        "none of the 3 boxes has the category_id of persons, 1",
    ),
    "all of other images": ([detection(image_id=5)] * 3, "all 3 boxes are for images that"),
}


@pytest.mark.parametrize("case", MALFORMED_DETECTIONS)
def test_malformed_detections(load, tmp_path, annotations, case):
    content, message = MALFORMED_DETECTIONS[case]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(content, load_detections, annotations)
    assert str(caught.value).startswith(f"boxes {tmp_path / 'file.json'}: ")


@pytest.mark.parametrize("min_score", [NAN, INF, "0.5"])
def test_min_score_that_would_keep_or_drop_everything(load, annotations, min_score):
    with pytest.raises(InputError, match="min_score must be a finite number"):
        load([detection()], load_detections, annotations, min_score)


def test_real_detections(data_root):
    sample = data_root / "coco_sample"
    (truth,) = sample.rglob("test_coco.json")
    (boxes,) = sample.rglob("test_coco_det_AP_H_56.json")
    annotations = load_annotations(truth)
    persons, elsewhere = load_detections(boxes, annotations)
    entries = json.loads(boxes.read_text())
    assert elsewhere == 0 and len(persons) == sum(e["category_id"] == 1 for e in entries) == 118
    assert [p.score for p in persons] == [e["score"] for e in entries if e["category_id"] == 1]


# Boxes by file name, images -------------------------------------------------------------------------------------------


def test_images_without_annotations(load):
    """image_info_test-dev2017.json: images, and categories that name no joints."""
    data = {"info": {}, "images": valid()["images"], "categories": [{"id": 1, "name": "person"}]}
    for content in (data, data | {"annotations": []}, {"images": data["images"]}):
        found = load(content, load_annotations, True)
        assert (
            found.skeleton == COCO17 and found.category_id == 1 and found.persons == () and set(found.images) == {0, 7}
        )
    with_joints = load({**data, "categories": valid()["categories"]}, load_annotations, True)
    assert with_joints.skeleton.num_joints == 3 and with_joints.category_id == 1
    assert load(valid(), load_annotations, True) == load(valid())
    with pytest.raises(InputError, match="annotations is missing"):
        load(data)
    for change, message in (
        ({"images": []}, "images must hold at least one image"),
        ({"images": [5]}, "images must be a list of objects"),
        ({"images": [{"id": 1}]}, "image 1: file_name is missing"),
        ({"categories": 5}, "categories must be a list of objects, got 5"),
    ):
        with pytest.raises(InputError, match=message):
            load(data | change, load_annotations, True)


def test_boxes_of_a_detection_file_by_name(load, tmp_path):
    (tmp_path / "images.json").write_text(json.dumps({"images": valid()["images"]}))
    boxes = ((0, 1, 0.9), (0, 1, 0.1), (7, 1, 0.8), (7, 2, 0.9), (8, 1, 0.9))
    entries = [{"image_id": i, "category_id": c, "bbox": [i, 2, 3, 4], "score": s} for i, c, s in boxes]
    expected = {"a.jpg": [(0, 2, 3, 4)] * 2, "b.jpg": [(7, 2, 3, 4)]}
    assert load(entries, load_boxes, tmp_path / "images.json") == expected
    assert load(entries, load_boxes, tmp_path / "images.json", 0.5) == expected | {"a.jpg": [(0, 2, 3, 4)]}
    with pytest.raises(InputError, match="got a list; detections need a file that names their images"):
        load(entries, load_boxes)


def test_boxes_by_name(load):
    assert load({"a.jpg": [[1, 2, 3, 4], [5, 6, 7, 8.5]], "b.jpg": []}, load_boxes) == {
        "a.jpg": [(1, 2, 3, 4), (5, 6, 7, 8.5)], "b.jpg": [],
    }  # fmt: skip
    # Of the persons in b.jpg none has a labelled joint: nobody is looked at there.
    assert load(valid(), load_boxes) == {"a.jpg": [(5, 6.5, 49, 59)], "b.jpg": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], 'must be {"photo.jpg": [[x, y, w, h], ...]} or a COCO file, got a list'),
        ({"a.jpg": 5}, "a.jpg: must be a list of [x, y, w, h], got a number"),
        ({"a.jpg": [1, 2, 3, 4]}, "a.jpg: bbox must be 4 finite numbers x, y, width, height, got 1"),
        ({"a.jpg": [[1, 2, 3]]}, "a.jpg: bbox must be 4 finite numbers"),
        ({"a.jpg": [[1, 2, 3, -4]]}, "a.jpg: bbox must have width and height >= 0"),
        ({"annotations": []}, "images is missing"),
    ],
)
def test_malformed_boxes(load, content, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load(content, load_boxes)


def test_check_images(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    check_images(["a.jpg", "a.jpg"], tmp_path)
    for names, message in (
        (["a.jpg", "b.jpg"], "b.jpg is missing$"),
        (["c.jpg", "b.jpg", "c.jpg"], r"b.jpg is missing \(and 1 more\)"),
        (["folder.jpg"], "folder.jpg is missing"),
        (["x" * 5000], "x is missing"),  # a name no file system has
        (["zero\0byte"], "is missing"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            check_images(names, tmp_path)
        assert str(caught.value).startswith(f"images {tmp_path}: ")
    with pytest.raises(InputError, match="is not a folder"):
        check_images(["a.jpg"], tmp_path / "a.jpg")


# Fuzz -----------------------------------------------------------------------------------------------------------------

ODD = [None, True, False, 0, 1, -1, 2, 3.5, NAN, INF, -INF, 1e300, 10**25, -(10**400), "", "1", "a", "\ud800", [], {},
       [1], [[]], [1, 2, 3, 4], [None] * 9, {"id": 1}]  # fmt: skip


def places(node):
    """Every container and key in a JSON value."""
    found = []
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        found.append((node, key))
        if isinstance(node[key], (dict, list)):
            found += places(node[key])
    return found


def mutated(data, source):
    data = copy.deepcopy(data)
    for _ in range(source.choice((1, 1, 2, 5))):
        container, key = source.choice(places(data))
        kind = source.random()
        if kind < 0.6:
            container[key] = copy.deepcopy(source.choice(ODD))
        elif kind < 0.8:
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[source.choice(("id", "keypoints", "extra", "area"))] = copy.deepcopy(container[key])
        if not places(data):
            break
    return data


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_random_mutations_load_or_give_an_input_error(load, annotations, count):
    source, loaded = random.Random(3), 0
    for i in range(count):
        data, loader, more = (
            (valid(), load_annotations, ()) if i % 3 else ([detection()] * 2, load_detections, (annotations,))
        )
        try:
            load(json.dumps(mutated(data, source)), loader, *more)
            loaded += 1
        except InputError as error:
            assert "file.json: " in str(error) and len(str(error)) < 1000
    assert count * 0.02 < loaded < count * 0.8


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_bytes_changed_load_or_give_an_input_error(load, count):
    source, text = random.Random(4), json.dumps(valid()).encode()
    refused = 0
    for _ in range(count):
        data = bytearray(text)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.choice(b'0123456789"[]{},:.-eENIatrue\x00\xff')
        try:
            load(bytes(data))
        except InputError as error:
            assert "file.json: " in str(error)
            refused += 1
    assert count * 0.2 < refused < count
