"""COCO keypoint scoring: OKS, OKS-NMS, rescoring, result files, AP and AR by pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hrpose.data.coco import Annotations
from hrpose.errors import InputError, check
from hrpose.files import write_atomically
from hrpose.skeleton import COCO17

METRICS = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")  # in pycocotools' order


def oks_matrix(keypoints: Any, areas: Any, sigmas: Sequence[float] | None = None) -> np.ndarray:
    """Object keypoint similarity of P predictions with one another.

        OKS_ab = mean_j exp(-d_j^2 / (2 (2 sigma_j)^2 (area_a + area_b)/2))

    Args:
        keypoints: (P, K, 2 or 3) x, y (and a score, not used) in image pixels.
        areas:     (P,) square pixels.
        sigmas:    K per-joint constants; None for COCO's 17.
    Returns: (P, P) float64. Every joint counts, as in the published evaluations (their visibility filter was never active).
    Raises: InputError on a wrong shape or a number that is not finite.
    """
    keypoints, areas = np.asarray(keypoints, np.float64), np.asarray(areas, np.float64)
    sigmas = np.asarray(COCO17.sigmas if sigmas is None else sigmas, np.float64)
    where = "oks"
    valid = keypoints.ndim == 3 and keypoints.shape[2] in (2, 3)
    check(valid, where, f"keypoints must be (P, K, 2 or 3), got {keypoints.shape}")
    check(len(sigmas) == keypoints.shape[1], where, f"sigmas must be {keypoints.shape[1]} numbers, got {len(sigmas)}")
    check(areas.shape == keypoints.shape[:1], where, f"areas must be ({len(keypoints)},), got {areas.shape}")
    check(
        bool(np.isfinite(keypoints[..., :2]).all() and np.isfinite(areas).all()),
        where,
        "keypoints and areas must be finite",
    )
    x, y = keypoints[..., 0], keypoints[..., 1]
    squared = (x[:, None] - x[None]) ** 2 + (y[:, None] - y[None]) ** 2
    area = (areas[:, None] + areas[None])[..., None] / 2 + np.spacing(1)
    return np.exp(-(squared / (2 * sigmas) ** 2 / area / 2)).mean(-1)


def oks_nms(
    keypoints: Any, scores: Any, areas: Any, threshold: float, sigmas: Sequence[float] | None = None
) -> list[int]:
    """Greedy non-maximum suppression: keep the best person, drop those with OKS > `threshold` to it, go on with the rest.

    Args: as ``oks_matrix``; scores (P,) of the persons. The published evaluations use threshold 0.9.
    Returns: the kept indices, best first. Equal scores are taken in the order of numpy's argsort()[::-1], which published
        results depend on.
    Raises: InputError on a wrong shape or a number that is not finite.
    """
    scores = np.asarray(scores, np.float64)
    keypoints = np.asarray(keypoints)
    if keypoints.size == 0 and scores.size == 0:
        return []
    similarity = oks_matrix(keypoints, areas, sigmas)
    check(scores.shape == (len(similarity),), "oks_nms", f"scores must be ({len(similarity)},), got {scores.shape}")
    check(bool(np.isfinite(scores).all()), "oks_nms", "scores must be finite")
    order, kept = scores.argsort()[::-1], []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        order = rest[similarity[best, rest] <= threshold]
    return kept


def person_scores(box_scores: Any, keypoint_scores: Any, threshold: float = 0.2) -> np.ndarray:
    """Score of a person: its box's score times the mean of its keypoint scores above `threshold` (0 if there is none).

    Args: box_scores (P,), keypoint_scores (P, K). Returns: (P,) float64.
    """
    scores = np.asarray(keypoint_scores, np.float64)
    counted = scores > threshold
    mean = np.where(counted, scores, 0).sum(1) / np.maximum(counted.sum(1), 1)
    return np.asarray(box_scores, np.float64) * mean


def results_from_predictions(
    image_ids: Sequence[int],
    keypoints: np.ndarray,
    scores: np.ndarray,
    box_scores: np.ndarray,
    areas: np.ndarray,
    category_id: int = 1,
    sigmas: Sequence[float] | None = None,
    nms_threshold: float | None = 0.9,
) -> list[dict[str, Any]]:
    """COCO result entries of P predicted persons: rescored, and thinned by OKS-NMS within each image.

    Args:
        keypoints: (P, K, 2) x, y in image pixels; scores: (P, K); box_scores: (P,).
        areas:     (P,) of the cropped regions in square pixels, which OKS-NMS measures with.
        sigmas:    None, with a skeleton that has none, skips OKS-NMS; so does nms_threshold None.
    """
    persons = person_scores(box_scores, scores)
    entries = []
    ids = np.asarray(image_ids)
    for image_id in dict.fromkeys(image_ids):
        of_image = np.flatnonzero(ids == image_id)
        if sigmas is not None and nms_threshold is not None:
            kept = oks_nms(keypoints[of_image], persons[of_image], areas[of_image], nms_threshold, sigmas)
            of_image = of_image[kept]
        for i in of_image:
            triples = np.concatenate([keypoints[i], scores[i, :, None]], 1).astype(np.float64)
            entry = {"image_id": int(image_id), "category_id": category_id}
            entries.append({**entry, "keypoints": triples.reshape(-1).tolist(), "score": float(persons[i])})
    return entries


def save_results(results: list[dict[str, Any]], path: str | Path) -> None:
    """Write results as the JSON file that COCO's evaluation server and pycocotools read; whole or not at all."""
    write_atomically(path, json.dumps(results).encode())


def coco_metrics(annotations: Annotations, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """AP and AR of keypoint results by pycocotools, with the sigmas of the annotations' skeleton.

    Returns: a value for each of METRICS in 0..1; None where the data holds no such person (pycocotools says -1); 0.0 for
        empty results.
    Raises: InputError if the skeleton has no sigmas or a result is malformed (pycocotools would score NaN as perfect).
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sigmas = annotations.skeleton.sigmas
    name = annotations.skeleton.name
    check(
        sigmas is not None, "coco_metrics", f"skeleton {name!r} has no sigmas; add them to the category to measure AP"
    )
    check_results(annotations, results)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = copy.deepcopy(annotations.json)  # the evaluation adds fields of its own
        truth.createIndex()
        if results:
            found = truth.loadRes(copy.deepcopy(results))
        else:  # loadRes([]) fails with an IndexError
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: None if value < 0 else float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}


def check_results(annotations: Annotations, results: list[dict[str, Any]]) -> None:
    """Raise an InputError naming the first result entry that pycocotools would misread, and its field."""
    length = 3 * annotations.skeleton.num_joints
    for position, entry in enumerate(results):
        here = f"results: entry {position}"
        missing = [key for key in ("image_id", "category_id", "keypoints", "score") if key not in entry]
        check(not missing, here, f"{missing} missing")
        check(
            entry["image_id"] in annotations.images,
            here,
            f"image_id {entry['image_id']!r} is not in {annotations.path}",
        )
        check(entry["category_id"] == annotations.category_id, here, f"category_id must be {annotations.category_id}")
        check(
            len(entry["keypoints"]) == length,
            here,
            f"keypoints must be {length} numbers, got {len(entry['keypoints'])}",
        )
        finite = np.isfinite(entry["keypoints"]).all() and np.isfinite(entry["score"])
        if not finite:
            raise InputError(f"{here}: keypoints and score must be finite numbers")
