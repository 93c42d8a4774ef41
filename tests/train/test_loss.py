"""The loss against the official JointsMSELoss, restated as a loop."""

import numpy as np
import pytest
import torch

from hrpose.errors import InputError
from hrpose.train.loss import heatmap_mse


def official(heatmaps: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """SimpleBaseline's and HRNet's JointsMSELoss in float64: half the mean of each joint, masked ones among them."""
    n, joints, height, width = heatmaps.shape
    total = 0.0
    for k in range(joints):
        squares = 0.0
        for i in range(n):
            for y in range(height):
                for x in range(width):
                    squares += (weights[i, k] * heatmaps[i, k, y, x] - weights[i, k] * targets[i, k, y, x]) ** 2
        total += 0.5 * squares / (n * height * width)
    return total / joints


@pytest.fixture
def batch(rng):
    shape = (3, 5, 7, 4)
    heatmaps, targets = rng.standard_normal(shape), rng.random(shape)
    weights = np.array([[1, 0, 1, 1.5, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], float)
    return [torch.from_numpy(a).float() for a in (heatmaps, targets, weights)]


def test_value(batch):
    expected = official(*(t.double().numpy() for t in batch))
    assert float(heatmap_mse(*batch)) == pytest.approx(expected, rel=1e-6)


def test_gradient(batch):
    """dL/dP = w^2 (P - G) / (N K H W)."""
    heatmaps, targets, weights = batch
    heatmaps.requires_grad_()
    heatmap_mse(heatmaps, targets, weights).backward()
    expected = weights[:, :, None, None] ** 2 * (heatmaps.detach() - targets) / heatmaps.numel()
    torch.testing.assert_close(heatmaps.grad, expected)
    assert not heatmaps.grad[1].any() and not heatmaps.grad[:, 4].any()
    inputs = heatmaps.detach().double().requires_grad_()
    step = 1e-3  # float32 inside: the finite difference of a quadratic is exact at any step
    change = torch.zeros_like(inputs)
    change[0, 0, 2, 1] = step
    with torch.no_grad():
        slope = (
            (heatmap_mse(inputs + change, targets, weights) - heatmap_mse(inputs - change, targets, weights)) / 2 / step
        )
    assert float(slope) == pytest.approx(float(expected[0, 0, 2, 1]), abs=1e-4)


def test_bf16_heatmaps_are_compared_in_float32(batch):
    heatmaps, targets, weights = batch
    loss = heatmap_mse(heatmaps.bfloat16(), targets, weights)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(
        official(*(t.double().numpy() for t in (heatmaps.bfloat16(), targets, weights))), rel=1e-6
    )


def test_hidden_joints_count_in_the_mean():
    heatmaps, targets = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    assert float(heatmap_mse(heatmaps, targets, torch.ones(1, 4))) == 0.5
    assert float(heatmap_mse(heatmaps, targets, torch.tensor([[1.0, 0, 0, 0]]))) == 0.125


def test_wrong_shapes(batch):
    heatmaps, targets, weights = batch
    with pytest.raises(InputError, match=r"heatmap_mse: targets must be \(3, 5, 7, 4\), got \(3, 5, 7, 3\)"):
        heatmap_mse(heatmaps, targets[..., :3], weights)
    with pytest.raises(InputError, match=r"heatmap_mse: weights must be \(3, 5\), got \(3, 4\)"):
        heatmap_mse(heatmaps, targets, weights[:, :4])
