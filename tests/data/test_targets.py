"""Targets equal to the official ones to the bit."""

import math
import re

import numpy as np
import pytest
import torch

from hrpose.data.targets import gaussian_targets
from hrpose.errors import InputError


def official_target(joints, visible, size, sigma, image_size):
    """JointsDataset.generate_target of one person: joints one after the other, a patch stamped for each."""
    count = len(joints)
    weights = np.ones((count, 1), np.float32)
    weights[:, 0] = visible
    target = np.zeros((count, size[1], size[0]), np.float32)
    reach = sigma * 3
    stride = np.array(image_size) / np.array(size)
    for j in range(count):
        mu_x, mu_y = int(joints[j][0] / stride[0] + 0.5), int(joints[j][1] / stride[1] + 0.5)
        ul = [int(mu_x - reach), int(mu_y - reach)]
        br = [int(mu_x + reach + 1), int(mu_y + reach + 1)]
        if ul[0] >= size[0] or ul[1] >= size[1] or br[0] < 0 or br[1] < 0:
            weights[j] = 0
            continue
        side = 2 * reach + 1
        x = np.arange(0, side, 1, np.float32)
        y = x[:, np.newaxis]
        x0 = y0 = side // 2
        patch = np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * sigma**2))
        g_x, g_y = (max(0, -ul[0]), min(br[0], size[0]) - ul[0]), (max(0, -ul[1]), min(br[1], size[1]) - ul[1])
        img_x, img_y = (max(0, ul[0]), min(br[0], size[0])), (max(0, ul[1]), min(br[1], size[1]))
        if weights[j] > 0.5:
            target[j][img_y[0] : img_y[1], img_x[0] : img_x[1]] = patch[g_y[0] : g_y[1], g_x[0] : g_x[1]]
    return target, weights[:, 0]


def compare(joints, visible, size, sigma, stride=4):
    maps, weights = gaussian_targets(torch.tensor(joints), torch.tensor(visible), size, sigma, stride)
    assert maps.dtype == weights.dtype == torch.float32 and maps.shape == (*joints.shape[:2], size[1], size[0])
    for n in range(len(joints)):
        expected = official_target(joints[n], visible[n], size, sigma, (size[0] * stride, size[1] * stride))
        assert maps[n].numpy().tobytes() == expected[0].tobytes()
        assert weights[n].numpy().tobytes() == expected[1].tobytes()
    return maps, weights


@pytest.mark.parametrize(("size", "sigma"), [((48, 64), 2), ((64, 64), 2), ((72, 96), 3), ((96, 128), 2), ((5, 3), 1)])
def test_equal_to_the_official_targets_to_the_bit(rng, size, sigma):
    """Joints inside, outside, far outside and hidden."""
    joints = rng.uniform(-0.5, 1.5, (12, 17, 2)) * np.array(size) * 4
    joints[0] *= 100
    visible = rng.integers(0, 2, (12, 17)).astype(np.float64)
    maps, weights = compare(joints, visible, size, sigma)
    assert 0 < int(weights.sum()) < visible.sum()  # some lie so far outside that they lost their weight
    assert float(maps.max()) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_equal_at_every_position_across_the_borders(axis):
    """Half-pixel steps from far left of the map to far right: every rounding, every clipped patch."""
    size, sigma = (48, 64), 2
    steps = np.arange(-60, 4 * size[axis] + 60, 0.5)
    joints = np.full((1, len(steps), 2), 100.0)
    joints[0, :, axis] = steps
    compare(joints, np.ones((1, len(steps))), size, sigma)


def test_weights_between_hidden_and_visible():
    joints = np.full((1, 5, 2), 60.0)
    compare(joints, np.array([[0, 0.4, 0.5, 0.6, 1]]), (48, 64), 2)


def test_one_joint_by_hand():
    """x = 41 lies at 10.25 heatmap pixels, y = 42 at 10.5: the peak is at (10, 11)."""
    maps, weights = gaussian_targets([[[41.0, 42.0]]], [[1]], (48, 64), 2, 4)
    assert weights.tolist() == [[1]] and maps[0, 0, 11, 10] == 1
    assert maps[0, 0, 11, 13] == pytest.approx(math.exp(-9 / 8), rel=1e-6)
    assert maps[0, 0, 13, 9] == pytest.approx(math.exp(-5 / 8), rel=1e-6)
    assert maps[0, 0, 11, 16] > 0 and maps[0, 0, 11, 17] == 0  # 3 sigma wide, then nothing


def test_two_strides():
    both = gaussian_targets([[[41.0, 42.0]]], [[1]], (48, 128), 2, (4, 2))[0]
    assert (both[0, 0] == 1).nonzero().tolist() == [[21, 10]]


def test_array_likes_and_dtypes():
    joints = [[[41.0, 42.0], [7.0, 8.0]]]
    expected = gaussian_targets(joints, [[1, 0]], (48, 64), 2, 4)
    for points in (np.array(joints, np.float32), torch.tensor(joints), torch.tensor(joints).double()):
        for visible in ([[1, 0]], [[True, False]], np.array([[1, 0]], np.int64), torch.tensor([[1.0, 0.0]])):
            found = gaussian_targets(points, visible, (48, 64), 2, 4)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_no_persons():
    maps, weights = gaussian_targets(torch.zeros(0, 17, 2), torch.zeros(0, 17), (48, 64), 2, 4)
    assert maps.shape == (0, 17, 64, 48) and weights.shape == (0, 17)


def test_calls_do_not_share_memory():
    first, _ = gaussian_targets([[[41.0, 42.0]]], [[1]], (48, 64), 2, 4)
    expected = first.clone()
    first.fill_(7)
    assert torch.equal(gaussian_targets([[[41.0, 42.0]]], [[1]], (48, 64), 2, 4)[0], expected)


ONE = {"joints": [[[1.0, 2.0]]], "visible": [[1]], "size": (48, 64), "sigma": 2, "stride": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": [[1.0, 2.0]]}, "joints must be (N, K, 2), got (1, 2)"),
        ({"joints": [[[1.0, 2.0, 3.0]]]}, "joints must be (N, K, 2), got (1, 1, 3)"),
        ({"joints": [[[math.nan, 2.0]]]}, "joints must be finite"),
        ({"joints": [[[math.inf, 2.0]]]}, "joints must be finite"),
        ({"visible": [1]}, "visible must be (1, 1), got (1,)"),
        ({"visible": [[1, 1]]}, "visible must be (1, 1), got (1, 2)"),
        ({"visible": [[2]]}, "visible must be 0..1"),  # COCO's v, which would count for four in the loss
        ({"visible": [[-1]]}, "visible must be 0..1"),
        ({"visible": [[math.nan]]}, "visible must be 0..1"),
        ({"size": (48, 0)}, "size: must be two positive integers"),
        ({"sigma": 0}, "sigma must be > 0, got 0"),
        ({"sigma": math.nan}, "sigma must be > 0, got nan"),
        ({"stride": 0}, "stride must be > 0, one number or (x, y), got 0"),
        ({"stride": (4, -1)}, "stride must be > 0, one number or (x, y), got (4, -1)"),
        ({"stride": (4, 4, 4)}, "stride must be > 0, one number or (x, y), got (4, 4, 4)"),
        ({"stride": math.inf}, "stride must be > 0, one number or (x, y), got inf"),
    ],
)
def test_messages(change, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        gaussian_targets(**(ONE | change))
    assert str(caught.value).startswith("gaussian_targets: ")
