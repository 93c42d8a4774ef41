"""Reading image files: any format Pillow knows in, (H, W, 3) uint8 RGB out, or an error that names the file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hrpose.errors import InputError

MAX_PIXELS = 200_000_000  # above this a file is refused before it is decoded: 200 MP are 600 MB of memory


def read_image(path: str | Path, exif: bool = True, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB.

    Args:
        path:       the file.
        exif:       turn the picture upright as its EXIF orientation says. Off for annotated data sets: their coordinates
                    refer to the stored pixels.
        max_pixels: refuse larger images.
    Grey, palette, CMYK and 16-bit images are converted (16-bit by dividing by 257, not by clipping); transparency is laid
    over black. Raises: InputError naming the file and what is wrong with it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: max_pixels decides here
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width}x{image.height}"
                    raise InputError(f"image {path}: must have at most {max_pixels} pixels, has {size}")
                image.load()
                if exif:
                    image = ImageOps.exif_transpose(image)
                return to_rgb(image)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"image {path}: is a folder, not an image file") from None
    except PermissionError:
        raise InputError(f"image {path}: may not be read (permission denied)") from None
    except UnidentifiedImageError:
        raise InputError(f"image {path}: is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise InputError(f"image {path}: must have at most {max_pixels} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files (OSError, SyntaxError, ...)
        raise InputError(f"image {path}: is damaged or not supported ({error})") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image as (H, W, 3) uint8 RGB."""
    if image.mode.startswith("I") or image.mode == "F":  # 16- and 32-bit grey: convert("RGB") would clip it to white
        grey = np.asarray(image).astype(np.float64)
        if not np.isfinite(grey).all():
            raise InputError("image: pixels must be finite numbers")
        low, high = grey.min(initial=0), grey.max(initial=0)
        full = 255.0 if high <= 255 and low >= 0 else 65535.0 if high <= 65535 and low >= 0 else None
        grey = grey * (255 / full) if full else (grey - low) * (255 / (high - low))
        return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, 2)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.ascontiguousarray(image.convert("RGB"))


def as_image(image: Any, where: str = "image") -> np.ndarray:
    """An (H, W, 3) uint8 RGB array from a path, a Pillow image, an array or a tensor.

    Files and Pillow images are turned upright by their EXIF orientation. Raises: InputError.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8 and pixels.size:
        return pixels
    if pixels.dtype == object or pixels.ndim == 0:
        raise InputError(f"{where}: must be a path, a Pillow image or an array, got {type(image).__name__}")
    raise InputError(f"{where}: must be (H, W, 3) uint8 RGB, got {pixels.shape} {pixels.dtype}")
