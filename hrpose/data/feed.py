"""From the data set to the training loop: batches cropped by the loading processes, or on the device that trains.

A CUDA card crops faster than processes do, and decoded pixels are fewer bytes to send than float crops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hrpose.data.appearance import show
from hrpose.data.dataset import Batches, PoseDataset, Sample
from hrpose.data.loading import load


def feed(
    data: PoseDataset,
    batches: Sampler[list[tuple[int, int]]],
    workers: int,
    device: torch.device,
    crop_on_device: bool | None = None,
) -> Iterator[Sample]:
    """The batches of samples that `batches` names, in its order.

    Args:
        workers:        processes that decode, and crop if the device does not; 0: this one.
        device:         where the network is.
        crop_on_device: None: where the device is a CUDA card. The samples are the same either way.
    """
    on_device = device.type == "cuda" if crop_on_device is None else crop_on_device
    options = {"sampler": batches, "batch_size": None, "pin_memory": device.type == "cuda"}
    if not on_device:
        yield from load(Batches(data), workers, **options)
        return
    for pixels in load(PixelBatches(data), workers, **options):
        yield crop_batch(pixels, data.size, device)


class PixelBatch(NamedTuple):
    """A batch before it is cropped.

    pixels: (B,) uint8, the (h, w, 3) images one after another. sizes: (N, 2) their h, w. transforms: (N, 2, 3) float64,
    image px -> input px. factors (N, 3) float64, holes (N, 4): of ``View``. The rest as in ``Sample``.
    """

    pixels: Tensor
    sizes: Tensor
    transforms: Tensor
    factors: Tensor
    holes: Tensor
    joints: Tensor
    visible: Tensor
    person: Tensor


class PixelBatches(Dataset[PixelBatch]):
    """Decoded batches of `data`; keys are lists of (epoch, index), as for ``Batches``."""

    def __init__(self, data: PoseDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> PixelBatch:
        images, views, persons = zip(*(self.data.shot(key) for key in keys), strict=True)
        return PixelBatch(
            torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])),
            torch.tensor([image.shape[:2] for image in images]),
            torch.stack([view.transform for view in views]),
            torch.tensor([view.factors for view in views], dtype=torch.float64),
            torch.tensor([view.hole for view in views]),
            torch.stack([view.joints for view in views]).float(),
            torch.stack([view.visible for view in views]).float(),
            torch.tensor(persons),
        )


def crop_batch(batch: PixelBatch, size: tuple[int, int], device: torch.device) -> Sample:
    """The samples of a decoded batch, cropped on `device`; `person` stays where it was."""
    pixels, transforms, joints, visible = (
        tensor.to(device, non_blocking=True) for tensor in (batch.pixels, batch.transforms, batch.joints, batch.visible)
    )
    images = torch.empty(len(transforms), 3, size[1], size[0], device=device)
    sizes = batch.sizes.tolist()
    parts = pixels.split([3 * height * width for height, width in sizes])
    drawn = zip(parts, sizes, transforms, batch.factors.tolist(), batch.holes.tolist(), images, strict=True)
    for part, (height, width), transform, factors, hole, out in drawn:
        show(part.view(height, width, 3), transform, size, factors, hole, out)
    return Sample(images, joints, visible, batch.person)
