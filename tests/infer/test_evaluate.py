"""The evaluation against predicting by hand and feeding pycocotools by hand."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from hrpose.data.coco import load_annotations, load_detections
from hrpose.errors import InputError
from hrpose.eval.coco import METRICS
from hrpose.infer import Predictor, Protocol, evaluate
from hrpose.models import create_model
from hrpose.skeleton import COCO17

SIZE = (48, 64)


def write_data(folder: Path, **category) -> Path:
    """Four noise images with 3, 1, 0 and 1 persons, whose joints lie near the middle of their boxes."""
    rng = np.random.default_rng(3)
    images, annotations = [], []
    for i, persons in enumerate((3, 1, 0, 1)):
        width, height = 120 + i, 90 - i
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        for _ in range(persons):
            box = [*rng.uniform(0, 40, 2).tolist(), *rng.uniform(40, 70, 2).tolist()]
            middle = 0.5 + 0.03 * rng.standard_normal((17, 2))
            middle[[5, 6]] -= 0.2  # shoulders and hips further out, such that the torso has a size
            middle[[11, 12]] += 0.2
            xy = np.array(box[:2]) + middle * box[2:]
            v = rng.integers(0, 3, 17)
            v[0] = 2
            keypoints = np.concatenate([xy * (v > 0)[:, None], v[:, None]], 1).round(2).reshape(-1).tolist()
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": box}
            labels = {"keypoints": keypoints, "num_keypoints": int((v > 0).sum()), "area": 0.8 * box[2] * box[3]}
            annotations.append(entry | labels)
    category = {"id": 1, "name": "person", "keypoints": list(COCO17.joints)} | category
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [category]}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def annotations(folder):
    return load_annotations(folder / "annotations.json")


class Guess(nn.Module):
    """Peaks that depend on the picture, near the middle of the heatmap: some right, some wrong."""

    def __init__(self, joints: int = 17) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, joints, 9, stride=4, padding=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.conv(images)
        y, x = (torch.linspace(-1, 1, side) for side in maps.shape[2:])
        return 0.2 * maps + 2 - 4 * (x**2 + y[:, None] ** 2)


def by_hand(annotations, results) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(json.loads(Path(annotations.path).read_text()))
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats.tolist(), strict=True))


def predict_by_hand(model, folder, annotations, boxes: list[tuple[int, tuple, float]], protocol) -> list[dict]:
    """Image by image through the Predictor; rescored and thinned as SPEC 6.6 has it, in loops."""
    predictor = Predictor(model, size=SIZE, skeleton=annotations.skeleton, protocol=protocol)
    results = []
    for image_id in dict.fromkeys(i for i, _, _ in boxes):
        mine = [(box, score) for i, box, score in boxes if i == image_id]
        poses = predictor(folder / annotations.images[image_id]["file_name"], [box for box, _ in mine])
        found = []
        for (box, score), points, values in zip(mine, poses.keypoints, poses.scores, strict=True):
            above = values[values > 0.2].astype(float)
            area = np.prod([max(box[2], box[3] * 0.75) * 1.25, max(box[3], box[2] / 0.75) * 1.25])
            found.append(
                (score * (above.mean() if len(above) else 0.0), points.astype(float), values.astype(float), area)
            )
        found.sort(key=lambda entry: -entry[0])
        kept = []
        for entry in found:
            if all(oks(entry, other) <= 0.9 for other in kept):
                kept.append(entry)
        for total, points, values, _ in kept:
            keypoints = np.concatenate([points, values[:, None]], 1).reshape(-1).tolist()
            results.append({"image_id": image_id, "category_id": 1, "keypoints": keypoints, "score": total})
    return results


def oks(a, b) -> float:
    pairs = (0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089)  # eyes ... ankles, after the nose
    sigmas = [0.026, *(sigma for sigma in pairs for side in ("left", "right"))]
    variances = (2 * np.array(sigmas)) ** 2
    squared = ((a[1] - b[1]) ** 2).sum(1)
    return float(np.mean(np.exp(-squared / variances / ((a[3] + b[3]) / 2) / 2)))


def by_score(results):
    return sorted(results, key=lambda entry: (entry["image_id"], -entry["score"]))


def assert_same_results(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(by_score(found), by_score(expected), strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)
        np.testing.assert_allclose(a["keypoints"], b["keypoints"], atol=2e-3)


@pytest.mark.parametrize("protocol", [Protocol(), Protocol(flip=False, refine="none", crop="opencv4")])
def test_annotated_boxes(folder, annotations, protocol):
    model = Guess()
    done = []
    found = evaluate(model, annotations, folder, SIZE, protocol=protocol, batch_size=2, progress=done.append)
    boxes = [(p.image_id, p.box, 1.0) for p in annotations.persons]
    expected = predict_by_hand(model, folder, annotations, boxes, protocol)
    assert_same_results(found.results, expected)
    for name, value in by_hand(annotations, expected).items():
        assert found.metrics[name] == (None if value < 0 else pytest.approx(value, abs=1e-9)), name
    assert found.metrics["AR"] > 0.01  # a comparison of zeros would show nothing
    assert done == [2, 2, 1] and found.metrics["persons"] == 5
    assert found.metrics["boxes"] == "ground-truth" and found.metrics["input"] == [48, 64]
    assert found.metrics | protocol.label(COCO17) == found.metrics
    assert 0 < found.metrics["PCK@0.2"] < 1 and found.metrics["PCK reference"] == "torso"


def test_detected_boxes(folder, annotations, tmp_path):
    entries = [
        {"image_id": 0, "category_id": 1, "bbox": [10, 10, 50, 60], "score": 0.9},
        {"image_id": 0, "category_id": 1, "bbox": [10.5, 10, 50, 60], "score": 0.8},  # the same person again
        {"image_id": 2, "category_id": 1, "bbox": [0, 0, 120, 30], "score": 0.3},  # an image without persons
        {"image_id": 1, "category_id": 1, "bbox": [20, 0, 40, 80], "score": 0.05},
        {"image_id": 77, "category_id": 1, "bbox": [20, 0, 40, 80], "score": 1.0},  # an image the file does not list
        {"image_id": 1, "category_id": 2, "bbox": [20, 0, 40, 80], "score": 1.0},
    ]
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(entries))
    detections, elsewhere = load_detections(path, annotations, min_score=0.1)
    assert len(detections) == 3 and elsewhere == 1
    model = Guess()
    found = evaluate(model, annotations, folder, SIZE, detections, "detections.json")
    boxes = [(p.image_id, p.box, p.score) for p in detections]
    expected = predict_by_hand(model, folder, annotations, boxes, Protocol())
    assert_same_results(found.results, expected)
    assert len(found.results) == 2  # OKS-NMS dropped the double
    for name, value in by_hand(annotations, expected).items():
        assert found.metrics[name] == (None if value < 0 else pytest.approx(value, abs=1e-9)), name
    assert found.metrics["PCK@0.2"] is None and found.metrics["boxes"] == "detections.json"
    nothing = evaluate(model, annotations, folder, SIZE, [])
    assert nothing.results == [] and nothing.metrics["AP"] == 0.0 and nothing.metrics["persons"] == 0


def test_workers_change_nothing_and_the_global_generator_is_left_alone(folder, annotations):
    model = Guess()
    before = torch.get_rng_state()
    alone = evaluate(model, annotations, folder, SIZE)
    helped = evaluate(model, annotations, folder, SIZE, workers=2, batch_size=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_results(helped.results, alone.results)
    assert helped.metrics == alone.metrics and helped.metrics["AR"] > 0


def test_perfect_predictions_score_one(folder, annotations, monkeypatch):
    """Keypoints handed through: AP, AR and PCK of the truth itself are 1."""

    def truth(model, persons, *rest, **options):
        joints = np.array([p.joints for p in persons], np.float32)
        return joints, np.ones(joints.shape[:2], np.float32)

    monkeypatch.setattr(__import__("sys").modules[evaluate.__module__], "estimate_persons", truth)
    metrics = evaluate(Guess(), annotations, folder, SIZE).metrics
    assert metrics["AP"] == pytest.approx(1.0) and metrics["AR"] == 1.0 and metrics["PCK@0.2"] == 1.0


def test_missing_image_fails_before_any_work(folder, annotations, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model = Guess()
    model.register_forward_hook(lambda *arguments: pytest.fail("the network was run"))
    with pytest.raises(InputError, match=r"images .*: 3.png is missing$"):
        evaluate(model, annotations, tmp_path, SIZE)
    with pytest.raises(InputError, match="is not a folder"):
        evaluate(model, annotations, tmp_path / "nowhere", SIZE)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_one_sentence(folder, annotations, tmp_path, workers):
    for name in ("0.png", "1.png", "3.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[: 2000 if name == "1.png" else None])
    with pytest.raises(InputError) as caught:
        evaluate(Guess(), annotations, tmp_path, SIZE, workers=workers)
    assert str(caught.value).startswith(f"image {tmp_path / '1.png'}: is damaged") and "\n" not in str(caught.value)


def test_nan_weights_are_refused(folder, annotations):
    model = create_model("dpn1_32")
    nn.init.constant_(model.heatmap.bias, torch.nan)
    message = r"model: gives heatmaps that are not finite, first for 0.png \(annotation 1\); its weights are broken"
    with pytest.raises(InputError, match=message):
        evaluate(model.eval(), annotations, folder, SIZE)


def test_model_of_another_skeleton(folder, annotations):
    with pytest.raises(InputError, match="model: must have 17 heatmaps for COCO-17, has 5"):
        evaluate(create_model("dpn1_32", 5).eval(), annotations, folder, SIZE)
    with pytest.raises(InputError, match="model: must have 17 heatmaps for COCO-17, has 5"):
        evaluate(Guess(5), annotations, folder, SIZE)


def test_skeleton_without_sigmas_and_pairs(tmp_path):
    write_data(tmp_path, keypoints=[f"point {i}" for i in range(17)])
    annotations = load_annotations(tmp_path / "annotations.json")
    found = evaluate(Guess(), annotations, tmp_path, SIZE)
    assert found.metrics["AP"] is None and found.metrics["AR"] is None and found.metrics["flip"] is False
    assert found.metrics["PCK@0.2"] > 0 and found.metrics["PCK reference"] == "box"
    assert len(found.results) == 5  # no OKS, so no suppression either
