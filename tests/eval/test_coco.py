"""COCO scoring against the official loops and against pycocotools fed by hand."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hrpose.data.coco import Annotations, load_annotations, load_detections
from hrpose.errors import InputError
from hrpose.eval.coco import (
    METRICS,
    check_results,
    coco_metrics,
    oks_matrix,
    oks_nms,
    person_scores,
    result_file_name,
    results_from_predictions,
    save_results,
)
from hrpose.skeleton import COCO17, LSP14

TENTHS = (.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62, 1.07, 1.07, .87, .87, .89, .89)  # fmt: skip
SIGMAS = np.array(TENTHS) / 10


# The official code, restated ------------------------------------------------------------------------------------------


def official_oks_iou(g, d, a_g, a_d, sigmas=SIGMAS):
    variances = (sigmas * 2) ** 2
    xg, yg = g[0::3], g[1::3]
    ious = np.zeros(d.shape[0])
    for n_d in range(d.shape[0]):
        xd, yd = d[n_d, 0::3], d[n_d, 1::3]
        dx, dy = xd - xg, yd - yg
        e = (dx**2 + dy**2) / variances / ((a_g + a_d[n_d]) / 2 + np.spacing(1)) / 2
        ious[n_d] = np.sum(np.exp(-e)) / e.shape[0] if e.shape[0] != 0 else 0.0
    return ious


def official_oks_nms(persons, threshold):
    if len(persons) == 0:
        return []
    scores = np.array([p["score"] for p in persons])
    kpts = np.array([p["keypoints"].flatten() for p in persons])
    areas = np.array([p["area"] for p in persons])
    order = scores.argsort()[::-1]
    keep = []
    while order.size > 0:
        i = order[0]
        keep.append(i)
        overlap = official_oks_iou(kpts[i], kpts[order[1:]], areas[i], areas[order[1:]])
        inds = np.where(overlap <= threshold)[0]
        order = order[inds + 1]
    return keep


def official_person_score(box_score, keypoints, threshold=0.2):
    total, valid = 0, 0
    for joint in range(len(keypoints)):
        if keypoints[joint][2] > threshold:
            total, valid = total + keypoints[joint][2], valid + 1
    return (total / valid if valid else total) * box_score


def crowd_of(rng, count, spread):
    """Persons standing in heaps: near copies of a few."""
    centers = rng.uniform(50, 500, (3, 17, 2))
    keypoints = np.concatenate([centers[rng.integers(0, 3, count)], rng.random((count, 17, 1))], 2)
    keypoints[..., :2] += rng.normal(size=(count, 17, 2)) * spread
    return keypoints, rng.uniform(2000, 40000, count)


# OKS and NMS ----------------------------------------------------------------------------------------------------------


def test_oks_matrix_equals_the_official_loop(rng):
    keypoints, areas = crowd_of(rng, 12, 8)
    found = oks_matrix(keypoints, areas)
    flat = keypoints.reshape(12, -1)
    expected = np.stack([official_oks_iou(flat[i], flat, areas[i], areas) for i in range(12)])
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert expected.std() > 0.2  # alike and unlike persons
    assert (found == found.T).all() and (np.diag(found) == 1).all()
    np.testing.assert_array_equal(oks_matrix(keypoints[..., :2].tolist(), list(areas)), found)


def test_oks_by_hand():
    """One joint 3 px and 4 px off with 2 sigma = 0.5 and areas 50 and 150: exp(-25 / 0.25 / 100 / 2)."""
    found = oks_matrix([[[0, 0]], [[3, 4]]], [50, 150], [0.25])
    assert found[0, 1] == pytest.approx(np.exp(-25 / 0.25 / 100 / 2), rel=1e-12)


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9])
def test_oks_nms_equals_the_official_loop(rng, threshold):
    dropped = 0
    for trial in range(60):
        count = int(rng.integers(0, 30))
        keypoints, areas = crowd_of(rng, count, rng.choice([2, 8, 30]))
        # half of the trials with many equal scores: the order among them is that of argsort()[::-1]
        scores = rng.random(count) if trial % 2 else rng.integers(0, 3, count) / 2
        people = [{"score": s, "keypoints": k, "area": a} for s, k, a in zip(scores, keypoints, areas, strict=True)]
        expected = official_oks_nms(people, threshold)
        assert oks_nms(keypoints, scores, areas, threshold) == expected
        dropped += count - len(expected)
    assert dropped > 50


def test_oks_nms_by_hand():
    """Two copies of a person and one elsewhere."""
    keypoints = np.zeros((3, 17, 2))
    keypoints[1] += 0.5
    keypoints[2] += 100
    areas = [5000.0] * 3
    assert oks_nms(keypoints, [0.5, 0.9, 0.1], areas, 0.9) == [1, 2]
    assert oks_nms(keypoints, [0.9, 0.5, 0.95], areas, 0.9) == [2, 0]
    assert oks_nms(keypoints, [0.5, 0.9, 0.1], areas, 1.0) == [1, 0, 2]
    keypoints[1] = keypoints[0]  # an OKS of exactly 1 is not above 1
    assert oks_nms(keypoints, [0.5, 0.9, 0.1], areas, 1.0) == [1, 0, 2]
    assert oks_nms(keypoints[:1], [0.5], areas[:1], 0.9) == [0]
    assert oks_nms([], [], [], 0.9) == []
    assert oks_nms(np.zeros((0, 17, 3)), np.zeros(0), np.zeros(0), 0.9) == []


def test_equal_scores_are_taken_in_the_order_of_numpy(rng):
    """Which is no simple one beyond a few persons: the sort is not stable."""
    scores = rng.integers(0, 3, 300) / 2
    keypoints = rng.uniform(0, 500, (300, 17, 2))
    assert oks_nms(keypoints, scores, np.full(300, 9.0), 1.0) == scores.argsort()[::-1].tolist()


def test_oks_nms_with_other_joints(rng):
    keypoints, areas = rng.uniform(0, 50, (6, 14, 2)), rng.uniform(100, 9000, 6)
    assert sorted(oks_nms(keypoints, rng.random(6), areas, 1.0, LSP14.sigmas)) == list(range(6))
    with pytest.raises(InputError, match=r"oks: sigmas must be 14 numbers, got \(17,\)"):
        oks_nms(keypoints, rng.random(6), areas, 0.9)


@pytest.mark.parametrize(
    ("keypoints", "areas", "sigmas", "message"),
    [
        (np.zeros((2, 34)), [1, 1], None, r"keypoints must be \(P, K, 2 or 3\), got \(2, 34\)"),
        (np.zeros((2, 17, 4)), [1, 1], None, r"keypoints must be \(P, K, 2 or 3\), got \(2, 17, 4\)"),
        (np.zeros((2, 17, 2)), [1], None, r"areas must be \(2,\), got \(1,\)"),
        (np.zeros((2, 17, 2)), [1, -1], None, "areas must be finite and >= 0"),
        (np.zeros((2, 17, 2)), [1, np.nan], None, "areas must be finite and >= 0"),
        (np.full((2, 17, 2), np.nan), [1, 1], None, "keypoints must be finite"),
        (np.zeros((2, 2, 2)), [1, 1], [0.1, 0], "sigmas must be > 0"),
    ],
)
def test_oks_messages(keypoints, areas, sigmas, message):
    with pytest.raises(InputError, match=f"oks: {message}"):
        oks_matrix(keypoints, areas, sigmas)


def test_oks_nms_messages():
    with pytest.raises(InputError, match=r"oks_nms: scores must be \(2,\), got \(3,\)"):
        oks_nms(np.zeros((2, 17, 2)), [1, 2, 3], [1, 1], 0.9)
    with pytest.raises(InputError, match="oks_nms: scores must be finite"):
        oks_nms(np.zeros((2, 17, 2)), [1, np.nan], [1, 1], 0.9)


# Scores of persons ----------------------------------------------------------------------------------------------------


def test_person_scores_equal_the_official_loop(rng):
    keypoints, boxes = rng.random((40, 17, 3)) * rng.choice([0.1, 0.3, 1.0], (40, 1, 1)), rng.random(40)
    found = person_scores(boxes, keypoints[..., 2])
    expected = [official_person_score(b, k) for b, k in zip(boxes, keypoints, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    assert 0 in expected  # some person without a joint above 0.2
    assert person_scores([0.5], [[0.2, 0.4, 0.6, 0.1]]).tolist() == [0.25]  # exactly 0.2 does not count
    assert person_scores([], np.zeros((0, 17))).shape == (0,)


def test_person_scores_messages():
    for boxes, scores, message in (
        ([0.5], [0.5, 0.6], r"keypoint_scores must be \(P, K\), got \(2,\)"),
        ([[0.5], [0.6]], np.zeros((2, 17)), r"box_scores must be \(2,\), got \(2, 1\)"),  # would broadcast to (2, 2)
        ([0.5, np.nan], np.zeros((2, 17)), "scores must be finite"),
        ([0.5, 0.5], np.full((2, 17), np.nan), "scores must be finite"),  # NaN is above no threshold
    ):
        with pytest.raises(InputError, match=f"person_scores: {message}"):
            person_scores(boxes, scores)


def test_results_from_predictions_equal_the_official_evaluation(rng):
    """Rescoring, then OKS-NMS within each image, as COCODataset.evaluate does."""
    keypoints, areas = crowd_of(rng, 60, 3)
    keypoints[..., :2] = keypoints[..., :2].astype(np.float32)
    boxes, ids = rng.random(60), rng.integers(0, 5, 60)
    found = results_from_predictions(
        ids, keypoints[..., :2], keypoints[..., 2], boxes, areas, category_id=1, sigmas=COCO17.sigmas
    )
    expected = []
    for image in dict.fromkeys(ids.tolist()):
        people = [
            {"score": official_person_score(boxes[i], keypoints[i]), "keypoints": keypoints[i], "area": areas[i]}
            for i in np.flatnonzero(ids == image)
        ]
        expected += [(image, people[i]) for i in official_oks_nms(people, 0.9)]
    assert len(found) == len(expected) < 60
    for entry, (image, one) in zip(found, expected, strict=True):
        assert entry["image_id"] == image and entry["category_id"] == 1
        assert entry["score"] == pytest.approx(one["score"], rel=1e-14)
        assert entry["keypoints"] == one["keypoints"].flatten().tolist()
    assert json.loads(json.dumps(found)) == found  # plain types


def test_results_without_nms(rng):
    keypoints = np.zeros((3, 17, 2))
    given = ([5, 5, 5], keypoints, np.ones((3, 17)), np.ones(3), np.ones(3))
    assert len(results_from_predictions(*given, sigmas=COCO17.sigmas)) == 1
    assert len(results_from_predictions(*given, sigmas=COCO17.sigmas, nms_threshold=None)) == 3
    assert len(results_from_predictions(*given)) == 3
    assert results_from_predictions([], np.zeros((0, 17, 2)), np.zeros((0, 17)), [], [], sigmas=COCO17.sigmas) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": [1]}, r"results: image_ids must be \(2,\), got \(1,\)"),
        ({"keypoints": np.zeros((2, 17, 3))}, r"results: keypoints must be \(2, 17, 2\), got \(2, 17, 3\)"),
        ({"keypoints": np.full((2, 17, 2), np.inf)}, "results: keypoints must be finite"),
        ({"areas": [1]}, r"results: areas must be \(2,\), got \(1,\)"),
        ({"box_scores": [1]}, r"person_scores: box_scores must be \(2,\), got \(1,\)"),
        ({"scores": np.full((2, 17), np.nan)}, "person_scores: scores must be finite"),
    ],
)
def test_results_messages(change, message):
    given = {"image_ids": [1, 2], "keypoints": np.zeros((2, 17, 2)), "scores": np.zeros((2, 17)), "box_scores": [1, 1],
             "areas": [1, 1]}  # fmt: skip
    with pytest.raises(InputError, match=message):
        results_from_predictions(**(given | change), sigmas=COCO17.sigmas)


# Metrics --------------------------------------------------------------------------------------------------------------


def synthetic(rng, tmp_path, skeleton, images=12):
    """An annotation file of random persons, with a crowd and unlabelled persons, and predictions with noise."""
    k = skeleton.num_joints
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(images)],  # id 0 too
        "annotations": [],
        "categories": [
            {"id": 1, "name": "person", **{key: v for key, v in skeleton.to_dict().items() if key != "name"}}
        ],
    }
    data["categories"][0] |= {"keypoints": list(skeleton.joints), "skeleton": []}
    results = []
    for image in range(images):
        for n in range(rng.integers(1, 6)):
            x, y, w, h = *rng.uniform(0, 300, 2), *rng.uniform(20, 220, 2)
            joints = rng.uniform((x, y), (x + w, y + h), (k, 2)).round(1)
            visible = rng.choice([0, 1, 2], k, p=[0.3, 0.2, 0.5])
            visible[0] = 2
            crowd = bool(n == 3)
            if n == 4:
                visible[:] = 0
            triples = np.c_[joints * (visible > 0)[:, None], visible]
            area = round(w * h * 0.6, 2)
            data["annotations"].append(
                {"id": len(data["annotations"]) + 1, "image_id": image, "category_id": 1, "bbox": [x, y, w, h],
                 "area": area, "iscrowd": int(crowd), "num_keypoints": int((visible > 0).sum()),
                 "keypoints": triples.reshape(-1).tolist()}
            )  # fmt: skip
            noise = rng.normal(size=(k, 2)) * np.sqrt(area) * rng.choice([0.02, 0.05, 0.12])
            found = np.c_[joints + noise, rng.random(k)]
            entry = {"image_id": image, "category_id": 1, "score": float(rng.random())}
            if rng.random() < 0.9:
                results.append({**entry, "keypoints": found.reshape(-1).tolist()})
            if rng.random() < 0.3:  # a false alarm
                results.append({**entry, "score": 0.3, "keypoints": (found + 70).reshape(-1).tolist()})
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    return path, results


def by_hand(truth, results, tmp_path, sigmas=None):
    """pycocotools as its own example uses it: two files, loadRes, evaluate, accumulate, summarize."""
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(truth))
        evaluation = COCOeval(gt, gt.loadRes(str(tmp_path / "results.json")), "keypoints")
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [None if value == -1 else value for value in evaluation.stats]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("skeleton", [COCO17, LSP14], ids=lambda s: s.name)
def test_metrics_equal_pycocotools_fed_by_hand(tmp_path, skeleton, seed):
    truth, results = synthetic(np.random.default_rng(seed), tmp_path, skeleton)
    found = coco_metrics(load_annotations(truth), results)
    expected = by_hand(truth, results, tmp_path, None if skeleton is COCO17 else skeleton.sigmas)
    assert tuple(found) == METRICS and list(found.values()) == expected
    assert 0.2 < found["AP"] < 0.9 and found["AP"] < found["AP50"]


def test_metrics_with_other_sigmas(tmp_path):
    sigmas = [0.3 * s for s in COCO17.sigmas]
    truth, results = synthetic(np.random.default_rng(0), tmp_path, COCO17)
    data = json.loads(truth.read_text())
    official = coco_metrics(load_annotations(truth), results)["AP"]
    data["categories"][0]["sigmas"] = sigmas
    truth.write_text(json.dumps(data))
    found = coco_metrics(load_annotations(truth), results)
    assert list(found.values()) == by_hand(truth, results, tmp_path, sigmas)
    assert found["AP"] < official - 0.1


def test_names_are_in_pycocotools_order(tmp_path):
    """summarize prints its table in the order of stats, with names."""
    truth, results = synthetic(np.random.default_rng(1), tmp_path, COCO17)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        gt = COCO(str(truth))
        evaluation = COCOeval(gt, gt.loadRes(copy.deepcopy(results)), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    lines = [line for line in printed.getvalue().splitlines() if "Average" in line]
    found = coco_metrics(load_annotations(truth), results)
    suffix = {"0.50:0.95": "", "0.50": "50", "0.75": "75"}
    for line, name in zip(lines, METRICS, strict=True):
        kind = "AP" if "(AP)" in line else "AR"
        iou, area = line.split("IoU=")[1].split("|")[0].strip(), line.split("area=")[1].split("|")[0].strip()
        named = kind + (suffix[iou] if area == "all" else {"medium": "_M", "large": "_L"}[area])
        assert named == name and f"{found[name]:.3f}" == line.split("=")[-1].strip()


def perfect(annotations):
    return [
        {"image_id": p.image_id, "category_id": 1, "score": 1.0,
         "keypoints": [v for (x, y), seen in zip(p.joints, p.visible, strict=True) for v in (x, y, float(seen > 0))]}
        for p in annotations.persons
    ]  # fmt: skip


def test_perfect_and_empty_predictions(tmp_path):
    truth, _ = synthetic(np.random.default_rng(2), tmp_path, COCO17)
    annotations = load_annotations(truth)
    assert set(coco_metrics(annotations, perfect(annotations)).values()) == {1.0}
    assert set(coco_metrics(annotations, []).values()) == {0.0}


def test_sizes_that_do_not_occur_have_no_score(tmp_path):
    truth, _ = synthetic(np.random.default_rng(2), tmp_path, COCO17)
    data = json.loads(truth.read_text())
    for annotation in data["annotations"]:
        annotation["area"] = 40.0**2  # medium
    truth.write_text(json.dumps(data))
    annotations = load_annotations(truth)
    for results, value in ((perfect(annotations), 1.0), ([], 0.0)):
        found = coco_metrics(annotations, results)
        assert found["AP_L"] is None and found["AR_L"] is None and found["AP_M"] == found["AP"] == value


def test_inputs_stay_as_they_are_and_repeat(tmp_path, capfd):
    truth, results = synthetic(np.random.default_rng(0), tmp_path, COCO17)
    annotations = load_annotations(truth)
    before = json.dumps([annotations.json, results])
    first = coco_metrics(annotations, results)
    assert coco_metrics(annotations, results) == first and json.dumps([annotations.json, results]) == before
    assert capfd.readouterr() == ("", "")


def test_numpy_values_in_results(tmp_path):
    truth, results = synthetic(np.random.default_rng(0), tmp_path, COCO17)
    arrays = [
        {"image_id": np.int64(r["image_id"]), "category_id": 1, "score": np.float64(r["score"]),
         "keypoints": np.array(r["keypoints"])}
        for r in results
    ]  # fmt: skip
    annotations = load_annotations(truth)
    assert coco_metrics(annotations, arrays) == coco_metrics(annotations, results)


# What pycocotools would score without a word --------------------------------------------------------------------------


def test_nan_scores_as_perfect_in_pycocotools_and_is_refused_here(tmp_path):
    truth, _ = synthetic(np.random.default_rng(0), tmp_path, COCO17)
    annotations = load_annotations(truth)
    broken = perfect(annotations)
    for entry in broken:
        entry["keypoints"] = [float("nan")] * 51
    with np.errstate(invalid="ignore"):
        assert by_hand(truth, broken, tmp_path)[0] == 1.0
    with pytest.raises(InputError, match="results: entry 0: keypoints must be 51 finite numbers"):
        coco_metrics(annotations, broken)


def test_a_box_in_the_results_changes_the_areas_of_pycocotools_but_nothing_here(tmp_path):
    """loadRes looks at the first entry: with a bbox it takes areas from there, and AP_M leaves out other detections."""
    truth, results = synthetic(np.random.default_rng(0), tmp_path, COCO17)
    annotations = load_annotations(truth)
    expected = coco_metrics(annotations, results)
    with_boxes = [{**entry, "bbox": [0, 0, 10, 10]} for entry in results]
    assert by_hand(truth, with_boxes, tmp_path) != list(expected.values())
    assert coco_metrics(annotations, with_boxes) == expected
    captions = [{**entry, "caption": "x", "segmentation": []} for entry in results]
    assert coco_metrics(annotations, captions) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "image_id 99 is not in "),
        ({"image_id": "0"}, "image_id '0' is not in "),
        ({"image_id": True}, "image_id True is not in "),
        ({"image_id": [0]}, r"image_id \[0\] is not in "),
        ({"image_id": None}, "image_id None is not in "),
        ({"category_id": 2}, "category_id must be 1, got 2"),
        ({"category_id": True}, "category_id must be 1, got True"),
        ({"keypoints": [1.0] * 50}, "keypoints must be 51 finite numbers, got "),
        ({"keypoints": [1.0] * 42}, "keypoints must be 51 finite numbers, got "),
        ({"keypoints": [[1.0, 2.0, 3.0]] * 17}, "keypoints must be 51 finite numbers, got "),
        ({"keypoints": None}, "keypoints must be 51 finite numbers, got None"),
        ({"keypoints": "abc"}, "keypoints must be 51 finite numbers, got 'abc'"),
        ({"keypoints": ["1"] * 51}, "keypoints must be 51 finite numbers, got "),
        ({"keypoints": [True] * 51}, "keypoints must be 51 finite numbers, got "),
        ({"keypoints": [1.0] * 50 + [float("inf")]}, "keypoints must be 51 finite numbers, got "),
        ({"keypoints": [1.0] * 50 + [10**400]}, "keypoints must be 51 finite numbers, got "),
        ({"score": float("nan")}, "score must be a finite number, got nan"),
        ({"score": "0.5"}, "score must be a finite number, got '0.5'"),
        ({"score": None}, "score must be a finite number, got None"),
        ({"score": [0.5]}, r"score must be a finite number, got \[0.5\]"),
        ({"score": True}, "score must be a finite number, got True"),
    ],
)
def test_malformed_results(tmp_path, change, message):
    truth, results = synthetic(np.random.default_rng(0), tmp_path, COCO17)
    annotations = load_annotations(truth)
    results[2].update(change)
    for function in (check_results, coco_metrics):
        with pytest.raises(InputError, match=f"results: entry 2: {message}"):
            function(annotations, results)


def test_malformed_results_as_a_whole(tmp_path):
    truth, results = synthetic(np.random.default_rng(0), tmp_path, COCO17)
    annotations = load_annotations(truth)
    for broken, message in (
        ({"a": 1}, "results: must be a list of objects, got dict"),
        ("results.json", "results: must be a list of objects, got str"),
        ([5], "results: entry 0: must be an object, got 5"),
        ([results[0], {"image_id": 0}], r"results: entry 1: \['category_id', 'keypoints', 'score'\] missing"),
    ):
        with pytest.raises(InputError, match=message):
            coco_metrics(annotations, broken)


def test_a_skeleton_without_sigmas_has_no_ap(tmp_path):
    truth, results = synthetic(np.random.default_rng(0), tmp_path, COCO17)
    data = json.loads(truth.read_text())
    data["categories"][0]["sigmas"] = None
    data["categories"][0]["keypoints"] = [f"joint_{i}" for i in range(17)]
    data["categories"][0]["flip_pairs"] = None
    truth.write_text(json.dumps(data))
    with pytest.raises(InputError, match="skeleton 'person-17' has no sigmas; add them to the category to measure AP"):
        coco_metrics(load_annotations(truth), results)


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("a/image_info_test-dev2017.json", "dpn4_64", "person_keypoints_test-dev2017_dpn4-64_results.json"),
        ("person_keypoints_val2017.json", "ours", "person_keypoints_val2017_ours_results.json"),
    ],
)
def test_the_name_that_the_server_wants(path, name, expected):
    assert result_file_name(Annotations(path, COCO17, 1, {}, (), {}), name) == expected


def test_save_results(tmp_path):
    results = [{"image_id": 1, "category_id": 1, "keypoints": [0.5] * 51, "score": 0.25}]
    save_results(results, tmp_path / "folder" / "results.json")
    assert json.loads((tmp_path / "folder" / "results.json").read_text()) == results
    for broken in ([{"score": float("nan")}], [{"score": np.float32(1)}]):
        with pytest.raises(InputError, match=r"results .*results\.json: must be plain finite values"):
            save_results(broken, tmp_path / "folder" / "results.json")
    assert json.loads((tmp_path / "folder" / "results.json").read_text()) == results


# Real files -----------------------------------------------------------------------------------------------------------


def noisy(annotations, rng):
    results = []
    for p in annotations.persons:
        points = np.array(p.joints) + rng.normal(size=(17, 2)) * np.sqrt(p.area) * rng.choice([0.02, 0.05, 0.1])
        triples = np.c_[points, rng.random(17)]
        results.append({"image_id": p.image_id, "category_id": 1, "keypoints": triples.reshape(-1).tolist(),
                        "score": float(rng.random())})  # fmt: skip
    return results


def test_real_annotations(data_root, tmp_path, rng):
    truth = data_root / "coco_mini" / "annotations" / "person_keypoints_val2017.json"
    annotations = load_annotations(truth)
    results = noisy(annotations, rng)
    found = coco_metrics(annotations, results)
    assert list(found.values()) == by_hand(truth, results, tmp_path) and 0.2 < found["AP"] < 0.9
    assert coco_metrics(annotations, [])["AP"] == 0.0


def test_real_detections_by_the_official_evaluation(data_root, tmp_path, rng):
    """Detector boxes, scored and thinned: the same AP as pycocotools on the official loop's results."""
    (truth,) = (data_root / "coco_sample").rglob("test_coco.json")
    (boxes,) = (data_root / "coco_sample").rglob("test_coco_det_AP_H_56.json")
    annotations = load_annotations(truth)
    persons, _ = load_detections(boxes, annotations)
    corners = np.array([p.box for p in persons])
    nearest = [
        min((q for q in annotations.persons if q.image_id == p.image_id), key=lambda q: abs(q.box[0] - p.box[0]))
        for p in persons
    ]
    points = np.array([q.joints for q in nearest]) + rng.normal(size=(len(persons), 17, 2)) * 2
    scores, areas = rng.random((len(persons), 17)), corners[:, 2] * corners[:, 3] * 1.25**2
    box_scores, ids = np.array([p.score for p in persons]), [p.image_id for p in persons]
    results = results_from_predictions(ids, points, scores, box_scores, areas, 1, annotations.skeleton.sigmas)
    expected = []
    for image in dict.fromkeys(ids):
        people = [
            {"image_id": image, "category_id": 1, "keypoints": np.c_[points[i], scores[i]], "area": areas[i],
             "score": official_person_score(box_scores[i], np.c_[points[i], scores[i]])}
            for i in range(len(ids)) if ids[i] == image
        ]  # fmt: skip
        expected += [people[i] for i in official_oks_nms(people, 0.9)]
    for entry in expected:
        entry["keypoints"] = entry["keypoints"].flatten().tolist()
        del entry["area"]
    assert len(results) < len(persons)
    assert list(coco_metrics(annotations, results).values()) == by_hand(truth, expected, tmp_path)
