"""The weighted sum of resampled maps: HRNet's exchange unit, and Resolution-wise Attention's."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def ram_sum(inputs: Sequence[Tensor], weights: Tensor | None = None, interpolation: str = "nearest") -> Tensor:
    """y[n] = relu( sum_h weights[n, h] * resample_h(inputs[h])[n] ), summed in the order of `inputs`.

    Args:
        inputs: M maps (N, C, H_h, W_h), each smaller than the largest by an integer factor.
        weights: (N, M), None for ones.
        interpolation: "nearest" or "bilinear".
    Returns: (N, C, H, W) of the largest.
    """
    size = inputs[0].shape[2:]
    for x in inputs:
        size = x.shape[2:] if x.shape[2] > size[0] else size
    total = None
    for h, x in enumerate(inputs):
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode=interpolation)
        if weights is not None:
            x = x * weights[:, h, None, None, None]
        total = x if total is None else total + x
    return total.relu()
