"""The heatmap loss."""

from __future__ import annotations

from torch import Tensor

from hrpose.errors import check


def heatmap_mse(heatmaps: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error, as SimpleBaseline and HRNet train with.

        L = 1/K sum_k 1/2 mean_{n,y,x} (w_nk (P_nkyx - G_nkyx))^2

    Args:
        heatmaps, targets: (N, K, H, W); the difference is taken in float32. weights: (N, K); a joint of weight 0 adds
        nothing but still counts in the mean.
    Returns: scalar float32, differentiable in `heatmaps`.
    """
    check(
        heatmaps.shape == targets.shape,
        "heatmap_mse",
        f"targets must be {tuple(heatmaps.shape)}, got {tuple(targets.shape)}",
    )
    shape = tuple(heatmaps.shape[:2])
    check(weights.shape == shape, "heatmap_mse", f"weights must be {shape}, got {tuple(weights.shape)}")
    return 0.5 * ((heatmaps.float() - targets) * weights[:, :, None, None]).square().mean()
