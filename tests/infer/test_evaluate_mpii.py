"""Evaluation on MPII: the crop and its inverse are the published code's, PCKh is that of the predictions written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hrpose.data import load_mpii
from hrpose.errors import InputError
from hrpose.eval.mpii import GroundTruth, pckh
from hrpose.eval.mpii_files import load_predictions, save_predictions
from hrpose.infer import Protocol, evaluate
from hrpose.infer.evaluate import estimate_persons


class Constant(nn.Module):
    """Joint j is found at pixel (j + 3, 2 j + 5) of a quarter-size heatmap, whatever the picture."""

    def forward(self, images):
        maps = torch.zeros(len(images), 16, images.shape[2] // 4, images.shape[3] // 4)
        for j in range(16):
            maps[:, j, 2 * j + 5, j + 3] = 1.0
        return maps


@pytest.fixture
def folder(tmp_path, rng):
    """Three persons in two images, and their ground truth in gt_valid.mat's arrays."""
    entries = []
    for name, center, scale in (("a.png", [60, 50], 0.4), ("a.png", [90, 41.5], 0.25), ("b.png", [30, 33], 0.61)):
        joints = (np.array(center) + rng.normal(0, 12, (16, 2))).tolist()
        visible = (rng.random(16) < 0.8).astype(int).tolist()
        entries.append({"image": name, "center": center, "scale": scale, "joints": joints, "joints_vis": visible})
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "mpii.json").write_text(json.dumps(entries))
    return tmp_path


def truth_of(folder):
    entries = json.loads((folder / "mpii.json").read_text())
    corners = np.array([[[10, 10], [20, 22]], [[5, 5], [17, 14]], [[0, 9], [30, 40]]], float)
    missing = 1 - np.array([entry["joints_vis"] for entry in entries]).T
    joints = np.array([entry["joints"] for entry in entries]).transpose(1, 2, 0)
    return GroundTruth(missing, joints, corners.transpose(1, 2, 0))


def official_points(points, center, scale, size):
    """transform_preds of the published code, restated for the region that MPIIDataset makes of an entry."""
    center = np.array([center[0], center[1] + 15 * scale]) - 1
    width = 200 * 1.25 * scale
    return center + width / size[0] * (np.array(points) - np.array(size) / 2)


@pytest.mark.parametrize("size", [(256, 256), (192, 256), (128, 160)])
def test_predictions_are_where_the_published_code_puts_them(folder, size):
    annotations = load_mpii(folder / "mpii.json")
    found = evaluate(
        Constant(),
        annotations,
        folder,
        size,
        protocol=Protocol(flip=False, refine="none"),
        ground_truth=truth_of(folder),
    )
    maps = size[0] // 4, size[1] // 4
    points = [(j + 3, 2 * j + 5) for j in range(16)]
    for entry, keypoints in zip(json.loads((folder / "mpii.json").read_text()), found.keypoints, strict=True):
        expected = official_points(points, entry["center"], entry["scale"], maps)
        np.testing.assert_allclose(keypoints, expected, atol=1e-3)
    assert found.metrics["PCKh@0.5"] == pckh(found.keypoints, truth_of(folder)).mean_weighted / 100
    assert found.metrics["AP"] is None and found.metrics["padding"] == 1.25


def test_the_score_of_the_file_written_is_the_score_reported(folder):
    annotations, truth = load_mpii(folder / "mpii.json"), truth_of(folder)
    found = evaluate(Constant(), annotations, folder, (128, 192), ground_truth=truth)
    for name in ("p.mat", "p.json"):
        if name == "p.mat":
            pytest.importorskip("scipy.io")
        save_predictions(folder / name, annotations, found.keypoints, found.scores)
        for threshold in (0.5, 0.1, 0.11):
            again = pckh(load_predictions(folder / name), truth, threshold)
            assert again.mean_weighted / 100 == found.metrics[f"PCKh@{threshold:g}"]
            assert again.mean_unweighted / 100 == found.metrics[f"PCKh@{threshold:g} unweighted"]


def test_the_truth_itself_scores_a_hundred(folder, monkeypatch):
    def truth(model, persons, *rest, **options):
        joints = np.array([p.joints for p in persons], np.float32)
        return joints, np.ones(joints.shape[:2], np.float32)

    monkeypatch.setattr(__import__("sys").modules[evaluate.__module__], estimate_persons.__name__, truth)
    metrics = evaluate(
        Constant(), load_mpii(folder / "mpii.json"), folder, (256, 256), ground_truth=truth_of(folder)
    ).metrics
    assert metrics["PCKh@0.5"] == metrics["PCKh@0.1"] == metrics["PCKh@0.5 unweighted"] == metrics["PCK@0.2"] == 1


def test_a_test_set_is_estimated_without_a_score(folder):
    entries = json.loads((folder / "mpii.json").read_text())
    (folder / "test.json").write_text(json.dumps([{k: e[k] for k in ("image", "center", "scale")} for e in entries]))
    whole = evaluate(Constant(), load_mpii(folder / "mpii.json"), folder, (256, 256))
    found = evaluate(Constant(), load_mpii(folder / "test.json"), folder, (256, 256))
    np.testing.assert_array_equal(found.keypoints, whole.keypoints)
    assert found.metrics["PCK@0.2"] is None and whole.metrics["PCK@0.2"] is not None
    assert "PCKh@0.5" not in found.metrics


def test_ground_truth_of_others_is_refused_before_any_work(folder):
    model = Constant()
    model.register_forward_hook(lambda *arguments: pytest.fail("the network was run"))
    annotations, truth = load_mpii(folder / "mpii.json"), truth_of(folder)
    swapped = GroundTruth(truth.jnt_missing, truth.pos_gt_src[:, :, [2, 1, 0]], truth.headboxes_src)
    with pytest.raises(
        InputError, match=r"ground truth: is of other persons than annotated, first number 0, in a\.png"
    ):
        evaluate(model, annotations, folder, (256, 256), ground_truth=swapped)
    with pytest.raises(InputError, match="ground_truth is of the annotated persons, not of detections"):
        evaluate(model, annotations, folder, (256, 256), annotations.persons, ground_truth=truth)
