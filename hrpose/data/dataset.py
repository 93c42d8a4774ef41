"""Persons and images to training samples, in an order and with draws that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hrpose.data.appearance import show
from hrpose.data.augment import Augmentation, View, plain_view, random_view, reach
from hrpose.data.coco import Person
from hrpose.data.window import Window, WindowFile
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


class Shot(NamedTuple):
    """What a sample is made of. image: (h, w, 3) uint8 RGB, the part of the picture that the person's views can show.
    view: of that part, so its transform starts from the part's pixels. person: position in the data set's list."""

    image: np.ndarray
    view: View
    person: int


def load_image(
    person: Person,
    folder: str | Path,
    part: Callable[[int, int], tuple[int, int, int, int]] | None = None,
    contiguous: bool = True,
) -> np.ndarray:
    """The image of a person, (H, W, 3) uint8 RGB, as stored: annotations do not know of its EXIF orientation.
    `part` and `contiguous` are those of ``read_image``.

    Raises: InputError if it cannot be read or has another size than the annotation file states, since then the boxes
        and joints lie elsewhere.
    """
    path = Path(folder) / person.file_name

    def checked(width: int, height: int) -> tuple[int, int, int, int]:
        if person.image_size not in (None, (width, height)):
            stated = "{}x{}".format(*person.image_size)
            raise InputError(f"image {path}: must be {stated}, as its annotations state, is {width}x{height}")
        return part(width, height) if part else (0, 0, width, height)

    return read_image(path, exif=False, part=checked, contiguous=contiguous)


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
    `windows`, if set, holds pixels that were decoded before (``cache_pixels``), which changes nothing either.
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
        centers, extents = box_regions([p.box for p in persons], self.size, padding)
        self.windows: WindowFile | None = None
        self._centers, self._extents = centers.numpy(), extents.numpy()

    def __len__(self) -> int:
        return len(self.persons)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.sample(key)

    def sample(self, key: tuple[int, int], out: Tensor | None = None) -> Sample:
        """Sample `key`; its image is written to `out`, (3, H, W) float32, where given."""
        image, view, index = self.shot(key)
        shown = show(image, view.transform, self.size, view.factors, view.hole, out)
        return Sample(shown, view.joints.float(), view.visible.float(), torch.tensor(index))

    def shot(self, key: tuple[int, int]) -> Shot:
        """What sample `key` is made of, before its image is cropped and its colours are changed."""
        # A plain index, which PyTorch's own samplers give, would repeat the same augmentation in every epoch.
        valid = isinstance(key, tuple) and len(key) == 2
        check(valid, "PoseDataset", f"key must be (epoch, index), as EpochBatches gives, got {key!r}")
        epoch, index = key
        region, joints, visible = self._person(index)
        window = self.window(index)
        if self.augmentation is None:
            view = plain_view(region, joints, visible, self.size)
        else:
            rng = np.random.default_rng((self.seed, epoch, index))
            width, skeleton = window.image_width, self.skeleton
            view = random_view(region, joints, visible, width, self.size, skeleton, self.augmentation, rng)
        transform = view.transform.numpy()
        transform[:, 2] += transform[:, :2] @ np.array([window.left, window.top], np.float64)
        return Shot(window.image, view, index)

    def window(self, index: int) -> Window:
        """The part of a person's image that their views can show. Less is converted than the whole, less is kept."""
        kept = None if self.windows is None else self.windows.window(index)
        if kept is not None:
            return kept
        found: list[int] = []

        def part(width: int, height: int) -> tuple[int, int, int, int]:
            box = self._reached(index, width, height)
            found[:] = box[0], box[1], width
            return box

        return Window(load_image(self.persons[index], self.folder, part, contiguous=False), *found)

    def cut(self, index: int, image: np.ndarray) -> Window:
        """``window`` of a person whose whole image is at hand."""
        height, width = image.shape[:2]
        left, top, right, bottom = self._reached(index, width, height)
        return Window(image[top:bottom, left:right], left, top, width)

    def _reached(self, index: int, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the pixels, of an image of this size, that a person's views are made of."""
        left, top, right, bottom = reach(*self._person(index), self.size, self.skeleton, self.augmentation)
        (x0, x1), (y0, y1) = _within(left, right, width), _within(top, bottom, height)
        return x0, y0, x1, y1

    def _person(self, index: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
        """Region, joints (K, 2) and visibility (K,) of a person."""
        person, k = self.persons[index], self.skeleton.num_joints
        valid = len(person.joints) == k and len(person.visible) == k
        check(valid, f"annotation {person.annotation_id}", f"must have {k} joints, has {len(person.joints)}")
        return (
            (self._centers[index], self._extents[index]),
            np.array(person.joints, np.float64),
            np.array(person.visible),
        )


def _within(low: float, high: float, length: int) -> tuple[int, int]:
    """The pixels of 0..length - 1 that a span of points is interpolated from, as first and last + 1; one at least."""
    first = min(max(math.floor(low) - 1, 0), length - 1)
    return first, max(min(math.ceil(high) + 2, length), first + 1)


class Batches(Dataset[Sample]):
    """The same samples in batches; keys are lists of (epoch, index), what ``EpochBatches`` gives. Each crop is written
    to its place in the batch, where ``collate`` would copy it to."""

    def __init__(self, data: PoseDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> Sample:
        size = self.data.size
        images = torch.empty(len(keys), 3, size[1], size[0])
        samples = [self.data.sample(key, out) for key, out in zip(keys, images, strict=True)]
        _, *rest = zip(*samples, strict=True)
        return Sample(images, *map(torch.stack, rest))


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
