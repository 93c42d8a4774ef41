"""COCO keypoint scoring: OKS, OKS-NMS, rescoring, result files, AP and AR by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hrpose.data.coco import Annotations
from hrpose.errors import InputError, check, shown
from hrpose.files import write_atomically
from hrpose.skeleton import COCO17

_RESULT_FIELDS = ("image_id", "category_id", "keypoints", "score")
METRICS = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")  # in pycocotools' order


def oks_matrix(keypoints: Any, areas: Any, sigmas: Sequence[float] | None = None) -> np.ndarray:
    """Object keypoint similarity of P predictions with one another.

        OKS_ab = mean_j exp(-d_j^2 / (2 (2 sigma_j)^2 (area_a + area_b)/2))

    Args:
        keypoints: (P, K, 2 or 3) x, y (and a score, not used) in image pixels.
        areas:     (P,) square pixels.
        sigmas:    K per-joint constants; None for COCO's 17.
    Returns: (P, P) float64. Every joint counts, as in the published evaluations, whose visibility filter was never
        active.
    Raises: InputError on a wrong shape, a number that is not finite, a negative area or a sigma that is not > 0.
    """
    keypoints, areas = np.asarray(keypoints, np.float64), np.asarray(areas, np.float64)
    sigmas = np.asarray(COCO17.sigmas if sigmas is None else sigmas, np.float64)
    where = "oks"
    valid = keypoints.ndim == 3 and keypoints.shape[1] > 0 and keypoints.shape[2] in (2, 3)
    check(valid, where, f"keypoints must be (P, K, 2 or 3), got {keypoints.shape}")
    k = keypoints.shape[1]
    check(sigmas.shape == (k,), where, f"sigmas must be {k} numbers, got {sigmas.shape}")
    check(bool((sigmas > 0).all()), where, f"sigmas must be > 0, got {sigmas}")
    check(areas.shape == keypoints.shape[:1], where, f"areas must be ({len(keypoints)},), got {areas.shape}")
    check(bool(np.isfinite(keypoints[..., :2]).all()), where, "keypoints must be finite")
    check(bool((np.isfinite(areas) & (areas >= 0)).all()), where, "areas must be finite and >= 0")
    x, y = keypoints[..., 0], keypoints[..., 1]
    squared = (x[:, None] - x[None]) ** 2 + (y[:, None] - y[None]) ** 2
    area = (areas[:, None] + areas[None])[..., None] / 2 + np.spacing(1)
    return np.exp(-(squared / (2 * sigmas) ** 2 / area / 2)).mean(-1)


def oks_nms(
    keypoints: Any, scores: Any, areas: Any, threshold: float, sigmas: Sequence[float] | None = None
) -> list[int]:
    """Greedy non-maximum suppression: keep the best person, drop those with OKS > `threshold` to it, and so on with the
    rest.

    Args: as ``oks_matrix``; scores (P,) of the persons. The published evaluations use threshold 0.9.
    Returns: the kept indices, best first. Equal scores are taken in the order of numpy's argsort()[::-1], on which
        published results depend.
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
    Raises: InputError on a wrong shape or a number that is not finite.
    """
    scores, of_boxes = np.asarray(keypoint_scores, np.float64), np.asarray(box_scores, np.float64)
    where = "person_scores"
    check(scores.ndim == 2, where, f"keypoint_scores must be (P, K), got {scores.shape}")
    check(of_boxes.shape == scores.shape[:1], where, f"box_scores must be ({len(scores)},), got {of_boxes.shape}")
    check(bool(np.isfinite(scores).all() and np.isfinite(of_boxes).all()), where, "scores must be finite")
    counted = scores > threshold
    mean = np.where(counted, scores, 0).sum(1) / np.maximum(counted.sum(1), 1)
    return of_boxes * mean


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
        image_ids: P integers.
        keypoints: (P, K, 2) x, y in image pixels; scores: (P, K); box_scores: (P,).
        areas:     (P,) of the cropped regions in square pixels, which OKS-NMS measures with.
        sigmas:    of OKS-NMS; None, for a skeleton that has none, skips it, and so does nms_threshold None.
    Raises: InputError on shapes that do not agree or a number that is not finite.
    """
    keypoints, scores = np.asarray(keypoints, np.float64), np.asarray(scores, np.float64)
    areas, ids = np.asarray(areas, np.float64), np.asarray(image_ids)
    p, k = scores.shape if scores.ndim == 2 else (0, 0)
    expected = {"scores": (p, k), "keypoints": (p, k, 2), "areas": (p,), "image_ids": (p,)}
    given = {"scores": scores, "keypoints": keypoints, "areas": areas, "image_ids": ids}
    for name, shape in expected.items():
        check(given[name].shape == shape, "results", f"{name} must be {shape}, got {given[name].shape}")
    check(bool(np.isfinite(keypoints).all()), "results", "keypoints must be finite")
    persons = person_scores(box_scores, scores)
    entries = []
    for image_id in dict.fromkeys(ids.tolist()):
        of_image = np.flatnonzero(ids == image_id)
        if sigmas is not None and nms_threshold is not None:
            kept = oks_nms(keypoints[of_image], persons[of_image], areas[of_image], nms_threshold, sigmas)
            of_image = of_image[kept]
        for i in of_image:
            triples = np.concatenate([keypoints[i], scores[i, :, None]], 1)
            entry = {"image_id": image_id, "category_id": category_id}
            entries.append({**entry, "keypoints": triples.reshape(-1).tolist(), "score": float(persons[i])})
    return entries


def result_file_name(annotations: Annotations, name: str) -> str:
    """What COCO's evaluation server wants a result file to be called: person_keypoints_test-dev2017_NAME_results.json.

    The set is that of image_info_SET.json or person_keypoints_SET.json. Underscores in `name` become hyphens, since
    they separate the parts.
    """
    part = Path(annotations.path).stem.removeprefix("image_info_").removeprefix("person_keypoints_")
    return f"person_keypoints_{part}_{name.replace('_', '-')}_results.json"


def save_results(results: list[dict[str, Any]], path: str | Path) -> None:
    """Write results as the JSON file that COCO's evaluation server and pycocotools read; whole or not at all.

    Raises: InputError naming the path, also for numbers that are not finite, which JSON does not have.
    """
    try:
        content = json.dumps(results, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"results {path}: must be plain finite values ({error})") from error
    write_atomically(path, content)


def coco_metrics(annotations: Annotations, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """AP and AR of keypoint results by pycocotools, with the sigmas of the annotations' skeleton.

    Returns: a value for each of METRICS in 0..1; None where the data holds no such person (pycocotools says -1); 0.0
        for empty results.
    Raises: InputError if the skeleton has no sigmas or a result is malformed (pycocotools would score NaN as perfect).
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    skeleton = annotations.skeleton
    hint = f"skeleton {skeleton.name!r} has no sigmas; add them to the category to measure AP"
    check(skeleton.sigmas is not None, "coco_metrics", hint)
    check_results(annotations, results)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        # The evaluation adds fields of its own to each entry, so it gets copies.
        truth.dataset = {
            "images": annotations.json["images"],
            "annotations": [dict(entry) for entry in annotations.json["annotations"]],
            "categories": [{"id": annotations.category_id, "name": skeleton.name}],
        }
        truth.createIndex()
        if results:
            # No other fields: a "bbox" or "segmentation" in the first entry would make loadRes take the area from it.
            found = truth.loadRes([{field: entry[field] for field in _RESULT_FIELDS} for entry in results])
        else:  # loadRes([]) fails with an IndexError
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(skeleton.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: None if value < 0 else float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}


def check_results(annotations: Annotations, results: list[dict[str, Any]]) -> None:
    """Raise an InputError naming the first result entry that pycocotools would misread, and its field."""
    check(isinstance(results, list), "results", f"must be a list of objects, got {type(results).__name__}")
    length = 3 * annotations.skeleton.num_joints
    for position, entry in enumerate(results):
        here = f"results: entry {position}"
        check(isinstance(entry, dict), here, f"must be an object, got {shown(entry)}")
        missing = [field for field in _RESULT_FIELDS if field not in entry]
        check(not missing, here, f"{missing} missing")
        image_id, category_id = entry["image_id"], entry["category_id"]
        known = _is_whole(image_id) and image_id in annotations.images
        check(known, here, f"image_id {shown(image_id)} is not in {annotations.path}")
        known = _is_whole(category_id) and category_id == annotations.category_id
        check(known, here, f"category_id must be {annotations.category_id}, got {shown(category_id)}")
        keypoints, score = _numbers(entry["keypoints"]), _numbers(entry["score"])
        valid = keypoints is not None and keypoints.shape == (length,)
        check(valid, here, f"keypoints must be {length} finite numbers, got {shown(entry['keypoints'])}")
        valid = score is not None and score.shape == ()
        check(valid, here, f"score must be a finite number, got {shown(entry['score'])}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _numbers(value: Any) -> np.ndarray | None:
    """`value` as an array, or None if it holds anything but finite numbers: texts, true or false, NaN."""
    try:
        found = np.asarray(value)
        valid = found.dtype.kind in "iuf" and bool(np.isfinite(found).all())
    except (TypeError, ValueError, OverflowError):
        return None
    return found if valid else None
