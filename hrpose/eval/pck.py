"""PCK: the share of joints found within a fraction of the person's own size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hrpose.errors import check
from hrpose.skeleton import Skeleton


@dataclass(frozen=True)
class Pck:
    """How many joints were found.

    value:           correct / counted over all joints; None where none was counted.
    per_joint:       (K,) the same for each joint; NaN where none was counted.
    joints, persons: how many were counted.
    reference:       what distances were divided by, "torso" or "box".
    """

    value: float | None
    per_joint: np.ndarray
    joints: int
    persons: int
    reference: str


def pck(
    keypoints: np.ndarray,
    joints: np.ndarray,
    visible: np.ndarray,
    boxes: np.ndarray,
    skeleton: Skeleton,
    threshold: float = 0.2,
) -> Pck:
    """Percentage of correct keypoints: |predicted - labelled| <= threshold * size of the person.

    The size is the torso's diagonal, left shoulder to right hip, or where one of the two is not labelled its mirror
    image; a person with neither is not counted. A skeleton without shoulders and hips is measured with the longer side
    of the box.

    Args:
        keypoints: (P, K, 2) predicted x, y in image pixels; a prediction that is not finite counts as wrong.
        joints:    (P, K, 2) labelled x, y in image pixels.
        visible:   (P, K) > 0 where labelled.
        boxes:     (P, 4) x, y, width, height in image pixels.
    Raises: InputError on shapes that do not agree, labels or boxes that are not finite, or a negative threshold.
    """
    keypoints, joints = np.asarray(keypoints, np.float64), np.asarray(joints, np.float64)
    seen, boxes = np.asarray(visible) > 0, np.asarray(boxes, np.float64)
    expected = (len(joints), skeleton.num_joints, 2)
    check(joints.shape == expected, "pck", f"joints must be (P, {skeleton.num_joints}, 2), got {joints.shape}")
    check(keypoints.shape == expected, "pck", f"keypoints must be {expected}, got {keypoints.shape}")
    check(seen.shape == expected[:2], "pck", f"visible must be {expected[:2]}, got {seen.shape}")
    check(boxes.shape == (len(joints), 4), "pck", f"boxes must be ({len(joints)}, 4), got {boxes.shape}")
    check(bool(np.isfinite(joints[seen]).all()), "pck", "joints must be finite where visible")
    check(bool(np.isfinite(boxes).all()), "pck", "boxes must be finite")
    check(0 <= threshold < np.inf, "pck", f"threshold must be >= 0, got {threshold}")
    sizes = np.zeros(len(joints))
    reference = "torso" if skeleton.torso else "box"
    if skeleton.torso:
        for a, b in reversed(skeleton.torso):  # the first diagonal is written last: it has precedence
            length = np.linalg.norm(joints[:, a] - joints[:, b], axis=1)
            sizes = np.where(seen[:, a] & seen[:, b] & (length > 0), length, sizes)
    else:
        sizes = boxes[:, 2:].max(1, initial=0)
    counted = seen & (sizes > 0)[:, None]
    with np.errstate(invalid="ignore"):  # a NaN prediction compares as wrong
        correct = (np.linalg.norm(keypoints - joints, axis=2) <= threshold * sizes[:, None]) & counted
    total = counted.sum(0)
    per_joint = np.divide(correct.sum(0), total, out=np.full(skeleton.num_joints, np.nan), where=total > 0)
    value = float(correct.sum() / total.sum()) if total.sum() else None
    return Pck(value, per_joint, int(total.sum()), int(counted.any(1).sum()), reference)
