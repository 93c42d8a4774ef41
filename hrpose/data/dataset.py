"""Persons and images to training samples, in an order and with draws that depend on (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hrpose.data.appearance import show
from hrpose.data.augment import Augmentation, plain_view, random_view
from hrpose.data.coco import Person
from hrpose.errors import InputError, check
from hrpose.geometry import PADDING, as_size, box_regions
from hrpose.image import read_image
from hrpose.skeleton import Skeleton


class Sample(NamedTuple):
    """image: (3, H, W) float32 normalised RGB. joints: (K, 2) x, y in input pixels. visible: (K,) 0 or 1.
    person: position in the data set's list. In a batch all have a leading dimension N."""

    image: Tensor
    joints: Tensor
    visible: Tensor
    person: Tensor


def load_image(person: Person, folder: str | Path) -> np.ndarray:
    """The image of a person, (H, W, 3) uint8 RGB, as stored: annotations do not know of its EXIF orientation.

    Raises: InputError if it cannot be read or has another size than the annotation file states, since then the boxes
        and joints lie elsewhere.
    """
    path = Path(folder) / person.file_name
    image = read_image(path, exif=False)
    found = image.shape[1], image.shape[0]
    if person.image_size not in (None, found):
        stated = "{}x{}".format(*person.image_size)
        raise InputError(f"image {path}: must be {stated}, as its annotations state, is {found[0]}x{found[1]}")
    return image


class PoseDataset(Dataset[Sample]):
    """Persons of an annotation file as training samples; keys are (epoch, index), see ``EpochBatches``.

    Args:
        persons:      who to show (``load_annotations(...).persons``).
        folder:       where their images are.
        size:         (width, height) of the crops.
        skeleton:     of the joints.
        augmentation: None for plain crops.
        seed:         of all random draws, >= 0. Sample (epoch, index) draws from a generator seeded with (seed, epoch,
                      index), so the number of worker processes and the order of loading change nothing.
    Raises: InputError for a size or seed out of range; when a sample is taken, for a key that is no such pair, a person
        of another number of joints, or an image that is missing, damaged or of another size than the file states.
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
        check(isinstance(seed, int) and seed >= 0, "PoseDataset", f"seed must be an integer >= 0, got {seed!r}")
        self.persons, self.folder, self.skeleton = persons, Path(folder), skeleton
        self.size = as_size(size, "PoseDataset: size")
        self.augmentation, self.seed, self.padding = augmentation, seed, padding

    def __len__(self) -> int:
        return len(self.persons)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        # A plain index, which PyTorch's own samplers give, would repeat the same augmentation in every epoch.
        valid = isinstance(key, tuple) and len(key) == 2
        check(valid, "PoseDataset", f"key must be (epoch, index), as EpochBatches gives, got {key!r}")
        epoch, index = key
        person, k = self.persons[index], self.skeleton.num_joints
        valid = len(person.joints) == k and len(person.visible) == k
        check(valid, f"annotation {person.annotation_id}", f"must have {k} joints, has {len(person.joints)}")
        image = load_image(person, self.folder)
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
        crop = show(image, view.transform, self.size, view.factors, view.hole)
        return Sample(crop, view.joints.float(), view.visible.float(), torch.tensor(index))


def collate(samples: Sequence[Sample]) -> Sample:
    """A batch: every field stacked."""
    return Sample(*(torch.stack(field) for field in zip(*samples, strict=True)))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one epoch as lists of (epoch, index): a pure function of its arguments, so that a run that stopped
    within an epoch goes on at `first_batch` with the very batches it would have seen.

    The last batch is left out if it is not full, unless there is no other: batch norm needs batches of like size.
    Of several processes, each takes every `world`-th sample of each batch, from its `rank` on: together the same batch.
    Raises: InputError if there is nothing to make a batch of, or `first_batch` lies beyond the epoch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        epoch: int,
        first_batch: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        where = "EpochBatches"
        check(count > 0, where, f"count must be > 0, got {count}")
        check(batch_size > 0, where, f"batch_size must be > 0, got {batch_size}")
        check(seed >= 0 and epoch >= 0, where, f"seed and epoch must be >= 0, got {seed} and {epoch}")
        batches = count // min(batch_size, count)
        check(0 <= first_batch <= batches, where, f"first_batch must be 0..{batches}, got {first_batch}")
        check(0 <= rank < world, where, f"rank must be 0..{world - 1}, got {rank}")
        self.epoch, self.batch_size, self.first_batch = epoch, min(batch_size, count), first_batch
        self.rank, self.world = rank, world
        self.order = np.random.default_rng((seed, epoch)).permutation(count)

    def __len__(self) -> int:
        return len(self.order) // self.batch_size - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.first_batch, len(self.order) // self.batch_size):
            start = batch * self.batch_size
            share = self.order[start : start + self.batch_size][self.rank :: self.world]
            yield [(self.epoch, int(i)) for i in share]
