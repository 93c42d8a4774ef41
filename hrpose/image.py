"""Reading image files: any format Pillow knows in, (H, W, 3) uint8 RGB out, or an error that names the file."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hrpose.errors import InputError, check
from hrpose.pillow_memory import borrow_rgb

# Pillow's own limit, at which it refuses a file as a decompression bomb; 179 MP are 540 MB of memory.
MAX_PIXELS = 178_956_970


def read_image(
    path: str | Path,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
    part: Callable[[int, int], tuple[int, int, int, int]] | None = None,
    contiguous: bool = True,
) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB; of an animation the first picture.

    Args:
        path:       the file.
        exif:       turn the picture upright as its EXIF orientation says. Off for annotated data sets: their
                    coordinates refer to the stored pixels.
        max_pixels: refuse larger images. For more than the default, PIL.Image.MAX_IMAGE_PIXELS must be raised too.
        part:       given the picture's width and height, what to return of it: left, top, right, bottom within it, the
                    last two excluded. None: all.
        contiguous: False allows for a read-only view with bytes between pixels and rows, where that saves copying.
    Other modes are converted as ``to_rgb`` says. Safe to call from several threads.
    Raises: InputError naming the file and what is wrong with it.
    """
    where = f"image {path}"
    try:
        with _pillow_is_quiet, Image.open(path) as image:
            # Pillow would hand such a file to Ghostscript, an interpreter of programs.
            check(image.format != "EPS", where, "is PostScript, which is not read")
            size = f"{image.width}x{image.height}"
            check(image.width * image.height <= max_pixels, where, f"must have at most {max_pixels} pixels, has {size}")
            image.load()
            if exif:
                image = ImageOps.exif_transpose(image)
            if part is None:
                return to_rgb(image, where, contiguous)
            left, top, right, bottom = part(*image.size)
            if contiguous and image.mode == "RGB" and "transparency" not in image.info:
                return to_rgb(image.crop((left, top, right, bottom)), where)  # what is cut off need not be copied
            rgb = to_rgb(image, where, contiguous)[top:bottom, left:right]
            return np.ascontiguousarray(rgb) if contiguous else rgb
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{where}: is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS} pixels, twice PIL.Image.MAX_IMAGE_PIXELS"
        raise InputError(f"{where}: must have at most {limit}") from None
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files (OSError, SyntaxError, ...)
        if isinstance(error, OSError) and error.filename is not None:  # from opening the file, not from decoding it
            raise InputError(f"{where}: cannot be read ({error.strerror})") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: is damaged or not supported ({reason})") from error


def to_rgb(image: Image.Image, where: str = "image", contiguous: bool = True) -> np.ndarray:
    """A Pillow image of any mode as (H, W, 3) uint8 RGB.

    Transparency is laid over black. 16-bit grey is divided by 257. Grey of 32 bits and of floats does not say what
    white is, so it is taken from the pixels: 1 for floats within 0..1, else 255 or 65535, whichever they stay below;
    what fits none of these is stretched from its lowest to its highest value. `contiguous` is that of ``read_image``;
    a view is of the image's own memory.
    Raises: InputError for an empty image, pixels that are not finite and modes that have no RGB.
    """
    check(min(image.size) > 0, where, f"must have at least one pixel, has {image.width}x{image.height}")
    if image.mode.startswith("I") or image.mode == "F":  # convert("RGB") would clip these to white
        grey = np.asarray(image).astype(np.float64)
        check(bool(np.isfinite(grey).all()), where, "pixels must be finite numbers")
        low, high = grey.min(initial=0), grey.max(initial=0)
        whites = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((white for white in whites if low >= 0 and high <= white), None)
        grey = grey * (255 / white) if white else (grey - low) * (255 / (high - low))
        return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, 2)
    try:
        if image.mode in ("La", "RGBa"):  # premultiplied: colour times opacity is colour over black
            image = Image.merge(image.mode[:-1], image.split()[:-1])
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        lent = None if contiguous else borrow_rgb(image)
        return np.ascontiguousarray(image) if lent is None else lent
    except ValueError as error:
        raise InputError(f"{where}: cannot be converted from {image.mode} to RGB ({error})") from error


def as_image(image: Any, where: str = "image") -> np.ndarray:
    """An (H, W, 3) uint8 RGB array from a path, a Pillow image, an array or a tensor.

    Files and Pillow images are turned upright by their EXIF orientation. The array may be a view of the image's memory,
    with bytes between pixels. Raises: InputError.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, contiguous=False)
    try:
        if isinstance(image, Image.Image):
            return to_rgb(ImageOps.exif_transpose(image), where, contiguous=False)
        pixels = np.asarray(image)
    except InputError:
        raise
    except Exception as error:  # truncated files, ragged lists, tensors on a GPU or with a gradient: each has its type
        raise InputError(f"{where}: must be a readable Pillow image or an array ({error})") from error
    if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8 and pixels.size:
        return pixels
    if pixels.dtype == object or pixels.ndim == 0:
        raise InputError(f"{where}: must be a path, a Pillow image or an array, got {type(image).__name__}")
    raise InputError(f"{where}: must be (H, W, 3) uint8 RGB, got {pixels.shape} {pixels.dtype}")


class _PillowIsQuiet:
    """Keeps Pillow's warnings (large files, odd metadata) from being printed while any thread is inside.

    ``warnings.catch_warnings`` alone would not do: of two threads that overlap, the second saves the filters of the
    first and in the end leaves them in place for the whole process.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._caught: warnings.catch_warnings | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")

    def __exit__(self, *exception: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(*exception)


_pillow_is_quiet = _PillowIsQuiet()
