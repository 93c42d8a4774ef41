"""PCK against a plain loop."""

import re

import numpy as np
import pytest

from hrpose.errors import InputError
from hrpose.eval.pck import pck
from hrpose.skeleton import COCO17, LSP14, Skeleton

DOTS = Skeleton("dots", ("a", "b", "c"))


def loop(keypoints, joints, visible, boxes, diagonals, threshold):
    """Correct and counted joints, one after the other; `diagonals` of the torso, () to measure with the box."""
    k = joints.shape[1]
    correct, counted = np.zeros(k, int), np.zeros(k, int)
    for p in range(len(joints)):
        size = 0.0
        if diagonals:
            for a, b in diagonals:
                if visible[p][a] > 0 and visible[p][b] > 0:
                    size = float(np.hypot(*(joints[p][a] - joints[p][b])))
                    if size > 0:
                        break
        else:
            size = max(boxes[p][2], boxes[p][3])
        for j in range(k):
            if size > 0 and visible[p][j] > 0:
                counted[j] += 1
                correct[j] += bool(np.hypot(*(keypoints[p][j] - joints[p][j])) <= threshold * size)
    return correct, counted


def made(rng, skeleton, count=60):
    k = skeleton.num_joints
    joints = rng.uniform(0, 200, (count, k, 2))
    keypoints = joints + rng.normal(size=(count, k, 2)) * rng.choice([2, 20, 60], (count, 1, 1))
    return keypoints, joints, rng.choice([0, 1, 2], (count, k)), rng.uniform(20, 200, (count, 4))


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5])
@pytest.mark.parametrize(
    ("skeleton", "diagonals"),
    [(COCO17, [(5, 12), (6, 11)]), (LSP14, [(9, 2), (8, 3)]), (DOTS, [])],
    ids=["COCO-17", "LSP-14", "dots"],
)
def test_equal_to_a_loop(rng, skeleton, diagonals, threshold):
    keypoints, joints, visible, boxes = made(rng, skeleton)
    correct, counted = loop(keypoints, joints, visible, boxes, diagonals, threshold)
    found = pck(keypoints, joints, visible, boxes, skeleton, threshold)
    assert found.joints == counted.sum() and found.value == correct.sum() / counted.sum()
    np.testing.assert_array_equal(found.per_joint, correct / counted)
    assert found.reference == ("torso" if diagonals else "box") and 0.05 < found.value < 0.95
    assert pck(keypoints.tolist(), joints.tolist(), visible.tolist(), boxes.tolist(), skeleton, threshold).value == (
        found.value
    )


def one(skeleton=COCO17):
    """A person whose torso diagonals are 50 (left shoulder, right hip) and 100 pixels long."""
    joints = np.zeros((1, 17, 2))
    joints[0, 5], joints[0, 12] = (0, 0), (30, 40)
    joints[0, 6], joints[0, 11] = (100, 0), (40, 80)
    return joints, np.ones((1, 17)), np.array([[0.0, 0, 400, 300]])


def test_distances_by_hand():
    joints, visible, boxes = one()
    keypoints = joints.copy()
    keypoints[0, 0] = 10, 0  # exactly 0.2 * 50: correct
    keypoints[0, 1] = 10.01, 0
    found = pck(keypoints, joints, visible, boxes, COCO17)
    assert (
        found.value == 16 / 17 and found.per_joint[:2].tolist() == [1, 0] and (found.joints, found.persons) == (17, 1)
    )


def test_the_other_diagonal_where_one_is_not_labelled():
    joints, visible, boxes = one()
    keypoints = joints.copy()
    keypoints[0, 0] = 20, 0  # 0.2 of the other diagonal, 100
    assert pck(keypoints, joints, visible, boxes, COCO17).per_joint[0] == 0
    visible[0, 5] = 0
    assert pck(keypoints, joints, visible, boxes, COCO17).per_joint[0] == 1
    visible[0, 11] = 0
    found = pck(keypoints, joints, visible, boxes, COCO17)
    assert (found.value, found.joints, found.persons) == (None, 0, 0) and np.isnan(found.per_joint).all()


def test_a_torso_without_length_is_not_counted():
    joints, visible, boxes = one()
    joints[0, 12] = joints[0, 5]  # the other diagonal stands in
    keypoints = joints.copy()
    keypoints[0, 0] = 20, 0
    assert pck(keypoints, joints, visible, boxes, COCO17).value == 1
    joints[0, 12], joints[0, 11] = joints[0, 5], joints[0, 6]
    assert pck(joints, joints, visible, boxes, COCO17).persons == 0


def test_predictions_that_are_not_finite_are_wrong():
    joints, visible, boxes = one()
    keypoints = joints.copy()
    keypoints[0, 3], keypoints[0, 4] = np.nan, np.inf
    assert pck(keypoints, joints, visible, boxes, COCO17).value == 15 / 17


def test_what_is_not_labelled_may_hold_anything():
    joints, visible, boxes = one()
    visible[0, 3] = 0
    joints[0, 3] = np.nan
    found = pck(np.nan_to_num(joints), joints, visible, boxes, COCO17)
    assert found.value == 1 and found.joints == 16 and np.isnan(found.per_joint[3])


def test_nobody():
    found = pck(np.zeros((0, 17, 2)), np.zeros((0, 17, 2)), np.zeros((0, 17)), np.zeros((0, 4)), COCO17)
    assert found.value is None and found.persons == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoints": np.zeros((1, 16, 2))}, "keypoints must be (1, 17, 2), got (1, 16, 2)"),
        ({"keypoints": np.zeros((2, 17, 2))}, "keypoints must be (1, 17, 2), got (2, 17, 2)"),
        ({"keypoints": np.zeros((1, 17, 3))}, "keypoints must be (1, 17, 2), got (1, 17, 3)"),
        ({"joints": np.zeros((1, 14, 2))}, "joints must be (P, 17, 2), got (1, 14, 2)"),
        ({"joints": np.full((1, 17, 2), np.nan)}, "joints must be finite where visible"),
        ({"visible": np.ones((1, 17, 1))}, "visible must be (1, 17), got (1, 17, 1)"),
        ({"boxes": np.ones(4)}, "boxes must be (1, 4), got (4,)"),
        ({"boxes": np.full((1, 4), np.nan)}, "boxes must be finite"),
        ({"threshold": -0.1}, "threshold must be >= 0, got -0.1"),
        ({"threshold": np.nan}, "threshold must be >= 0, got nan"),
    ],
)
def test_messages(change, message):
    joints, visible, boxes = one()
    given = {"keypoints": joints, "joints": joints, "visible": visible, "boxes": boxes, "skeleton": COCO17}
    with pytest.raises(InputError, match=re.escape(f"pck: {message}")):
        pck(**(given | change))
