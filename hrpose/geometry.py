"""Boxes, crop transforms and points: the only crop arithmetic of the package.

Convention everywhere: pixel centres at integers, x to the right and y down; sizes are (width, height); a transform is a
2x3 matrix A that takes the point (x, y) to A @ (x, y, 1). All of it is float64: a crop in OpenCV-4 mode rounds to
1/1024 pixel, so float32 matrices would not reproduce it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrpose.errors import InputError, check, shown

PADDING = 1.25  # the margin around a person that SimpleBaseline, HRNet and DPN train with


def as_boxes(boxes: Any, where: str = "boxes") -> Tensor:
    """Boxes as a float64 tensor (N, 4) of x, y, width, height in image pixels; checked.

    Raises: InputError if the shape is wrong, a number is not finite, a side is negative or both sides are 0.
    """
    try:
        out = torch.as_tensor(boxes, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where}: must be (N, 4) numbers x, y, width, height, got {shown(boxes)}") from error
    out = out.reshape(0, 4) if out.numel() == 0 else out
    check(out.ndim == 2 and out.shape[1] == 4, where, f"must be (N, 4) x, y, width, height, got {tuple(out.shape)}")
    bad = ~(out.isfinite().all(1) & (out[:, 2:] >= 0).all(1) & (out[:, 2:] > 0).any(1))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise InputError(
            f"{where}: box {i} must be finite with width, height >= 0 and not both 0, got {out[i].tolist()}"
        )
    return out


def as_size(size: Any, where: str = "size") -> tuple[int, int]:
    """A (width, height) pair of positive integers; checked."""
    valid = isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, numbers.Real) for side in size)
    valid = valid and all(0 < side < 2**31 and side == int(side) for side in size)
    check(valid, where, f"must be two positive integers (width, height), got {shown(size)}")
    return int(size[0]), int(size[1])


def clip_box(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box as COCO training clips it to an image of `size`: corners within pixel centres 0..size-1.

    x1 = max(0, x), x2 = min(W - 1, x1 + max(0, w - 1)), y likewise; the result is (x1, y1, x2 - x1, y2 - y1), whose
    sides are negative when the box lies right of the image or below it. (What lies left of it or above is moved inside:
    that is how the published training sets were made.)
    """
    x1, y1 = max(0.0, box[0]), max(0.0, box[1])
    x2 = min(size[0] - 1, x1 + max(0.0, box[2] - 1))
    y2 = min(size[1] - 1, y1 + max(0.0, box[3] - 1))
    return x1, y1, x2 - x1, y2 - y1


def whole_image_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box of a whole image, from the first to the last pixel centre (at least one pixel wide)."""
    return 0.0, 0.0, float(max(size[0] - 1, 1)), float(max(size[1] - 1, 1))


def box_regions(boxes: Any, size: tuple[int, int], padding: float = PADDING) -> tuple[Tensor, Tensor]:
    """The regions that crops of `size` show: centres (N, 2) and extents (N, 2) in image pixels.

    The shorter side of each box grows to the aspect ratio of `size`, then both sides are multiplied by `padding`.
    """
    boxes, (width, height) = as_boxes(boxes), as_size(size)
    check(math.isfinite(padding) and padding > 0, "padding", f"must be finite and > 0, got {padding}")
    centers = boxes[:, :2] + boxes[:, 2:] * 0.5
    return centers, fit_aspect(boxes[:, 2:], width / height) * padding


def fit_aspect(extents: Tensor, aspect: float) -> Tensor:
    """Grow the shorter side of each (width, height) in `extents` (N, 2) until width / height = `aspect`."""
    w, h = extents[:, 0], extents[:, 1]
    return torch.stack([torch.maximum(w, h * aspect), torch.maximum(h, w / aspect)], 1)


def region_transform(center: Tensor, width_img: Tensor, angle_deg: Tensor, size: tuple[int, int]) -> Tensor:
    """Transforms (N, 2, 3) from image pixels to the pixels of a crop of `size` that shows regions of an image.

        dst = (w_out, h_out)/2 + (w_out / width_img) R(-angle) (src - center)
        R(r) = [[cos r, -sin r], [sin r, cos r]]

    Args: centres (N, 2) and widths (N,) of the regions in image pixels, rotations (N,) in degrees.
    """
    center, angle = center.double(), torch.deg2rad(angle_deg.double())
    scale = size[0] / width_img.double()
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    linear = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    middle = center.new_tensor([size[0] * 0.5, size[1] * 0.5])
    return torch.cat([linear, (middle - (linear @ center[:, :, None])[:, :, 0])[:, :, None]], 2)


def region_matrix(center: Sequence[float], width_img: float, angle_deg: float, size: tuple[int, int]) -> np.ndarray:
    """``region_transform`` of one region, in plain numbers: (2, 3) float64. A training sample needs one at a time, for
    which a dozen calls of torch take longer than the crop."""
    scale, angle = size[0] / width_img, math.radians(angle_deg)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    x, y = center
    return np.array([[cos, sin, size[0] * 0.5 - (cos * x + sin * y)], [-sin, cos, size[1] * 0.5 - (cos * y - sin * x)]])


def crop_transforms(boxes: Any, size: tuple[int, int], padding: float = PADDING) -> Tensor:
    """Transforms that crop persons for a network, as SimpleBaseline, HRNet and DPN do.

        dst = (w_in, h_in)/2 + s (src - c),   c = box centre,   s = w_in / (padding * max(w, h * w_in / h_in))

    Args:
        boxes:   (N, 4) x, y, width, height in image pixels.
        size:    (width, height) of the network's input.
        padding: how much larger than the box the region is.
    Returns: (N, 2, 3) float64, image pixels -> input pixels.
    Raises: InputError on a wrong shape, a non-finite number, a negative side or a box without extent.
    """
    centers, extents = box_regions(boxes, size, padding)
    return region_transform(centers, extents[:, 0], torch.zeros_like(extents[:, 0]), as_size(size))


def invert(transforms: Tensor) -> Tensor:
    """Inverses (..., 2, 3) of transforms (..., 2, 3), which must not flatten the plane: theirs are not finite."""
    (a, b, tx), (c, d, ty) = transforms[..., 0, :].unbind(-1), transforms[..., 1, :].unbind(-1)
    det = a * d - b * c
    rows = [d / det, -b / det, (b * ty - d * tx) / det, -c / det, a / det, (c * tx - a * ty) / det]
    return torch.stack(rows, -1).reshape(transforms.shape)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The transforms (..., 2, 3) that apply `inner` first, then `outer`."""
    linear = outer[..., :2] @ inner[..., :2]
    return torch.cat([linear, outer[..., :2] @ inner[..., 2:] + outer[..., 2:]], -1)


def apply(transforms: Tensor, points: Tensor) -> Tensor:
    """Points (..., M, 2) taken through transforms (..., 2, 3)."""
    return points @ transforms[..., :2].transpose(-1, -2) + transforms[..., None, :, 2]


def heatmap_to_image(transforms: Tensor, stride: float) -> Tensor:
    """Transforms (N, 2, 3) from heatmap pixels to image pixels, from those of image pixels to input pixels.

    A heatmap pixel x stands for the input pixel stride * x, as the published decoders have it.
    """
    inverse = invert(transforms)
    return torch.cat([inverse[..., :2] * stride, inverse[..., 2:]], -1)


def mirror(width: int) -> Tensor:
    """The transform (2, 3) of a mirror image of `width` pixels: x -> width - 1 - x."""
    return torch.tensor([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
