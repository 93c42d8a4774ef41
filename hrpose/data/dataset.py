"""Persons and images to training samples, in an order and with draws that depend on (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hrpose import ops
from hrpose.data.augment import Augmentation, plain_view, random_view
from hrpose.data.coco import Person
from hrpose.geometry import PADDING, box_regions
from hrpose.image import read_image
from hrpose.skeleton import Skeleton

# ImageNet's statistics of RGB in 0..1, which every published pose network is trained with
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Sample(NamedTuple):
    """image: (3, H, W) float32 normalised RGB. joints: (K, 2) x, y in input pixels. visible: (K,) 0 or 1.
    person: position in the data set's list. In a batch all have a leading dimension N."""

    image: Tensor
    joints: Tensor
    visible: Tensor
    person: Tensor


class PoseDataset(Dataset[Sample]):
    """Persons of an annotation file as training samples; keys are (epoch, index), see ``EpochBatches``.

    Args:
        persons:      who to show (``load_annotations(...).persons``).
        folder:       where their images are.
        size:         (width, height) of the crops.
        skeleton:     of the joints.
        augmentation: None for plain crops.
        seed:         of all random draws. Sample (epoch, index) draws from a generator seeded with (seed, epoch, index),
                      so the number of worker processes and the order of loading change nothing.
    """

    def __init__(
        self,
        persons: Sequence[Person],
        folder: str | Path,
        size: tuple[int, int],
        skeleton: Skeleton,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        padding: float = PADDING,
    ) -> None:
        self.persons, self.folder, self.size, self.skeleton = persons, Path(folder), size, skeleton
        self.augmentation, self.seed, self.padding = augmentation, seed, padding

    def __len__(self) -> int:
        return len(self.persons)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        person = self.persons[index]
        image = read_image(self.folder / person.file_name, exif=False)  # annotations refer to the stored pixels
        centers, extents = box_regions([person.box], self.size, self.padding)
        region = centers[0], extents[0]
        joints = torch.tensor(person.joints, dtype=torch.float64)
        visible = torch.tensor(person.visible)
        if self.augmentation is None:
            view = plain_view(region, joints, visible, self.size)
        else:
            rng = np.random.default_rng((self.seed, epoch, index))
            view = random_view(
                region, joints, visible, image.shape[1], self.size, self.skeleton, self.augmentation, rng
            )
        crop = ops.crop(image, view.transform[None], self.size, mean=MEAN, std=STD)[0]
        return Sample(crop, view.joints.float(), view.visible.float(), torch.tensor(index))


def collate(samples: Sequence[Sample]) -> Sample:
    """A batch: every field stacked."""
    return Sample(*(torch.stack(field) for field in zip(*samples, strict=True)))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one epoch as lists of (epoch, index): a pure function of its arguments, so that a run that stopped
    within an epoch goes on at `first_batch` with the very batches it would have seen.

    The last batch is left out if it is not full, unless there is no other: batch norm needs batches of like size.
    """

    def __init__(self, count: int, batch_size: int, seed: int, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.batch_size, self.first_batch = epoch, min(batch_size, count), first_batch
        self.order = np.random.default_rng((seed, epoch)).permutation(count)

    def __len__(self) -> int:
        return len(self.order) // self.batch_size - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.first_batch, len(self.order) // self.batch_size):
            start = batch * self.batch_size
            yield [(self.epoch, int(i)) for i in self.order[start : start + self.batch_size]]
