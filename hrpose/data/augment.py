"""Training augmentation: random half body, scale, rotation and mirroring of the region that is cropped; then colours
and cutout, which are off by default.

The first four are folded into one transform, so the image is sampled once. Their order, probabilities and draws are
those of HRNet's training code: half body, scale, rotation, flip. What colours and cutout do to the pixels is in
``appearance``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrpose.errors import check
from hrpose.geometry import region_matrix
from hrpose.skeleton import Skeleton

HALF_BODY_PADDING = 1.5  # in place of the 1.25 around a whole person
_LATER = ("cutout", "brightness", "contrast", "saturation")  # fields that the first checkpoints do not know


@dataclass(frozen=True)
class Augmentation:
    """Strength of each step; the defaults are DPN's (scale +-30 %, rotation +-40 degrees, flip, half body).

    scale:                 standard deviation, and limit, of the scale factor around 1.
    rotation_deg:          standard deviation of the angle, whose limit is twice that.
    rotation_probability, flip_probability, half_body_probability: how often the step happens.
    half_body_min_joints:  a half body is shown only of persons with more visible joints than this.
    cutout:                side of the square that is blanked, as a share of the input's height; 0: off. RAM + GPR
                           trains with it, without a word on its size.
    brightness, contrast, saturation: each factor is uniform in 1 - v .. 1 + v; 0: off.
    """

    scale: float = 0.30
    rotation_deg: float = 40.0
    rotation_probability: float = 0.6
    flip_probability: float = 0.5
    half_body_probability: float = 0.3
    half_body_min_joints: int = 8
    cutout: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        where = "augmentation"
        check(0 <= self.scale < 1, where, f"scale must be >= 0 and < 1, got {self.scale}")
        check(0 <= self.rotation_deg <= 90, where, f"rotation_deg must be 0..90, got {self.rotation_deg}")
        for name in ("rotation_probability", "flip_probability", "half_body_probability"):
            check(0 <= getattr(self, name) <= 1, where, f"{name} must be 0..1, got {getattr(self, name)}")
        least = self.half_body_min_joints
        check(least >= 0, where, f"half_body_min_joints must be >= 0, got {least}")
        for name in _LATER:
            check(0 <= getattr(self, name) <= 1, where, f"{name} must be 0..1, got {getattr(self, name)}")

    def __repr__(self) -> str:
        """As of any dataclass, but without the later steps that are off: checkpoints hold a digest of this text."""
        shown = [f for f in fields(self) if f.name not in _LATER or getattr(self, f.name)]
        return f"Augmentation({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"


@dataclass(frozen=True)
class View:
    """What a crop shows. transform: (2, 3) image px -> input px; joints: (K, 2) input px; visible: (K,) 0 or 1.
    factors: of brightness, contrast and saturation. hole: what is blanked, as left, top, right, bottom in input px, the
    last two excluded."""

    transform: Tensor
    joints: Tensor
    visible: Tensor
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    hole: tuple[int, int, int, int] = (0, 0, 0, 0)


def random_view(
    region: tuple[Any, Any],
    joints: Any,
    visible: Any,
    image_width: int,
    size: tuple[int, int],
    skeleton: Skeleton,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> View:
    """Draw one training view of a person.

    In numpy, whose calls take a tenth of torch's for so few numbers. Arrays and tensors on the CPU are taken alike.

    Args:
        region:      centre (2,) and extent (2,) in image pixels, as ``geometry.box_regions`` makes them: padded, and in
                     the input's aspect.
        joints:      (K, 2) x, y in image pixels; visible: (K,) > 0 where labelled.
        image_width: pixels, for mirroring.
        size:        (width, height) of the input.
        rng:         the sample's own generator; every draw comes from it, in a fixed order.
    """
    center, extent = region
    joints, seen = np.asarray(joints, np.float64), np.asarray(visible) > 0
    half = half_body_region(joints, seen, size, skeleton, augmentation, rng)
    if half is not None:
        center, extent = half
    scale = 1 + _clipped(augmentation.scale * rng.standard_normal(), augmentation.scale)
    turned = rng.random() < augmentation.rotation_probability
    angle = augmentation.rotation_deg * _clipped(rng.standard_normal(), 2) if turned else 0.0
    mirrored = skeleton.flip_pairs is not None and rng.random() < augmentation.flip_probability

    x, y = float(center[0]), float(center[1])
    shown = (image_width - 1 - x, y) if mirrored else (x, y)
    transform = region_matrix(shown, float(extent[0]) * scale, angle, size)
    if mirrored:  # followed by ``geometry.mirror``
        transform[:, 2] += transform[:, 0] * (image_width - 1)
        transform[:, 0] = -transform[:, 0]
        joints, seen = swap_sides(joints, seen, skeleton)
    strengths = augmentation.brightness, augmentation.contrast, augmentation.saturation
    factors = tuple(rng.uniform(1 - v, 1 + v) if v else 1.0 for v in strengths)
    hole = random_square(round(augmentation.cutout * size[1]), size, rng) if augmentation.cutout else (0, 0, 0, 0)
    return _view(transform, joints, seen, factors, hole)


def _clipped(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


def _view(transform: np.ndarray, joints: np.ndarray, seen: np.ndarray, *rest: Any) -> View:
    placed = joints @ transform[:, :2].T + transform[:, 2]
    return View(*map(torch.from_numpy, (transform, placed, seen.astype(np.float64))), *rest)


def random_square(side: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A square around a pixel drawn uniformly from an input of `size`, clipped at its border (DeVries and Taylor,
    "Improved Regularization of Convolutional Neural Networks with Cutout"): left, top, right, bottom."""
    width, height = size
    left, top = int(rng.integers(width)) - side // 2, int(rng.integers(height)) - side // 2
    return max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)


def swap_sides(joints: Any, visible: Any, skeleton: Skeleton) -> tuple[Any, Any]:
    """Exchange left and right joints, as a mirror image does."""
    order = _mirrored_order(skeleton)
    return joints[order], visible[order]


@lru_cache(maxsize=16)
def _mirrored_order(skeleton: Skeleton) -> np.ndarray:
    order = np.arange(skeleton.num_joints)
    for left, right in skeleton.flip_pairs or ():
        order[[left, right]] = right, left
    return order


def half_body_region(
    joints: Any,
    visible: Any,
    size: tuple[int, int],
    skeleton: Skeleton,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray] | None:
    """The region, centre (2,) and extent (2,), around the visible joints of the upper or lower body, or None to keep
    the whole person.

    The upper body is chosen when a standard normal draw is below 0.5, so with probability 0.69, as in HRNet's code.
    """
    joints, seen = np.asarray(joints), np.asarray(visible) > 0
    few = np.count_nonzero(seen) <= augmentation.half_body_min_joints
    if few or rng.random() >= augmentation.half_body_probability:
        return None
    upper, lower = _halves(joints, seen, skeleton)
    prefer_upper = rng.standard_normal() < 0.5
    if prefer_upper and len(upper) > 2:
        return _region_around(upper, size)
    return _region_around(lower if len(lower) > 2 else upper, size)


def _halves(joints: np.ndarray, seen: np.ndarray, skeleton: Skeleton) -> tuple[np.ndarray, np.ndarray]:
    """The visible joints of the upper and of the lower body."""
    lower = _is_lower(skeleton)
    return joints[seen & ~lower], joints[seen & lower]


@lru_cache(maxsize=16)
def _is_lower(skeleton: Skeleton) -> np.ndarray:
    lower = np.zeros(skeleton.num_joints, bool)
    lower[list(skeleton.lower_body)] = True
    return lower


def _region_around(points: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Centre and extent of the region that shows some joints; None where they have no extent."""
    if len(points) < 2:
        return None
    width, height = (points.max(0) - points.min(0)).tolist()
    if max(width, height) <= 0:
        return None
    aspect = size[0] / size[1]
    extent = np.array([max(width, height * aspect), max(height, width / aspect)])
    return points.mean(0), extent * HALF_BODY_PADDING


def reach(
    region: tuple[Any, Any],
    joints: Any,
    visible: Any,
    size: tuple[int, int],
    skeleton: Skeleton,
    augmentation: Augmentation | None,
) -> tuple[float, float, float, float]:
    """What any view of a person can show: left, top, right, bottom of a box in image pixels that contains it. The
    arguments are those of ``random_view``; without augmentation it is the region itself."""
    regions, larger, turns = [region], 1.0, False
    if augmentation is not None:
        larger = 1 + augmentation.scale
        turns = augmentation.rotation_deg > 0 and augmentation.rotation_probability > 0
        seen = np.asarray(visible) > 0
        if augmentation.half_body_probability and np.count_nonzero(seen) > augmentation.half_body_min_joints:
            halves = _halves(np.asarray(joints), seen, skeleton)
            regions += [half for half in (_region_around(points, size) for points in halves) if half]
    boxes = []
    for center, extent in regions:
        (x, y), (width, height) = map(float, center), map(float, extent)
        if turns:
            width = height = math.hypot(width, height)
        boxes.append((x - width * larger / 2, y - height * larger / 2, x + width * larger / 2, y + height * larger / 2))
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def plain_view(region: tuple[Any, Any], joints: Any, visible: Any, size: tuple[int, int]) -> View:
    """The view without augmentation: what evaluation shows the network."""
    center, extent = region
    transform = region_matrix((float(center[0]), float(center[1])), float(extent[0]), 0.0, size)
    return _view(transform, np.asarray(joints, np.float64), np.asarray(visible) > 0)
