"""Pictures: joints and limbs are drawn where they are, in the colours of their side, and nothing else changes."""

import numpy as np
import pytest
import torch
from PIL import Image

from hrpose.errors import InputError
from hrpose.skeleton import COCO17, Skeleton
from hrpose.viz import LEFT, MIDDLE, RIGHT, contact_sheet, draw_poses

CHAIN = Skeleton("chain", ("left_hand", "l_elbow", "head", "RightElbow", "hand.R"), ((0, 1), (1, 2), (2, 3), (3, 4)))
JOINTS = np.array([[[30, 40], [70, 90], [110, 40], [150, 90], [190, 140]]], float)
GREY = np.full((180, 220, 3), 90, np.uint8)


def near(pixel, color):
    return np.abs(np.asarray(pixel, int) - color).max() <= 3


def drawn(picture, image=GREY):
    """Mask of the pixels that differ from the photograph."""
    return (np.asarray(picture).astype(int) != image).any(2)


def at(picture, point):
    return np.asarray(picture)[round(point[1]), round(point[0])]


def test_joints_and_limbs_have_the_colours_of_their_side():
    picture = draw_poses(GREY, JOINTS, skeleton=CHAIN)
    assert picture.size == (220, 180) and picture.mode == "RGB"
    for point, color in zip(JOINTS[0], (LEFT, LEFT, MIDDLE, RIGHT, RIGHT), strict=True):
        assert near(at(picture, point), color)
    for (a, b), color in zip(CHAIN.edges, (LEFT, MIDDLE, MIDDLE, RIGHT), strict=True):
        assert near(at(picture, (JOINTS[0, a] + JOINTS[0, b]) / 2), color)


def test_nothing_else_changes():
    before = GREY.copy()
    mask = drawn(draw_poses(GREY, JOINTS, skeleton=CHAIN))
    assert (GREY == before).all()
    rows, columns = mask.nonzero()
    points = np.stack([columns, rows], 1).astype(float)
    distance = np.full(len(points), np.inf)
    for a, b in CHAIN.edges:
        start, along = JOINTS[0, a], JOINTS[0, b] - JOINTS[0, a]
        share = np.clip((points - start) @ along / (along @ along), 0, 1)
        distance = np.minimum(distance, np.linalg.norm(points - start - share[:, None] * along, axis=1))
    assert len(points) > 500 and distance.max() < 8


@pytest.mark.parametrize("point", [(20, 30), (20.5, 30), (37.25, 41.75)])
def test_a_joint_is_centred_on_its_pixel(point):
    """Pixel centres are at integers: a dot at (20, 30) is as wide to the left as to the right of pixel 20."""
    mask = drawn(draw_poses(GREY, [[point]]))
    rows, columns = mask.nonzero()
    assert (columns.mean(), rows.mean()) == pytest.approx(point, abs=0.3)


def test_low_scores_and_points_that_are_not_there_are_left_out():
    scores = np.array([[0.9, 0.9, 0.1, 0.9, np.nan]])
    picture = draw_poses(GREY, JOINTS, scores, CHAIN)
    shown = [not near(at(picture, point), 90) for point in JOINTS[0]]
    assert shown == [True, True, False, True, False]
    middles = [at(picture, (JOINTS[0, a] + JOINTS[0, b]) / 2) for a, b in CHAIN.edges]
    assert [not near(m, 90) for m in middles] == [True, False, False, False]  # a limb needs both of its joints
    assert near(at(draw_poses(GREY, JOINTS, scores, CHAIN, min_score=0.05), JOINTS[0, 2]), MIDDLE)
    broken = JOINTS.copy()
    broken[0, 0], broken[0, 4] = (np.nan, 40), (np.inf, 140)
    picture = draw_poses(GREY, broken, None, CHAIN)
    assert near(at(picture, JOINTS[0, 0]), 90) and near(at(picture, JOINTS[0, 1]), LEFT)


def test_without_scores_all_are_drawn_whatever_the_threshold():
    picture = draw_poses(GREY, JOINTS, None, CHAIN, min_score=5)
    assert all(not near(at(picture, point), 90) for point in JOINTS[0])


@pytest.mark.parametrize("far", [1e4, 1e7, 1e12, 1e30, -1e30])
def test_points_far_outside_do_not_disturb_the_others(far):
    joints = JOINTS.copy()
    joints[0, 4] = far, 100
    picture = draw_poses(GREY, joints, None, CHAIN)
    assert near(at(picture, JOINTS[0, 0]), LEFT) and near(at(picture, JOINTS[0, 1]), LEFT)
    if abs(far) > 1e6:  # as if it were not there, in the width of the lines too
        joints[0, 4] = np.nan
        assert np.array_equal(picture, draw_poses(GREY, joints, None, CHAIN))


def test_without_a_skeleton_points_alone():
    picture = draw_poses(GREY, JOINTS)
    assert all(near(at(picture, point), MIDDLE) for point in JOINTS[0])
    assert near(at(picture, (JOINTS[0, 0] + JOINTS[0, 1]) / 2), 90)


def test_boxes_are_outlined():
    mask = drawn(draw_poses(GREY, np.full((1, 1, 2), np.nan), boxes=[[50, 60, 100, 40]]))
    rows, columns = mask.nonzero()
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((50, 150, 60, 100), abs=1)
    assert not mask[70:90, 60:140].any() and mask[75:85, 49:52].any(1).all()


def test_nobody():
    assert not drawn(draw_poses(GREY, np.zeros((0, 17, 2)), np.zeros((0, 17)), COCO17, boxes=np.zeros((0, 4)))).any()


def test_array_likes():
    expected = np.asarray(draw_poses(GREY, JOINTS, skeleton=CHAIN))
    for image, joints in ((torch.from_numpy(GREY), torch.tensor(JOINTS)), (GREY[::-1][::-1], JOINTS.tolist())):
        assert np.array_equal(draw_poses(image, joints, skeleton=CHAIN), expected)


def test_tiny_pictures():
    for size in ((1, 1), (2, 3)):
        picture = draw_poses(np.zeros((*size[::-1], 3), np.uint8), [[[0, 0], [1, 1]]], boxes=[[0, 0, 1, 1]])
        assert picture.size == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": GREY[:, :, 0]}, r"image must be \(H, W, 3\) uint8 RGB, got \(180, 220\) uint8"),
        ({"image": GREY / 255}, r"image must be \(H, W, 3\) uint8 RGB, got \(180, 220, 3\) float64"),
        ({"image": GREY[:0]}, r"image must be \(H, W, 3\) uint8 RGB, got \(0, 220, 3\) uint8"),
        ({"keypoints": JOINTS[0]}, r"keypoints must be \(P, K, 2\), got \(5, 2\)"),
        ({"keypoints": np.zeros((1, 5, 3))}, r"keypoints must be \(P, K, 2\), got \(1, 5, 3\)"),
        ({"scores": np.ones((1, 4))}, r"scores must be \(1, 5\), got \(1, 4\)"),
        ({"skeleton": COCO17}, "skeleton must have 5 joints, has 17"),
        ({"boxes": [[1, 2, 3]]}, r"boxes: must be \(N, 4\) x, y, width, height, got \(1, 3\)"),
        ({"boxes": [[1, 2, -3, 4]]}, "boxes: box 0 must be finite with width, height >= 0"),
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "boxes must be 1, one per person, got 2"),
    ],
)
def test_messages(change, message):
    with pytest.raises(InputError, match=f"draw_poses: {message}"):
        draw_poses(**({"image": GREY, "keypoints": JOINTS} | change))


# Contact sheets -------------------------------------------------------------------------------------------------------


def test_contact_sheet():
    sizes = {"red": (20, 10), "lime": (40, 40), "blue": (5, 50)}
    sheet = contact_sheet([Image.new("RGB", size, color) for color, size in sizes.items()], 2, 30, 4)
    assert sheet.size == (4 + 60 + 4 + 30 + 4, 4 + 2 * 34)  # 60x30 and 30x30 in one row, 3x30 below
    pixels = np.asarray(sheet)
    for (x, y), color in (((34, 19), (255, 0, 0)), ((83, 19), (0, 255, 0)), ((5, 53), (0, 0, 255))):
        assert near(pixels[y, x], color)
    assert (pixels[:4] == 255).all() and (pixels[:, :4] == 255).all() and (pixels[40:, 20:] == 255).all()


@pytest.mark.parametrize(
    "arguments", [([], 2, 30), ([Image.new("RGB", (4, 4))], 0, 30), ([Image.new("L", (4, 4))], 2, 0)]
)
def test_contact_sheet_messages(arguments):
    with pytest.raises(InputError, match="contact_sheet: "):
        contact_sheet(*arguments)
