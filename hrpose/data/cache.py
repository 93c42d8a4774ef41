"""A cache of decoded persons: made once before training, so that no epoch has to decode a JPEG again.

It holds whole pixels, cut and never scaled, so a sample is the same to the bit with it and without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from hrpose.data.dataset import PoseDataset, load_image
from hrpose.data.loading import dead_worker_as_input_error, load
from hrpose.data.window import WindowFile
from hrpose.errors import InputError, check
from hrpose.files import write_atomically

VERSION = 1  # raise when the same data make another file
_ABANDONED_AFTER = 3600  # seconds without a write: the process that made a part is gone


def cache_pixels(
    data: PoseDataset,
    folder: str | Path,
    workers: int = 0,
    limit: int | None = None,
    report: Callable[[str], Any] = lambda line: None,
) -> None:
    """Let `data` take its pixels from a file in `folder`, which is made if it is not there yet.

    The file's name is a digest of what decides on its content: image files by name, size and time of change, persons,
    reach of the augmentation. So a file that is stale is never used; it stays until somebody deletes it. A file that is
    not whole has another name.

    Args:
        limit: bytes; persons who come after it is reached are decoded each time, as without a cache. None: no limit.
    Raises: InputError for an image that cannot be read, or if the file cannot be written.
    """
    folder, started = Path(folder), time.monotonic()
    pixels = folder / f"{_key(data, limit)}.pixels"
    kept = _existing(pixels, len(data))
    how = "found"
    if kept is None:
        report(f"cache: decoding {len(data)} persons into {folder}")
        kept = WindowFile(pixels, _write(data, pixels, workers, limit))
        how = f"made in {time.monotonic() - started:.0f} s"
    report(f"cache: {len(kept)} of {len(data)} persons, {pixels.stat().st_size / 1e9:.2f} GB, {how}")
    data.windows = kept


def _key(data: PoseDataset, limit: int | None) -> str:
    augmentation = data.augmentation
    reach = augmentation and (
        augmentation.scale,
        augmentation.rotation_deg * augmentation.rotation_probability > 0,
        augmentation.half_body_probability > 0,
        augmentation.half_body_min_joints,
    )
    state = hashlib.sha256(repr((VERSION, data.size[0] / data.size[1], data.padding, reach, limit)).encode())
    state.update(repr(data.skeleton.lower_body).encode())
    for person in data.persons:
        known = person.file_name, person.box, person.joints, person.visible, person.image_size
        state.update(repr(known).encode())
    for name in sorted({person.file_name for person in data.persons}):
        path = data.folder / name
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"image {path}: cannot be read ({error.strerror})") from None
        state.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    return state.hexdigest()[:24]


def _existing(pixels: Path, persons: int) -> WindowFile | None:
    """The file if it is whole: its index is written last, and tells its size."""
    try:
        index = np.load(pixels.with_suffix(".npy"), allow_pickle=False)
        size = pixels.stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    whole = index.shape == (persons, 6) and size == 3 * int((index[:, 3] * index[:, 4]).sum())
    return WindowFile(pixels, index) if whole else None


def _write(data: PoseDataset, pixels: Path, workers: int, limit: int | None) -> np.ndarray:
    """Write the pixels, then the index; returns the index."""
    check(limit is None or limit > 0, "cache", f"limit must be > 0, got {limit}")
    index = np.zeros((len(data), 6), np.int64)
    index[:, 0] = -1
    beside = pixels.with_name(f".{pixels.name}.{os.getpid()}.part")
    end = 0
    loaded = load(_Pictures(data), workers, batch_size=None)
    try:
        pixels.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(pixels.parent)
        with (
            open(beside, "wb") as file,
            tqdm(total=len(data), desc="cache", unit="person", leave=False, disable=None) as bar,
            dead_worker_as_input_error(),
        ):
            for persons, windows in loaded:
                bar.update(len(persons))
                for person, (image, *place) in zip(persons, windows, strict=True):
                    if limit is not None and end + image.size > limit:
                        continue
                    file.write(np.ascontiguousarray(image).data)
                    height, width = image.shape[:2]
                    left, top, image_width = place
                    index[person] = end, left, top, width, height, image_width
                    end += image.size
            file.flush()
            os.fsync(file.fileno())  # the index must not outlive a power cut that the pixels do not
        os.replace(beside, pixels)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            advice = f"{end / 1e9:.2f} GB were written; with a limit the rest is decoded each time"
            raise InputError(f"cache {pixels}: cannot be written ({error.strerror or error}); {advice}") from error
        raise
    content = io.BytesIO()
    np.save(content, index)
    write_atomically(pixels.with_suffix(".npy"), content.getvalue())
    return index


def _remove_abandoned(folder: Path) -> None:
    for part in folder.glob(".*.pixels.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED_AFTER:
                part.unlink()


class _Pictures(Dataset[tuple[list[int], list[Any]]]):
    """Per picture: the indices of its persons and their windows; each picture is decoded once."""

    def __init__(self, data: PoseDataset) -> None:
        groups: dict[str, list[int]] = {}
        for index, person in enumerate(data.persons):
            groups.setdefault(person.file_name, []).append(index)
        self.data, self.groups = data, list(groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, position: int) -> tuple[list[int], list[Any]]:
        persons = self.groups[position]
        image = load_image(self.data.persons[persons[0]], self.data.folder)
        return persons, [self.data.cut(person, image) for person in persons]
