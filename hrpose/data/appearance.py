"""What augmentation does to the pixels of a crop: colours before they are normalised, cutout after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hrpose import ops

# ImageNet's statistics of RGB in 0..1, which every published pose network is trained with
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

PLAIN = (1.0, 1.0, 1.0)  # factors that change no colour
_LUMA = (0.2989, 0.587, 0.114)  # of R, G, B in grey, as torchvision has it
_GREY_STEPS = 256  # per grey level: the mean is taken of whole numbers, whose sum is the same in any order


def show(
    image: Tensor | np.ndarray,
    transform: Tensor,
    size: tuple[int, int],
    factors: Sequence[float] = PLAIN,
    hole: Sequence[int] = (0, 0, 0, 0),
    out: Tensor | None = None,
) -> Tensor:
    """The network's input that a ``View`` of an image describes.

    Args:
        image:     (H, W, 3) uint8 RGB. transform: (2, 3), image px -> input px, on the same device.
        factors, hole: as in ``View``.
        out:       (3, height, width) float32, where to write it: its place in a batch.
    Returns: (3, height, width) float32 normalised RGB, on the device of the image; `out` where given.
    """
    transforms, out = transform[None], None if out is None else out[None]
    if tuple(factors) == PLAIN:
        shown = ops.crop(image, transforms, size, mean=MEAN, std=STD, out=out)[0]
    else:
        shown = ops.crop(image, transforms, size, out=out)[0]
        mean, std = shown.new_tensor(MEAN)[:, None, None], shown.new_tensor(STD)[:, None, None]
        shown.copy_(change_colors(shown, *factors).div_(255).sub_(mean).div_(std))
    left, top, right, bottom = hole
    if left < right and top < bottom:
        shown[:, top:bottom, left:right] = 0
    return shown


def change_colors(rgb: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """RGB (3, H, W) of 0..255 with each of three factors applied in turn, clipped to 0..255 after each.

        brightness b: b v;   contrast c: c v + (1 - c) mean of grey;   saturation s: s v + (1 - s) grey

    as torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation`` have it, the mean rounded to
    1/256 of a level. A factor of 1 changes nothing.
    """
    if brightness != 1:
        rgb = (rgb * brightness).clamp(0, 255)
    if contrast != 1:
        levels = (_grey(rgb) * _GREY_STEPS).round().long()
        mean = levels.sum() / (_GREY_STEPS * levels.numel())
        rgb = (contrast * rgb + (1 - contrast) * mean).clamp(0, 255)
    if saturation != 1:
        rgb = (saturation * rgb + (1 - saturation) * _grey(rgb)).clamp(0, 255)
    return rgb


def _grey(rgb: Tensor) -> Tensor:
    return _LUMA[0] * rgb[0] + _LUMA[1] * rgb[1] + _LUMA[2] * rgb[2]
