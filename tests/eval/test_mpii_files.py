"""Prediction files for MPII: read back, by us and as the test server's MATLAB code goes through them."""

import json
import re

import numpy as np
import pytest

from hrpose.data.coco import Person
from hrpose.data.mpii import MpiiAnnotations, person_box
from hrpose.errors import InputError
from hrpose.eval.mpii import check_same_persons, ground_truth_of, pckh, pckh_metrics
from hrpose.eval.mpii_files import load_predictions, save_predictions
from hrpose.skeleton import MPII16

scipy_io = pytest.importorskip("scipy.io")


def of_test():
    """Two of three persons in the first image, none in the second, one in the third: as load_mpii_mat gives them."""
    images = {
        4: {"id": 4, "file_name": "a.jpg", "rectangles": [((10, 20), 1.5), ((30, 40.5), 2.0), (None, None)]},
        5: {"id": 5, "file_name": "b.jpg", "rectangles": []},
        9: {"id": 9, "file_name": "c.jpg", "rectangles": [((70, 80), None), ((90, 95), 0.5)]},
    }
    places = ((4, 0), (4, 1), (9, 1))
    persons = tuple(
        Person(image, images[image]["file_name"], person_box(*images[image]["rectangles"][ridx]), i)
        for i, (image, ridx) in enumerate(places)
    )
    return MpiiAnnotations("mpii.mat", MPII16, 1, images, persons, {}, (), tuple(ridx for _, ridx in places))


def made(rng, count=3):
    return rng.normal(200, 90, (count, 16, 2)).astype(np.float32), rng.random((count, 16)).astype(np.float32)


@pytest.mark.parametrize("name", ["preds.mat", "preds.json", "PREDS.MAT"])
def test_round_trip(rng, tmp_path, name):
    keypoints, scores = made(rng)
    save_predictions(tmp_path / "new" / name, of_test(), keypoints, scores)
    np.testing.assert_array_equal(load_predictions(tmp_path / "new" / name), keypoints.astype(float) + 1 - 1)


def test_both_forms_count_from_1(rng, tmp_path):
    keypoints, scores = made(rng)
    save_predictions(tmp_path / "p.mat", of_test(), keypoints, scores)
    preds = scipy_io.loadmat(tmp_path / "p.mat")["preds"]
    assert preds.shape == (3, 16, 2)
    np.testing.assert_allclose(preds, keypoints + 1.0, rtol=1e-6)
    save_predictions(tmp_path / "p.json", of_test(), keypoints, scores)
    entries = json.loads((tmp_path / "p.json").read_text())
    assert [entry["image"] for entry in entries] == ["a.jpg", "a.jpg", "c.jpg"]
    np.testing.assert_array_equal([entry["joints"] for entry in entries], preds)
    np.testing.assert_array_equal([entry["scores"] for entry in entries], scores.astype(float))


def test_the_structure_for_the_server(rng, tmp_path):
    """flatten_annolist and annolist2matrix of MPII's toolkit: places in single_person, points by id."""
    keypoints, scores = made(rng)
    save_predictions(tmp_path / "pred_keypoints_mpii.mat", of_test(), keypoints, scores)
    pred = scipy_io.loadmat(tmp_path / "pred_keypoints_mpii.mat", struct_as_record=False)["pred"]
    assert pred.shape == (1, 3)
    assert [image.image[0, 0].name[0] for image in pred[0]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [image.annorect.size for image in pred[0]] == [3, 0, 2]
    found = []
    for image, single in zip(pred[0], ([1, 2, 3], [], [2]), strict=True):
        for ridx in single:
            rectangle = image.annorect[0, ridx - 1]
            if rectangle.objpos.size:
                matrix = np.full((16, 2), np.nan)
                for point in rectangle.annopoints[0, 0].point[0]:
                    matrix[int(point.id[0, 0])] = point.x[0, 0], point.y[0, 0]
                found.append(matrix)
    np.testing.assert_allclose(found, keypoints + 1.0, rtol=1e-6)
    first, second, third = pred[0, 0].annorect[0]
    assert (second.objpos[0, 0].x[0, 0], second.objpos[0, 0].y[0, 0], second.scale[0, 0]) == (30, 40.5, 2)
    assert third.objpos.size == third.scale.size == third.annopoints.size == 0 and first.scale[0, 0] == 1.5
    assert pred[0, 2].annorect[0, 0].annopoints.size == 0  # nobody was asked for


def test_no_structure_where_the_file_does_not_tell_the_rectangles(rng, tmp_path):
    keypoints, scores = made(rng)
    json_set = MpiiAnnotations("test.json", MPII16, 1, {}, of_test().persons, {})
    save_predictions(tmp_path / "p.mat", json_set, keypoints, scores)
    assert "pred" not in scipy_io.loadmat(tmp_path / "p.mat")


@pytest.mark.parametrize(
    ("keypoints", "scores", "message"),
    [
        (np.zeros((2, 16, 2)), np.zeros((3, 16)), "keypoints must be (3, 16, 2), got (2, 16, 2)"),
        (np.zeros((3, 16, 3)), np.zeros((3, 16)), "keypoints must be (3, 16, 2), got (3, 16, 3)"),
        (np.zeros((3, 16, 2)), np.zeros((3, 17)), "scores must be (3, 16), got (3, 17)"),
        (np.full((3, 16, 2), np.nan), np.zeros((3, 16)), "keypoints and scores must be finite"),
        (np.zeros((3, 16, 2)), np.full((3, 16), np.inf), "keypoints and scores must be finite"),
    ],
)
def test_what_is_not_saved(tmp_path, keypoints, scores, message):
    with pytest.raises(InputError, match=re.escape(f"predictions {tmp_path / 'p.mat'}: {message}")):
        save_predictions(tmp_path / "p.mat", of_test(), keypoints, scores)
    assert not (tmp_path / "p.mat").exists()


def test_endings(tmp_path):
    for function, given in ((save_predictions, (of_test(), None, None)), (load_predictions, ())):
        with pytest.raises(InputError, match=r"predictions .*p\.txt: must be a file ending in \.mat or \.json"):
            function(tmp_path / "p.txt", *given)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", {"a": 1}, "must be a list of {image, joints, scores}, got an object"),
        ("p.json", [5], "entry 0: must be an object with joints"),
        ("p.json", [{"image": "a"}], "entry 0: must be an object with joints"),
        ("p.json", [{"joints": [[1, 2]] * 15}], "entry 0: joints must be 16 pairs x, y, got"),
        ("p.json", [{"joints": [[1, 2]] * 15 + [[1]]}], "entry 0: joints must be 16 pairs x, y, got"),
        ("p.json", [{"joints": [["1", 2]] * 16}], "preds must be numbers (N, 16, 2)"),
        ("p.mat", {"other": np.zeros(3)}, "must hold preds, holds other"),
        ("p.mat", {"preds": np.zeros((2, 16, 3))}, "preds must be numbers (N, 16, 2), got float64 (2, 16, 3)"),
        ("p.mat", {"preds": np.zeros((16, 2))}, "preds must be numbers (N, 16, 2), got float64 (16, 2)"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    path = tmp_path / name
    if name == "p.mat":
        scipy_io.savemat(path, content)
    else:
        path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(f"predictions {path}: {message}")):
        load_predictions(path)


# The ground truth of an annotation file -------------------------------------------------------------------------------


def train_set(rng):
    joints = rng.uniform(0, 300, (4, 16, 2))
    visible = rng.choice([0, 1, 2], (4, 16))
    persons = tuple(
        Person(i, f"{i}.jpg", (0, 0, 9, 9), i, tuple(map(tuple, joints[i].tolist())), tuple(visible[i].tolist()))
        for i in range(4)
    )
    heads = (((10.0, 20.0), (40.0, 60.0)), None, ((5.0, 5.0), (35.0, 45.0)), ((0.0, 50.0), (40.0, 20.0)))
    return MpiiAnnotations("mpii.mat", MPII16, 1, {}, persons, {}, heads, (0,) * 4), joints, visible


def test_ground_truth_of_the_original_file(rng):
    annotations, joints, visible = train_set(rng)
    truth = ground_truth_of(annotations)
    check_same_persons(truth, annotations.persons)
    seen = visible > 0
    seen[1] = False  # without a head box
    keypoints = joints.copy()
    keypoints[:, 3] += 9, 12  # half a head of 0.6 * 50
    keypoints[:, 4] += 9, 12.1
    found = pckh(keypoints, truth)
    assert list(found.counts.values()) == seen.sum(0).tolist() and found.joints["left_hip"] == 100
    assert found.joints["left_knee"] == 0 and found.mean_weighted < 100
    metrics = pckh_metrics(keypoints, truth)
    assert metrics["PCKh@0.5"] == pytest.approx(found.mean_weighted / 100)
    assert metrics["PCKh@0.5 unweighted"] == pytest.approx(found.mean_unweighted / 100)
    assert list(metrics["PCKh@0.1 joints"]) == ["head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"]
    assert metrics["PCKh@0.11"] == pytest.approx(pckh(keypoints, truth, 0.11).mean_weighted / 100)
    without = MpiiAnnotations("mpii.json", MPII16, 1, {}, annotations.persons, {})
    assert ground_truth_of(without) is None


def test_ground_truth_of_other_persons_is_refused(rng):
    annotations, *_ = train_set(rng)
    truth, persons = ground_truth_of(annotations), annotations.persons
    with pytest.raises(InputError, match=r"mpii.mat: must be of the 3 persons annotated, is of 4"):
        check_same_persons(truth, persons[:3])
    with pytest.raises(InputError, match=r"is of other persons than annotated, first number 2, in 3\.jpg"):
        check_same_persons(truth, (*persons[:2], persons[3], persons[2]))
    check_same_persons(truth, (*of_test().persons, of_test().persons[0]))  # no joints, nothing to compare
