"""PCKh against published figures, a plain loop, and ties worked out by hand."""

import math
import re

import numpy as np
import pytest

from hrpose.errors import InputError
from hrpose.eval.mpii import GROUPS, LEGACY_01, GroundTruth, load_ground_truth, pckh
from hrpose.skeleton import MPII16


def made(rng, n=60):
    """Ground truth in gt_valid.mat's arrays, and predictions at distances of about half a head."""
    joints = rng.uniform(0, 500, (16, 2, n))
    corners = rng.uniform(0, 300, (2, 2, n))
    missing = (rng.random((16, n)) < 0.2).astype(np.uint8)
    heads = 0.6 * np.hypot(*(corners[1] - corners[0]))
    noise = rng.normal(size=(16, 2, n)) * heads * rng.choice([0.08, 0.4, 1.0], (16, 1, n))
    return (joints + noise).transpose(2, 0, 1) - 1, {
        "jnt_missing": missing,
        "pos_gt_src": joints,
        "headboxes_src": corners,
    }


def loop(predictions, truth, threshold):
    """Correct and counted of each joint, one person after the other."""
    correct, counted = [0] * 16, [0] * 16
    for person in range(len(predictions)):
        (x1, y1), (x2, y2) = truth["headboxes_src"][:, :, person]
        head = 0.6 * math.sqrt((x2 - x1) ** 2 + (y2 - y1) ** 2)
        for joint in range(16):
            if truth["jnt_missing"][joint][person]:
                continue
            x, y = truth["pos_gt_src"][joint, :, person]
            u, v = predictions[person][joint]
            counted[joint] += 1
            correct[joint] += math.sqrt((u + 1 - x) ** 2 + (v + 1 - y) ** 2) / head <= threshold
    return correct, counted


@pytest.mark.parametrize("threshold", [0.5, 0.1, LEGACY_01])
def test_equal_to_a_loop(rng, threshold):
    predictions, truth = made(rng)
    correct, counted = loop(predictions, truth, threshold)
    found = pckh(predictions, truth, threshold)
    each = [100 * c / n for c, n in zip(correct, counted, strict=True)]
    assert [found.joints[name] for name in MPII16.joints] == pytest.approx(each, abs=1e-9)
    assert list(found.counts.values()) == counted and (found.threshold, found.persons) == (threshold, 60)
    sides = {"shoulder": (12, 13), "elbow": (11, 14), "wrist": (10, 15), "hip": (2, 3), "knee": (1, 4), "ankle": (0, 5)}
    assert list(found.joints)[:7] == ["head", *sides]  # the order of the papers' tables
    assert found.joints["head"] == pytest.approx(each[9])
    for name, (a, b) in sides.items():
        assert found.joints[name] == pytest.approx((each[a] + each[b]) / 2)
    mean = [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15]
    assert found.mean_unweighted == pytest.approx(sum(each[i] for i in mean) / 14)
    assert found.mean_weighted == pytest.approx(100 * sum(correct[i] for i in mean) / sum(counted[i] for i in mean))
    assert abs(found.mean_weighted - found.mean_unweighted) > 1e-3 and 1 < found.mean_weighted < 99


def test_groups_are_the_pairs_of_the_skeleton():
    for name, group in GROUPS.items():
        names = {MPII16.joints[i] for i in group}
        assert names == ({"head_top"} if name == "head" else {f"left_{name}", f"right_{name}"})


def one():
    """A person whose head box is 30 x 40 pixels: its size is 0.6 * 50 = 30."""
    joints = np.zeros((16, 2, 1)) + 100.0
    corners = np.array([[10.0, 20.0], [40.0, 60.0]])[:, :, None]
    return np.full((1, 16, 2), 99.0), {
        "jnt_missing": np.zeros((16, 1)),
        "pos_gt_src": joints,
        "headboxes_src": corners,
    }


def test_predictions_are_counted_from_0_and_ties_are_correct():
    predictions, truth = one()
    assert pckh(predictions, truth, 0).mean_weighted == 100  # 99 from 0 is 100 from 1
    predictions[0, 0] = 99 + 9, 99 + 12  # 15 pixels: exactly half a head
    predictions[0, 1] = 99 + 9, np.nextafter(99.0 + 12, 200)
    predictions[0, 2] = 99, 99 - 3  # exactly a tenth
    predictions[0, 3] = 99, 99 - 3.3  # the 11 hundredths of "Mean@0.1"
    found = pckh(predictions, truth)
    assert found.joints["right_ankle"] == 100 and found.joints["right_knee"] == 0 and found.joints["ankle"] == 100
    assert found.joints["knee"] == 50 and found.mean_unweighted == pytest.approx(1300 / 14)
    tenth, legacy = pckh(predictions, truth, 0.1), pckh(predictions, truth, LEGACY_01)
    assert (tenth.joints["right_hip"], tenth.joints["left_hip"]) == (100, 0)
    assert (legacy.joints["right_hip"], legacy.joints["left_hip"]) == (100, 100)
    assert np.arange(0, 0.5 + 0.01, 0.01)[11] == LEGACY_01  # HRNet's row 11


def test_pelvis_and_thorax_are_in_no_mean():
    predictions, truth = one()
    predictions[0, [6, 7]] = 0
    found = pckh(predictions, truth)
    assert found.joints["pelvis"] == found.joints["thorax"] == 0
    assert found.mean_weighted == found.mean_unweighted == 100
    predictions[0, 8] = 0  # the upper neck is in the means and in no column
    found = pckh(predictions, truth)
    assert found.mean_weighted == pytest.approx(1300 / 14)
    assert [found.joints[name] for name in GROUPS] == [100] * 7


def test_missing_joints_may_hold_anything():
    predictions, truth = one()
    truth["jnt_missing"][[0, 5, 9]] = 1
    truth["pos_gt_src"][0], truth["pos_gt_src"][5] = np.nan, np.inf
    predictions[0, 1] = 0
    found = pckh(predictions, truth)
    assert found.joints["right_ankle"] is None and found.joints["ankle"] is None and found.joints["head"] is None
    assert found.counts["head_top"] == 0 and found.mean_weighted == pytest.approx(1000 / 11) == found.mean_unweighted
    truth["jnt_missing"][2] = 1
    assert pckh(predictions, truth).joints["hip"] == 100  # of the side that is labelled
    truth["jnt_missing"][:] = 1
    truth["headboxes_src"][:] = 0
    found = pckh(predictions, truth)
    assert found.mean_weighted is None and found.mean_unweighted is None and found.persons == 1


def test_nobody():
    found = pckh(np.zeros((0, 16, 2)), (np.zeros((16, 0)), np.zeros((16, 2, 0)), np.zeros((2, 2, 0))))
    assert found.mean_weighted is None and found.persons == 0


def test_forms_of_the_same_ground_truth(rng, tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    predictions, truth = made(rng, 5)
    path = tmp_path / "gt_valid.mat"
    names = np.array(
        [["rank", "rkne", "rhip", "lhip", "lkne", "lank", "pelv", "thor", "neck", "head", "rwri", "relb", "rsho",
          "lsho", "lelb", "lwri"]], object,
    )  # fmt: skip
    scipy_io.savemat(path, truth | {"dataset_joints": names})
    expected = pckh(predictions, truth)
    for form in (path, str(path), load_ground_truth(path), GroundTruth(**truth), tuple(truth.values())):
        assert pckh(predictions, form) == expected
    assert pckh(predictions.tolist(), [value.tolist() for value in truth.values()]) == expected
    one_person = {"jnt_missing": truth["jnt_missing"][:, :1], "pos_gt_src": truth["pos_gt_src"][:, :, :1],
                  "headboxes_src": truth["headboxes_src"][:, :, :1]}  # fmt: skip
    scipy_io.savemat(path, one_person)
    assert len(load_ground_truth(path)) == 1
    names[0, 0] = "lank"
    scipy_io.savemat(path, truth | {"dataset_joints": names})
    with pytest.raises(InputError, match=r"gt_valid.mat: dataset_joints must be rank rkne .*got \['lank', 'rkne'"):
        load_ground_truth(path)


NAN, INF = float("nan"), float("inf")
TRUTH = "ground truth: "


def put(name, index, value):
    def change(given):
        array = given[name] if name in given else given["ground_truth"][name]
        array[index] = value

    return change


def replace(name, value):
    def change(given):
        (given if name in given else given["ground_truth"])[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("predictions", (0, 9, 1), NAN), "pckh: predictions must be finite, person 0, head_top is [99.0, nan"),
        (put("predictions", (0, 0, 0), -INF), "pckh: predictions must be finite, person 0, right_ankle is [-inf"),
        (replace("predictions", np.zeros((1, 17, 2))), "pckh: predictions must be (1, 16, 2), as ground truth, got (1"),
        (replace("predictions", np.zeros((2, 16, 2))), "predictions must be (1, 16, 2), as ground truth, got (2, 16"),
        (replace("predictions", np.zeros((2, 16, 1))), "predictions must be (1, 16, 2), as ground truth, got (2, 16"),
        (replace("predictions", np.zeros((1, 16, 3))), "predictions must be (1, 16, 2), as ground truth, got (1, 16"),
        (replace("predictions", np.zeros((16, 2))), "predictions must be (1, 16, 2), as ground truth, got (16, 2)"),
        (replace("predictions", [[1, 2], [3]]), "pckh: predictions must be an array of numbers, got [[1, 2], [3]]"),
        (replace("predictions", None), "pckh: predictions must be an array of numbers, got None"),
        (replace("predictions", np.zeros((1, 16, 2), complex)), "pckh: predictions must be an array of numbers, got"),
        (replace("predictions", np.full((1, 16, 2), "a")), "pckh: predictions must be an array of numbers, got"),
        (replace("threshold", -0.1), "pckh: threshold must be >= 0, got -0.1"),
        (replace("threshold", NAN), "pckh: threshold must be >= 0, got nan"),
        (replace("threshold", INF), "pckh: threshold must be >= 0, got inf"),
        (replace("threshold", "0.5"), "pckh: threshold must be >= 0, got '0.5'"),
        (put("jnt_missing", (3, 0), 2), TRUTH + "jnt_missing must hold 0 and 1 alone"),
        (put("jnt_missing", (3, 0), NAN), TRUTH + "jnt_missing must hold 0 and 1 alone"),
        (replace("jnt_missing", np.zeros((1, 16))), TRUTH + "jnt_missing must be (16, N), got (1, 16)"),
        (replace("jnt_missing", np.zeros(16)), TRUTH + "jnt_missing must be (16, N), got (16,)"),
        (put("pos_gt_src", (3, 1, 0), NAN), TRUTH + "pos_gt_src must be finite where jnt_missing is 0, person 0"),
        (replace("pos_gt_src", np.zeros((1, 16, 2))), TRUTH + "pos_gt_src must be (16, 2, 1), got (1, 16, 2)"),
        (replace("headboxes_src", np.zeros((2, 2))), TRUTH + "headboxes_src must be (2, 2, 1), got (2, 2)"),
        (put("headboxes_src", 0, 7), None),
        (put("headboxes_src", slice(None), 7), TRUTH + "headboxes_src must hold two different, finite corners"),
        (put("headboxes_src", (0, 0, 0), NAN), TRUTH + "headboxes_src must hold two different, finite corners"),
        (lambda given: given["ground_truth"].pop("headboxes_src"), TRUTH + "must hold jnt_missing, pos_gt_src, headb"),
        (replace("ground_truth", (1, 2)), TRUTH + "must be a path, or the arrays jnt_missing, pos_gt_src, headboxes_s"),
        (replace("ground_truth", 5), TRUTH + "must be a path, or the arrays"),
        (replace("ground_truth", "nowhere.mat"), "ground truth nowhere.mat: no such file"),
    ],
)  # fmt: skip
def test_messages(change, message):
    predictions, truth = one()
    given = {"predictions": predictions, "ground_truth": truth, "threshold": 0.5}
    change(given)
    if message is None:
        assert pckh(**given).persons == 1
        return
    with pytest.raises(InputError, match=re.escape(message)):
        pckh(**given)


@pytest.mark.parametrize("content", [b"", b"no matlab", b"MATLAB 5.0 MAT-file" + bytes(200), b'{"a": 1}'])
def test_files_that_are_not_matlabs(tmp_path, content):
    pytest.importorskip("scipy.io")
    path = tmp_path / "gt.mat"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"ground truth {path}: ")) as caught:
        load_ground_truth(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_truncation_of_a_file_is_refused(rng, tmp_path, compressed):
    scipy_io = pytest.importorskip("scipy.io")
    path = tmp_path / "gt.mat"
    scipy_io.savemat(path, made(rng, 2)[1], do_compression=compressed)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=re.escape(f"ground truth {path}: ")):
            load_ground_truth(path)


def test_scipy_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(InputError, match=r"gt_valid.mat: .mat files need scipy: pip install 'hrpose\[mpii\]'"):
        load_ground_truth("gt_valid.mat")
    predictions, truth = one()
    assert pckh(predictions, truth).mean_weighted == 100  # arrays need no scipy


def test_the_published_figures_of_a_hourglass(data_root):
    """PCKh of bearpaw's 2-stack hourglass as published with it, and what HRNet's evaluation computes of the same."""
    scipy_io = pytest.importorskip("scipy.io")
    preds = scipy_io.loadmat(data_root / "mpii_valid" / "pred_hourglass_s2.mat")["preds"]
    path = data_root / "mpii_valid" / "gt_valid.mat"
    found = pckh(preds - 1, path)
    published = {"head": 95.80, "shoulder": 94.57, "elbow": 88.12, "wrist": 83.31, "hip": 86.24, "knee": 80.88,
                 "ankle": 77.44}  # fmt: skip
    assert {name: round(found.joints[name], 2) for name in published} == published
    assert round(found.mean_unweighted, 2) == 86.76 and round(found.mean_weighted, 3) == 87.299
    assert found.persons == 2958 and found.counts["right_ankle"] == 2958 - 843
    assert official(preds, scipy_io.loadmat(path), 0.5) == pytest.approx(found.mean_weighted, abs=1e-10)
    for threshold, row in ((0.1, 10), (LEGACY_01, 11)):
        expected = official(preds, scipy_io.loadmat(path), np.arange(0, 0.51, 0.01)[row])
        assert pckh(preds - 1, path, threshold).mean_weighted == pytest.approx(expected, abs=1e-10)


def official(preds, truth, threshold):
    """The published evaluation, restated: distances in head sizes, visible joints, count-weighted without 6 and 7."""
    visible = 1 - truth["jnt_missing"]
    errors = np.linalg.norm(np.transpose(preds, [1, 2, 0]) - truth["pos_gt_src"], axis=1)
    heads = np.linalg.norm(truth["headboxes_src"][1] - truth["headboxes_src"][0], axis=0) * 0.6
    scaled = errors / (heads * np.ones((16, 1))) * visible
    shares = 100.0 * ((scaled <= threshold) * visible).sum(1) / visible.sum(1)
    counts = np.where(np.isin(np.arange(16), (6, 7)), 0, visible.sum(1))
    return float((shares * counts / counts.sum()).sum())
