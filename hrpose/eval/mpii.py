"""PCKh, the score of MPII: the share of joints found within a fraction of the person's head."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrpose.data.coco import Person
from hrpose.data.mpii import MpiiAnnotations
from hrpose.errors import InputError, check, shown
from hrpose.matlab import read_mat
from hrpose.skeleton import MPII16

# In the order of the papers' tables; a pair is reported as the mean of right and left.
GROUPS = {
    "head": (9,),
    "shoulder": (12, 13),
    "elbow": (11, 14),
    "wrist": (10, 15),
    "hip": (2, 3),
    "knee": (1, 4),
    "ankle": (0, 5),
}
IN_MEAN = tuple(joint for joint in range(16) if joint not in (6, 7))  # pelvis and thorax: the person's given centre

# HRNet's code reads its "Mean@0.1" from row 11 of the thresholds 0, 0.01, ..., 0.5, which is 0.11.
LEGACY_01 = 0.11
THRESHOLDS = (0.5, 0.1, LEGACY_01)
_HEAD_SIZE = 0.6  # of the head box's diagonal
_FIELDS = ("jnt_missing", "pos_gt_src", "headboxes_src")


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """N persons in the arrays and the 1-based pixels of MPII's gt_valid.mat; validated when made.

    jnt_missing:   (16, N) 1 where nobody labelled the joint, else 0.
    pos_gt_src:    (16, 2, N) x, y; anything where the joint is missing.
    headboxes_src: (2, 2, N) two opposite corners (corner, x or y, person) of the head.
    name:          of the file, for errors.
    Raises: InputError naming the array and the person (counted from 0).
    """

    jnt_missing: np.ndarray
    pos_gt_src: np.ndarray
    headboxes_src: np.ndarray
    name: str = "ground truth"

    def __post_init__(self) -> None:
        for field in _FIELDS:
            object.__setattr__(self, field, _numbers(getattr(self, field), self.name, field))
        missing, joints, corners = self.jnt_missing, self.pos_gt_src, self.headboxes_src
        valid = missing.ndim == 2 and len(missing) == 16
        check(valid, self.name, f"jnt_missing must be (16, N), got {missing.shape}")
        n = missing.shape[1]
        check(joints.shape == (16, 2, n), self.name, f"pos_gt_src must be {(16, 2, n)}, got {joints.shape}")
        check(corners.shape == (2, 2, n), self.name, f"headboxes_src must be {(2, 2, n)}, got {corners.shape}")
        check(bool(np.isin(missing, (0, 1)).all()), self.name, "jnt_missing must hold 0 and 1 alone")
        counted = missing == 0
        sizes = self.head_sizes
        lost = np.flatnonzero((counted & ~np.isfinite(joints).all(1)).any(0))
        flat = np.flatnonzero(counted.any(0) & ~(np.isfinite(sizes) & (sizes > 0)))
        if len(lost):
            raise InputError(f"{self.name}: pos_gt_src must be finite where jnt_missing is 0, person {lost[0]} is not")
        if len(flat):
            rule = "headboxes_src must hold two different, finite corners"
            raise InputError(f"{self.name}: {rule}, person {flat[0]} has {corners[:, :, flat[0]].tolist()}")

    def __len__(self) -> int:
        return self.jnt_missing.shape[1]

    @property
    def head_sizes(self) -> np.ndarray:
        """(N,) 0.6 times the diagonals of the head boxes, in pixels."""
        sizes = np.linalg.norm(self.headboxes_src[1] - self.headboxes_src[0], axis=0)
        return sizes * _HEAD_SIZE


@dataclass(frozen=True)
class Pckh:
    """How many joints were found, in percent, as MPII's results are quoted; None where no joint was counted.

    joints:          by name: head, shoulder, elbow, wrist, hip, knee, ankle, as the papers' tables have them (a pair is
                     the mean of its sides), and the 16 joints of the skeleton.
    mean_weighted:   over all labelled joints but pelvis and thorax: HRNet's "Mean", and that of most papers.
    mean_unweighted: the mean of those 14 joints' figures, each counting the same.
    counts:          by name of the 16 joints: how many persons have it labelled.
    threshold:       of the distance, in head sizes.
    persons:         how many.
    """

    joints: dict[str, float | None]
    mean_weighted: float | None
    mean_unweighted: float | None
    counts: dict[str, int]
    threshold: float
    persons: int


def pckh(predictions: Any, ground_truth: Any, threshold: float = 0.5) -> Pckh:
    """PCKh by MPII's protocol: a joint is found if |predicted - labelled| / (0.6 * head box's diagonal) <= threshold.

    All arithmetic is float64 and in the order of the published evaluation, so ties fall as they do there.

    Args:
        predictions:  (N, 16, 2) x, y in 0-based image pixels (the ground truth's are 1-based).
        ground_truth: the path of gt_valid.mat, a GroundTruth, a mapping with its three arrays, or these in its order.
        threshold:    0.5 and 0.1 are published; LEGACY_01 gives what HRNet's code prints as "Mean@0.1".
    Raises: InputError on shapes that do not agree, predictions that are not finite, or a malformed ground truth.
    """
    truth = as_ground_truth(ground_truth)
    found = _numbers(predictions, "pckh", "predictions")
    n = len(truth)
    check(found.shape == (n, 16, 2), "pckh", f"predictions must be {(n, 16, 2)}, as {truth.name}, got {found.shape}")
    lost = np.argwhere(~np.isfinite(found).all(2))
    if len(lost):
        person, joint = lost[0].tolist()
        value = found[person, joint].tolist()
        raise InputError(f"pckh: predictions must be finite, person {person}, {MPII16.joints[joint]} is {value}")
    valid = isinstance(threshold, numbers.Real) and 0 <= threshold < np.inf
    check(valid, "pckh", f"threshold must be >= 0, got {threshold!r}")

    counted = truth.jnt_missing == 0
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # missing joints and heads hold anything
        distances = np.linalg.norm(found.transpose(1, 2, 0) + 1 - truth.pos_gt_src, axis=1) / truth.head_sizes
        correct = (distances <= threshold) & counted
    right, total = correct.sum(1), counted.sum(1)
    shares = [100.0 * float(r) / int(t) if t else None for r, t in zip(right, total, strict=True)]
    mean = list(IN_MEAN)
    weighted = 100.0 * float(right[mean].sum()) / int(total[mean].sum()) if total[mean].any() else None
    joints = {name: _mean([shares[i] for i in group]) for name, group in GROUPS.items()}
    return Pckh(
        joints | dict(zip(MPII16.joints, shares, strict=True)),
        weighted,
        _mean([shares[i] for i in mean]),
        dict(zip(MPII16.joints, total.tolist(), strict=True)),
        float(threshold),
        n,
    )


def pckh_metrics(predictions: Any, ground_truth: Any) -> dict[str, Any]:
    """PCKh at all THRESHOLDS as shares in 0..1, as metrics are: for each "PCKh@0.5", the count-weighted mean, "PCKh@0.5
    unweighted", and "PCKh@0.5 joints" with the columns of the papers' tables."""
    truth, metrics = as_ground_truth(ground_truth), {}
    for threshold in THRESHOLDS:
        found, name = pckh(predictions, truth, threshold), f"PCKh@{threshold:g}"
        metrics[name] = _share(found.mean_weighted)
        metrics[f"{name} unweighted"] = _share(found.mean_unweighted)
        metrics[f"{name} joints"] = {group: _share(found.joints[group]) for group in GROUPS}
    return metrics


def ground_truth_of(annotations: MpiiAnnotations) -> GroundTruth | None:
    """The ground truth that the original MATLAB file holds of its training persons; None without head boxes.

    A person without a head box is not counted.
    """
    if not annotations.head_boxes:
        return None
    persons, heads = annotations.persons, annotations.head_boxes
    missing = [[not v for v in p.visible] if head else [True] * 16 for p, head in zip(persons, heads, strict=True)]
    joints = np.array([p.joints for p in persons]) + 1
    corners = np.array([head or ((0, 0), (0, 0)) for head in heads])
    return GroundTruth(np.array(missing).T, joints.transpose(1, 2, 0), corners.transpose(1, 2, 0), annotations.path)


def check_same_persons(truth: GroundTruth, persons: Sequence[Person]) -> None:
    """Raise an InputError unless `truth` is that of `persons`, in their order: as many, and the median of each one's
    joints less than a head apart. Another file's, or another order, would give a low score and no sign of why."""
    name = truth.name
    check(len(truth) == len(persons), name, f"must be of the {len(persons)} persons annotated, is of {len(truth)}")
    for i, person in enumerate(persons):
        counted = truth.jnt_missing[:, i] == 0
        if person.joints and len(person.joints) == 16:
            counted &= np.array(person.visible) > 0
            apart = np.linalg.norm(np.array(person.joints) + 1 - truth.pos_gt_src[:, :, i], axis=1)[counted]
            same = not counted.any() or np.median(apart) <= truth.head_sizes[i]
            check(bool(same), name, f"is of other persons than annotated, first number {i}, in {person.file_name}")


def load_ground_truth(path: str | Path) -> GroundTruth:
    """Read gt_valid.mat, or a file with the same three arrays (which takes scipy, see ``matlab.read_mat``).

    Raises: InputError naming the file, the array, and the person.
    """
    where = f"ground truth {path}"
    return _from_mapping(read_mat(path, where), where)


def as_ground_truth(value: Any) -> GroundTruth:
    """A GroundTruth from what ``pckh`` takes."""
    if isinstance(value, GroundTruth):
        return value
    if isinstance(value, (str, Path)):
        return load_ground_truth(value)
    if isinstance(value, Mapping):
        return _from_mapping(value, "ground truth")
    valid = isinstance(value, Sequence) and len(value) == len(_FIELDS)
    check(valid, "ground truth", f"must be a path, or the arrays {', '.join(_FIELDS)}, got {shown(value)}")
    return GroundTruth(*value)


def _from_mapping(arrays: Mapping[str, Any], where: str) -> GroundTruth:
    missing = [field for field in _FIELDS if field not in arrays]
    check(not missing, where, f"must hold {', '.join(_FIELDS)}; {', '.join(missing)} missing")
    if "dataset_joints" in arrays:  # the order of the joints, as MPII's own files state it
        names = [str(np.squeeze(name)) for name in np.ravel(arrays["dataset_joints"])]
        check(
            names == list(_SHORT_NAMES), where, f"dataset_joints must be {' '.join(_SHORT_NAMES)}, got {shown(names)}"
        )
    return GroundTruth(*(arrays[field] for field in _FIELDS), name=where)


_SHORT_NAMES = (
    "rank", "rkne", "rhip", "lhip", "lkne", "lank", "pelv", "thor", "neck", "head", "rwri", "relb", "rsho", "lsho",
    "lelb", "lwri",
)  # fmt: skip


def _numbers(value: Any, where: str, name: str) -> np.ndarray:
    try:
        found = np.asarray(value)
        valid = found.dtype.kind in "biuf"
    except (TypeError, ValueError, RuntimeError):  # ragged lists; tensors that want a gradient
        found, valid = None, False
    check(valid, where, f"{name} must be an array of numbers, got {shown(value)}")
    return found.astype(np.float64)


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _mean(values: list[float | None]) -> float | None:
    """Of those that were counted."""
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None
