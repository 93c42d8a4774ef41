"""Crop arithmetic against the official three-point construction, restated here in float64 as published."""

import math
import re

import numpy as np
import pytest
import torch

from hrpose import geometry
from hrpose.errors import InputError

SIZES = [(192, 256), (288, 384), (256, 256), (48, 64)]


# The official construction (center, scale with pixel_std 200, rotation, output size) ----------------------------------


def official_center_scale(box, size):
    """_xywh2cs: centre and scale of a box."""
    x, y, w, h = box
    aspect = size[0] / size[1]
    center = np.array([x + w * 0.5, y + h * 0.5])
    if w > aspect * h:
        h = w * 1.0 / aspect
    elif w < aspect * h:
        w = h * aspect
    return center, np.array([w / 200, h / 200]) * 1.25


def official_transform(center, scale, rotation, size, inverse=False):
    """get_affine_transform: the affine map through three point pairs."""

    def turned(point, angle):
        sin, cos = math.sin(angle), math.cos(angle)
        return np.array([point[0] * cos - point[1] * sin, point[0] * sin + point[1] * cos])

    def third(a, b):
        d = a - b
        return b + np.array([-d[1], d[0]])

    source_w, (w, h) = scale[0] * 200, size
    src, dst = np.zeros((3, 2)), np.zeros((3, 2))
    src[0], src[1] = center, center + turned([0, source_w * -0.5], math.pi * rotation / 180)
    dst[0], dst[1] = (w * 0.5, h * 0.5), (w * 0.5, h * 0.5 - w * 0.5)
    src[2], dst[2] = third(src[0], src[1]), third(dst[0], dst[1])
    if inverse:
        src, dst = dst, src
    return np.linalg.solve(np.c_[src, np.ones(3)], dst).T


def random_boxes(rng, n):
    return np.c_[rng.uniform(-50, 600, (n, 2)), rng.uniform(1, 500, (n, 2))]


def relative(found, expected):
    """Largest difference, relative to the largest number: the construction's 3x3 solve loses digits of it."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_transforms_equal_the_official_construction(rng, size):
    boxes = random_boxes(rng, 100)
    found = geometry.crop_transforms(boxes, size)
    assert found.shape == (100, 2, 3) and found.dtype == torch.float64
    for box, matrix in zip(boxes, found, strict=True):
        assert relative(matrix, official_transform(*official_center_scale(box, size), 0, size)) < 1e-12


@pytest.mark.parametrize("angle", [-80, -33.3, 0, 17, 90])
def test_rotation_equals_the_official_construction_and_the_closed_form(rng, angle):
    size = (192, 256)
    for box in random_boxes(rng, 20):
        center, scale = official_center_scale(box, size)
        args = torch.tensor(center[None]), torch.tensor(scale[:1] * 200), torch.tensor([angle], dtype=torch.float64)
        found = geometry.region_transform(*args, size)[0]
        assert relative(found, official_transform(center, scale, angle, size)) < 1e-12
        # src = c + (200 s_x / w_out) R(r) (dst - (w_out/2, h_out/2))
        dst, r = rng.uniform(0, 256, 2), math.radians(angle)
        rotation = np.array([[math.cos(r), -math.sin(r)], [math.sin(r), math.cos(r)]])
        src = center + 200 * scale[0] / size[0] * rotation @ (dst - np.array(size) / 2)
        assert found.numpy() @ [*src, 1] == pytest.approx(dst, abs=1e-9)


def test_single_precision_arguments_are_computed_in_double():
    args = torch.tensor([[100.7, 50.3]]), torch.tensor([123.4]), torch.tensor([30.0])
    found = geometry.region_transform(*args, (192, 256))
    assert found.dtype == torch.float64
    assert torch.equal(found, geometry.region_transform(*(a.double() for a in args), (192, 256)))


def test_one_box_by_hand():
    """A box of 96x128 at (100, 200) is padded to 120x160, of which the input shows each pixel 1.6 times."""
    matrix = geometry.crop_transforms([[100, 200, 96, 128]], (192, 256))[0]
    assert matrix.tolist() == [[1.6, 0, pytest.approx(96 - 1.6 * 148)], [0, 1.6, pytest.approx(128 - 1.6 * 264)]]
    corners = geometry.apply(matrix, torch.tensor([[148.0, 264.0], [88.0, 184.0], [208.0, 344.0]]).double())
    assert corners.tolist() == [pytest.approx(p, abs=1e-9) for p in ([96, 128], [0, 0], [192, 256])]


def test_regions_grow_the_shorter_side():
    centers, extents = geometry.box_regions([[0, 0, 10, 100], [0, 0, 100, 10], [5, 5, 0, 8]], (192, 256), padding=2)
    assert centers.tolist() == [[5, 50], [50, 5], [5, 9]]
    assert extents.tolist() == [[150, 200], [200, pytest.approx(800 / 3)], [12, 16]]


@pytest.mark.parametrize(("size", "stride"), [((192, 256), 4), ((288, 384), 4), ((256, 256), 4), ((192, 256), 2)])
def test_heatmap_to_image_equals_the_official_transform_preds(rng, size, stride):
    boxes = random_boxes(rng, 50)
    found = geometry.heatmap_to_image(geometry.crop_transforms(boxes, size), stride)
    heatmap = size[0] // stride, size[1] // stride
    for box, matrix in zip(boxes, found, strict=True):
        back = official_transform(*official_center_scale(box, size), 0, heatmap, inverse=True)
        assert relative(matrix, back) < 1e-12


# Algebra of transforms ------------------------------------------------------------------------------------------------


def random_transforms(rng, shape):
    return torch.tensor(rng.normal(size=(*shape, 2, 3)) * [1, 1, 100])


def as_3x3(transforms):
    last = np.broadcast_to([0.0, 0, 1], (*transforms.shape[:-2], 1, 3))
    return np.concatenate([transforms.numpy(), last], -2)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)], ids=str)
def test_invert_compose_apply_are_those_of_3x3_matrices(rng, shape):
    a, b = random_transforms(rng, shape), random_transforms(rng, shape)
    points = torch.tensor(rng.normal(size=(*shape, 5, 2)) * 50)
    inverse = np.linalg.inv(as_3x3(a))[..., :2, :]
    np.testing.assert_allclose(geometry.invert(a), inverse, rtol=1e-9, atol=1e-9 * np.abs(inverse).max())
    np.testing.assert_allclose(geometry.compose(a, b), (as_3x3(a) @ as_3x3(b))[..., :2, :], rtol=1e-12, atol=1e-9)
    homogeneous = np.concatenate([points.numpy(), np.ones((*shape, 5, 1))], -1)
    expected = (a.numpy()[..., None, :, :] @ homogeneous[..., None])[..., 0]
    np.testing.assert_allclose(geometry.apply(a, points), expected, rtol=1e-12, atol=1e-9)


def test_round_trips(rng):
    a = geometry.crop_transforms(random_boxes(rng, 30), (192, 256))
    points = torch.tensor(rng.uniform(-100, 800, (30, 17, 2)))
    back = geometry.apply(geometry.invert(a), geometry.apply(a, points))
    assert float((back - points).abs().max()) < 1e-9
    both = geometry.compose(geometry.invert(a), a)
    assert float((both - torch.eye(2, 3, dtype=torch.float64)).abs().max()) < 1e-9


def test_mirror():
    points = torch.tensor([[0.0, 3.0], [9.0, 3.0], [2.5, 0.0]], dtype=torch.float64)
    assert geometry.apply(geometry.mirror(10), points).tolist() == [[9, 3], [0, 3], [6.5, 0]]
    twice = geometry.compose(geometry.mirror(10), geometry.mirror(10))
    assert torch.equal(twice, torch.eye(2, 3, dtype=torch.float64))


# Boxes ----------------------------------------------------------------------------------------------------------------


def test_clip_box_equals_the_official_sanitising(rng):
    for _ in range(2000):
        width, height = (int(v) for v in rng.integers(1, 60, 2))
        x, y, w, h = (float(v) for v in np.round(np.r_[rng.uniform(-30, 70, 2), rng.uniform(0, 90, 2)] * 2) / 2)
        x1, y1 = np.max((0, x)), np.max((0, y))
        x2 = np.min((width - 1, x1 + np.max((0, w - 1))))
        y2 = np.min((height - 1, y1 + np.max((0, h - 1))))
        assert geometry.clip_box((x, y, w, h), (width, height)) == (x1, y1, x2 - x1, y2 - y1)


def test_clip_box_by_hand():
    assert geometry.clip_box((-5, 2, 20, 30), (10, 20)) == (0, 2, 9, 17)
    assert geometry.clip_box((12, 2, 20, 30), (10, 20))[2] < 0  # right of the image


def test_whole_image_box():
    assert geometry.whole_image_box((640, 480)) == (0, 0, 639, 479)
    assert geometry.whole_image_box((1, 1)) == (0, 0, 1, 1)


def test_as_boxes_takes_array_likes():
    for boxes in ([[1, 2, 3, 4]], ((1, 2, 3, 4),), np.array([[1, 2, 3, 4]], np.uint8), torch.tensor([[1.0, 2, 3, 4]])):
        assert geometry.as_boxes(boxes).tolist() == [[1, 2, 3, 4]]
    for nothing in ([], np.zeros((0, 4)), torch.zeros(0)):
        assert geometry.as_boxes(nothing).shape == (0, 4)
    assert geometry.crop_transforms([], (192, 256)).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([1, 2, 3, 4], "must be (N, 4) x, y, width, height, got (4,)"),
        ([[1, 2, 3]], "must be (N, 4) x, y, width, height, got (1, 3)"),
        (None, "must be (N, 4) numbers x, y, width, height, got None"),
        ("photo", "must be (N, 4) numbers"),
        ([[1, 2, 3, "4"]], "must be (N, 4) numbers"),
        ([[1, 2, 3, 4], [1, 2, 3]], "must be (N, 4) numbers"),
        ([[1, 2, 3, 10**400]], "must be (N, 4) numbers"),
        (
            [[1, 2, 3, 4], [1, 2, -3, 4]],
            "box 1 must be finite with width, height >= 0 and not both 0, got [1.0, 2.0, -3",
        ),
        ([[1, 2, 0, 0]], "box 0 must be finite with width, height >= 0 and not both 0"),
        ([[math.nan, 2, 3, 4]], "box 0 must be finite"),
        ([[1, 2, math.inf, 4]], "box 0 must be finite"),
    ],
)
def test_boxes_that_are_refused(boxes, message):
    with pytest.raises(InputError, match=re.escape(f"people: {message}")):
        geometry.as_boxes(boxes, "people")
    with pytest.raises(InputError):
        geometry.crop_transforms(boxes, (192, 256))


@pytest.mark.parametrize("size", [(192,), (192, 0), (192, -1), (192.5, 256), ("a", "b"), (math.nan, 2), (math.inf, 2),
                                  (None, 2), 192, None, (1, 2, 3), (2**40, 2)])  # fmt: skip
def test_sizes_that_are_refused(size):
    with pytest.raises(InputError, match="input: must be two positive integers"):
        geometry.as_size(size, "input")


def test_sizes_that_are_taken():
    for size in ((192, 256), [192, 256], (192.0, 256.0), tuple(np.array([192, 256])), torch.Size([192, 256])):
        found = geometry.as_size(size)
        assert found == (192, 256) and all(type(side) is int for side in found)


@pytest.mark.parametrize("padding", [0, -1, math.nan, math.inf])
def test_paddings_that_are_refused(padding):
    with pytest.raises(InputError, match="padding: must be finite and > 0"):
        geometry.crop_transforms([[0, 0, 9, 9]], (192, 256), padding)


def test_one_region_in_plain_numbers(rng):
    for _ in range(100):
        center, width, angle = rng.uniform(-500, 500, 2), rng.uniform(1, 900), rng.uniform(-180, 180)
        given = (torch.tensor(value, dtype=torch.float64)[None] for value in (center, width, angle))
        many = geometry.region_transform(*given, (192, 256))[0].numpy()
        one = geometry.region_matrix(center.tolist(), width, angle, (192, 256))
        np.testing.assert_allclose(one, many, rtol=0, atol=1e-12 * np.abs(many).max())
