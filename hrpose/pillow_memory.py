"""The pixels of a Pillow image where Pillow keeps them, without a copy.

Pillow lends its memory through the Arrow C data interface (from 11.2 on, pictures of up to 16 MB as its memory comes by
default). Arrow itself is not needed: of the structure that is lent two fields are read.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from PIL import Image

PIXEL = 4  # bytes that Pillow keeps for an RGB pixel, the last one unused


class _ArrowArray(ctypes.Structure):
    """https://arrow.apache.org/docs/format/CDataInterface.html, up to the last field that is needed."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def borrow_rgb(image: Image.Image) -> np.ndarray | None:
    """(H, W, 3) uint8, read-only, a view of a loaded image of mode RGB; its pixels are four bytes apart. None if this
    Pillow, or this image's memory, does not lend.

    The memory lives as long as the array does. Whoever writes to the image afterwards writes to the array.
    """
    if image.mode != "RGB" or min(image.size) < 1 or not hasattr(image, "__arrow_c_array__"):
        return None
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # more than one block of memory
        return None
    pixels = _ArrowArray.from_address(_pointer_of(capsule, b"arrow_array"))  # a list of PIXEL numbers each
    numbers = pixels.children[0][0] if pixels.n_children == 1 else None
    if numbers is None or pixels.length != image.width * image.height or numbers.length != PIXEL * pixels.length:
        return None
    start = numbers.buffers[1] + PIXEL * pixels.offset + numbers.offset
    return np.asarray(_Lent(start, (image.height, image.width, PIXEL), capsule))[:, :, :3]


class _Lent:
    """Memory of bytes as NumPy asks for it. `owner` keeps it: an array holds on to the object it was made of."""

    def __init__(self, start: int, shape: tuple[int, ...], owner: Any) -> None:
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": shape, "data": (start, True)}
        self.owner = owner
