"""The part of a picture that a person's views can show, and a file of such parts that many processes read at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Window(NamedTuple):
    """A part of a picture: image (h, w, 3) uint8 RGB, at left, top in the picture, which is image_width pixels wide."""

    image: np.ndarray
    left: int
    top: int
    image_width: int


class WindowFile:
    """Windows one after another in a file, mapped into memory: what was read once comes from the system's page cache,
    which worker processes and other runs share.

    Args:
        path:  of the pixels.
        index: (P, 6) int64 per person: offset in the file, left, top, width, height, image_width; offset -1 for a
               person who is not in the file.
    """

    def __init__(self, path: Path, index: np.ndarray) -> None:
        self.path, self.index = path, index
        self._pixels: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pixels": None}  # a process maps the file for itself; pickled it would be copied

    def __len__(self) -> int:
        """How many persons are in the file."""
        return int(np.count_nonzero(self.index[:, 0] >= 0))

    def window(self, person: int) -> Window | None:
        offset, left, top, width, height, image_width = self.index[person].tolist()
        if offset < 0:
            return None
        if self._pixels is None:
            self._pixels = np.asarray(np.memmap(self.path, np.uint8, "r"))
        pixels = self._pixels[offset : offset + 3 * width * height]
        return Window(pixels.reshape(height, width, 3), left, top, image_width)
