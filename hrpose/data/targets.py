"""Training targets: joints to Gaussian heatmaps and weights."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrpose.errors import check
from hrpose.geometry import as_size


def gaussian_targets(
    joints: Any, visible: Any, size: tuple[int, int], sigma: float, stride: float | tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Heatmaps with one Gaussian per joint, as SimpleBaseline and HRNet train on, equal to theirs to the bit.

        mu = trunc(joint / stride + 0.5)
        G(x, y) = exp(-((x - mu_x)^2 + (y - mu_y)^2) / (2 sigma^2))  where |x - mu_x|, |y - mu_y| <= 3 sigma, else 0

    The joint is rounded to the nearest heatmap pixel, so the peak is exactly 1. Where 3 sigma is not a whole number the
    patch is that of the whole number below it.

    Args:
        joints:  (N, K, 2) x, y in input pixels.
        visible: (N, K) 0..1, above 0.5 for labelled joints.
        size:    (width, height) of the heatmaps.
        sigma:   width of the Gaussian in heatmap pixels, > 0 (published: 2 at 256x192 and 256x256, 3 at 384x288).
        stride:  input pixels per heatmap pixel, a number or (x, y).
    Returns: heatmaps (N, K, height, width) float32, and weights (N, K) float32: `visible`, but 0 where the patch misses
        the map. A joint of weight <= 0.5 has an empty map.
    Raises: InputError on a wrong shape, a joint that is not finite, a visibility beyond 0..1, or sigma or stride <= 0.
    Cost: writes the heatmaps once; runs on the device of `joints`.
    """
    joints = torch.as_tensor(joints).double()
    visible = torch.as_tensor(visible, device=joints.device)
    width, height = as_size(size, "gaussian_targets: size")
    where = "gaussian_targets"
    check(joints.ndim == 3 and joints.shape[2] == 2, where, f"joints must be (N, K, 2), got {tuple(joints.shape)}")
    expected = tuple(joints.shape[:2])
    check(visible.shape == expected, where, f"visible must be {expected}, got {tuple(visible.shape)}")
    check(math.isfinite(sigma) and sigma > 0, where, f"sigma must be > 0, got {sigma}")
    pair = stride if isinstance(stride, (tuple, list)) else (stride, stride)
    valid = len(pair) == 2 and all(math.isfinite(step) and step > 0 for step in pair)
    check(valid, where, f"stride must be > 0, one number or (x, y), got {stride}")
    strides = joints.new_tensor(pair)
    check(bool(joints.isfinite().all()), where, "joints must be finite")
    # COCO's v = 2, taken as a weight, would silently count for four in the loss
    check(bool(((visible >= 0) & (visible <= 1)).all()), where, "visible must be 0..1")

    reach = sigma * 3
    mu = torch.trunc(joints / strides + 0.5)
    # trunc, not floor: the official code converts with int(), which rounds toward zero, also for the patch's corners
    beyond = torch.trunc(mu - reach) >= joints.new_tensor([width, height])
    weights = torch.where((beyond | (torch.trunc(mu + reach + 1) < 0)).any(-1), 0, visible).float()

    patch = _patch(sigma).to(joints.device)
    radius = patch.shape[0] // 2
    mu = torch.where(weights[..., None] > 0.5, mu, -math.inf)  # far away: every pixel reads the patch's zero border

    def patch_index(axis: int, length: int) -> Tensor:
        pixels = torch.arange(length, dtype=torch.float64, device=joints.device)
        return (pixels - mu[..., axis, None] + radius).clamp(0, 2 * radius).long()

    return patch[patch_index(1, height)[..., :, None], patch_index(0, width)[..., None, :]], weights


@lru_cache(maxsize=16)
def _patch(sigma: float) -> Tensor:
    """The Gaussian around a joint with a border of zeros, computed with numpy in float32 exactly as the official code
    does: torch's exponential differs from numpy's in the last bit."""
    radius = math.floor(sigma * 3)
    x = np.arange(-radius, radius + 1, dtype=np.float32)
    return torch.from_numpy(np.pad(np.exp(-(x**2 + x[:, None] ** 2) / (2 * sigma**2)), 1))
