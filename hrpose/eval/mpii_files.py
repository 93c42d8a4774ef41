"""Predictions for MPII as files: the flat arrays that evaluations exchange, and what its test server takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hrpose.data.coco import Annotations
from hrpose.data.fields import kind, read_json
from hrpose.data.mpii import MpiiAnnotations
from hrpose.errors import check, shown
from hrpose.files import write_atomically
from hrpose.matlab import check_scipy, read_mat, write_mat

ENDINGS = (".mat", ".json")


def save_predictions(path: str | Path, annotations: Annotations, keypoints: Any, scores: Any) -> None:
    """Write predicted joints of all persons of a file, in its order and in MPII's 1-based pixels; whole or not at all.

    FILE.json: a list of {image, joints, scores}, 16 joints x, y each. FILE.mat: `preds` (N, 16, 2), as HRNet's code
    writes it; for the test split of the original MATLAB file also `pred`, the structure that the test server takes: the
    annolist of the test images with annopoints.point(k).x, y, id (from 0) in the rectangles of single persons.

    Args: keypoints (N, 16, 2) x, y in 0-based image pixels; scores (N, 16).
    Raises: InputError on another ending, shapes that do not agree, a number that is not finite; naming the path, if it
        cannot be written.
    """
    path, n = check_predictions_path(path), len(annotations.persons)
    points, scores = np.asarray(keypoints, np.float64) + 1, np.asarray(scores, np.float64)
    where = f"predictions {path}"
    check(points.shape == (n, 16, 2), where, f"keypoints must be {(n, 16, 2)}, got {points.shape}")
    check(scores.shape == (n, 16), where, f"scores must be {(n, 16)}, got {scores.shape}")
    check(bool(np.isfinite(points).all() and np.isfinite(scores).all()), where, "keypoints and scores must be finite")
    if path.suffix.lower() == ".json":
        entries = [
            {"image": person.file_name, "joints": joints.tolist(), "scores": values.tolist()}
            for person, joints, values in zip(annotations.persons, points, scores, strict=True)
        ]
        write_atomically(path, json.dumps(entries).encode())
        return
    variables: dict[str, Any] = {"preds": points}
    unlabelled = not any(person.joints for person in annotations.persons)
    if isinstance(annotations, MpiiAnnotations) and annotations.rectangles and unlabelled:
        variables["pred"] = _for_server(annotations, points)
    write_mat(path, variables)


def load_predictions(path: str | Path) -> np.ndarray:
    """Read a file of ``save_predictions``, or of another's code with the same `preds`, as (N, 16, 2) 0-based pixels.

    Raises: InputError naming the file and, in JSON, the entry.
    """
    path = check_predictions_path(path)
    where = f"predictions {path}"
    if path.suffix.lower() == ".mat":
        variables = read_mat(path, where)
        check("preds" in variables, where, f"must hold preds, holds {', '.join(variables) or 'nothing'}")
        found = variables["preds"]
    else:
        data = read_json(path, where)
        check(isinstance(data, list), where, f"must be a list of {{image, joints, scores}}, got {kind(data)}")
        for position, entry in enumerate(data):
            here = f"{where}: entry {position}"
            check(isinstance(entry, dict) and "joints" in entry, here, "must be an object with joints")
            valid = np.shape(np.array(entry["joints"], object)) == (16, 2)
            check(valid, here, f"joints must be 16 pairs x, y, got {shown(entry['joints'])}")
        found = np.array([entry["joints"] for entry in data]).reshape(-1, 16, 2)
    valid = found.dtype.kind in "iuf" and found.shape == (len(found), 16, 2)
    check(valid, where, f"preds must be numbers (N, 16, 2), got {found.dtype} {found.shape}")
    return found.astype(np.float64) - 1


def check_predictions_path(path: str | Path) -> Path:
    """The path, if it ends in one of ENDINGS and scipy is there if it takes that. Raises: InputError."""
    where = f"predictions {path}"
    check(Path(path).suffix.lower() in ENDINGS, where, f"must be a file ending in {' or '.join(ENDINGS)}")
    if Path(path).suffix.lower() == ".mat":
        check_scipy(where)
    return Path(path)


def _for_server(annotations: MpiiAnnotations, points: np.ndarray) -> np.ndarray:
    """The struct array `pred` of the images: image.name, annorect.{objpos, scale, annopoints.point.{x, y, id}}."""
    poses: dict[tuple[int, int], np.ndarray] = {}
    for person, ridx, joints in zip(annotations.persons, annotations.rectangles, points, strict=True):
        poses[person.image_id, ridx] = joints
    images = []
    for number, image in annotations.images.items():
        rectangles = []
        for ridx, (center, scale) in enumerate(image["rectangles"]):
            joints = poses.get((number, ridx))
            point = None if joints is None else [{"x": x, "y": y, "id": k} for k, (x, y) in enumerate(joints.tolist())]
            rectangles.append(
                {
                    "objpos": _EMPTY if center is None else _structs([{"x": center[0], "y": center[1]}]),
                    "scale": _EMPTY if scale is None else scale,
                    "annopoints": _EMPTY if point is None else _structs([{"point": _structs(point)}]),
                }
            )
        name = _structs([{"name": image["file_name"]}])
        images.append({"image": name, "annorect": _structs(rectangles) if rectangles else _EMPTY})
    return _structs(images)


_EMPTY = np.zeros((0, 0))  # MATLAB's []


def _structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """A 1 x n MATLAB struct array of dicts with the same keys."""
    array = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        for name, value in row.items():
            array[0, i][name] = value
    return array
