"""The heatmap losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hrpose.errors import check

_HARDER = {"elb": 1.2, "kne": 1.2, "wri": 1.5, "ank": 1.5}  # by parts of names: MPII's are relb, lank


def joint_weights(joints: Sequence[str]) -> Tensor:
    """(K,) factors of HRNet's option for harder joints: 1.2 for elbows and knees, 1.5 for wrists and ankles, else 1.

    They multiply the difference, so that in the loss their squares count.
    Raises: InputError if there are no such joints.
    """
    found = [next((w for part, w in _HARDER.items() if part in name.lower()), 1.0) for name in joints]
    rule = f"is for skeletons with elbows, knees, wrists or ankles, got {', '.join(joints)}"
    check(max(found) > 1, "weighted_joints", rule)
    return torch.tensor(found)


def heatmap_mse(heatmaps: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error, as SimpleBaseline and HRNet train with.

        L = 1/K sum_k 1/2 mean_{n,y,x} (w_nk (P_nkyx - G_nkyx))^2

    Args:
        heatmaps, targets: (N, K, H, W); the difference is taken in float32 at least.
        weights: (N, K); a joint of weight 0 adds nothing but still counts in the mean.
    Returns: scalar float32, differentiable in `heatmaps`.
    """
    return 0.5 * _squared_errors(heatmaps, targets, weights, "heatmap_mse").mean()


def heatmap_ohkm(heatmaps: Tensor, targets: Tensor, weights: Tensor, hard_keypoints: int) -> Tensor:
    """The same of each person's hardest joints only: online hard keypoint mining, as CPN trains its last output with.

        L = 1/N sum_n 1/M sum_{k in hardest M of n} l_nk,    l_nk = 1/2 mean_{y,x} (w_nk (P_nkyx - G_nkyx))^2

    Args:
        heatmaps, targets, weights: as for ``heatmap_mse``; a joint of weight 0 is the easiest there is.
        hard_keypoints: M, 1..K; with K the loss is ``heatmap_mse``.
    Returns: scalar float32, differentiable in `heatmaps`.
    """
    losses = 0.5 * _squared_errors(heatmaps, targets, weights, "heatmap_ohkm").mean((2, 3))
    joints = losses.shape[1]
    valid = 1 <= hard_keypoints <= joints
    check(valid, "heatmap_ohkm", f"hard_keypoints must be 1..{joints}, the number of joints, got {hard_keypoints}")
    return losses.topk(hard_keypoints, dim=1).values.mean()


def supervised_loss(
    outputs: Sequence[Tensor], targets: Tensor, weights: Tensor, hard_keypoints: int | None = None
) -> Tensor:
    """The sum of the losses of all outputs of a network with intermediate supervision.

    Args:
        outputs: heatmaps (N, K, H, W), the final ones last.
        hard_keypoints: of ``heatmap_ohkm`` for the last output; None: ``heatmap_mse`` for all.
    Returns: scalar float32, differentiable in `outputs`.
    """
    *before, last = outputs
    final = (
        heatmap_mse(last, targets, weights)
        if hard_keypoints is None
        else heatmap_ohkm(last, targets, weights, hard_keypoints)
    )
    return sum((heatmap_mse(heatmaps, targets, weights) for heatmaps in before), final)


def _squared_errors(heatmaps: Tensor, targets: Tensor, weights: Tensor, where: str) -> Tensor:
    """(N, K, H, W) weighted squared differences in float32 at least. Raises: InputError on shapes that do not agree."""
    rule = f"targets must be {tuple(heatmaps.shape)}, got {tuple(targets.shape)}"
    check(heatmaps.shape == targets.shape, where, rule)
    shape = tuple(heatmaps.shape[:2])
    check(weights.shape == shape, where, f"weights must be {shape}, got {tuple(weights.shape)}")
    wide = heatmaps.to(torch.promote_types(heatmaps.dtype, torch.float32))
    return ((wide - targets) * weights[:, :, None, None]).square()
