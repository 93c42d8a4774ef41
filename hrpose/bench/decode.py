"""Rows of `ops.decode`: heatmaps and those of the mirrored image to keypoints in the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hrpose import geometry, ops
from hrpose.bench.case import LIBRARY, PYTORCH, REFERENCE, Case, Settings
from hrpose.bench.cuda_graph import enter_ours
from hrpose.bench.engines import COMPILE, compiled
from hrpose.bench.plan import Plan
from hrpose.skeleton import COCO17

BATCHES = (1, 16, 64, 256)
JOINTS, HEIGHT, WIDTH = 17, 64, 48
LIMIT = 1e-6  # of the largest coordinate: 3e-4 pixels; a quarter pixel is 8e-4 of it


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    if "fp32" not in dtypes:
        return
    for index, n in enumerate(batches or BATCHES):
        shape = f"{n}x{JOINTS}x{HEIGHT}x{WIDTH}, flip"
        yield Plan("decode", "decode", shape, "fp32", partial(decode_case, n), quick=index == 0)


def decode_case(n: int, settings: Settings) -> Case:
    generator = torch.Generator().manual_seed(n)
    heatmaps, flipped = torch.rand(2, n, JOINTS, HEIGHT, WIDTH, generator=generator).to(settings.device)
    boxes = torch.rand(n, 4, generator=generator) * 200 + 10
    transforms = geometry.heatmap_to_image(geometry.crop_transforms(boxes, (4 * WIDTH, 4 * HEIGHT)), 4)
    arrays = heatmaps.cpu().numpy(), flipped.cpu().numpy(), transforms.numpy()
    transforms = transforms.to(settings.device)

    def run(op) -> tuple[Tensor, Tensor]:
        return op(heatmaps, flipped, COCO17.flip_pairs, transforms=transforms)

    case = Case(decode_numpy(*arrays), LIMIT, nbytes=2 * heatmaps.nbytes)
    enter_ours(case, "hrpose", lambda: run(ops.decode), settings.device)
    fast = compiled(ops.decode_reference, settings.device, [heatmaps, flipped, transforms])
    case.invite(COMPILE, PYTORCH, lambda: lambda: run(fast))
    if settings.device.type == "cpu":
        case.enter("numpy, all persons at once", LIBRARY, lambda: decode_numpy(*arrays))
    case.enter("reference", REFERENCE, lambda: run(ops.decode_reference))
    return case


def decode_numpy(heatmaps: np.ndarray, flipped: np.ndarray, transforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HRNet's test-time steps without its loops over persons and joints: the same equations as `ops.decode`.

    Args: (N, 17, H, W) twice, (N, 2, 3) heatmap pixels -> image pixels.
    Returns: keypoints (N, 17, 2), scores (N, 17).
    """
    n, k, h, w = heatmaps.shape
    order = np.arange(k)
    for left, right in COCO17.flip_pairs:
        order[[left, right]] = right, left
    mirrored = flipped[:, order, :, ::-1]
    merged = np.empty_like(heatmaps)
    merged[..., 1:], merged[..., 0] = mirrored[..., :-1], mirrored[..., 0]
    merged += heatmaps
    merged *= 0.5
    maps = merged.reshape(n * k, -1)
    index, rows = maps.argmax(1), np.arange(n * k)
    score = maps[rows, index]
    x, y = index % w * (score > 0), index // w * (score > 0)
    inside = (x > 1) & (x < w - 1) & (y > 1) & (y < h - 1)
    at = np.where(inside, y * w + x, w + 1)
    dx = np.sign(maps[rows, at + 1] - maps[rows, at - 1]) * 0.25 * inside
    dy = np.sign(maps[rows, at + w] - maps[rows, at - w]) * 0.25 * inside
    points = np.stack([x + dx, y + dy, np.ones(n * k)], 1).reshape(n, k, 3)
    return points @ transforms.transpose(0, 2, 1), score.reshape(n, k)
