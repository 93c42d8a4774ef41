"""Training augmentation: random half body, scale, rotation and mirroring of the region that is cropped; then colours
and cutout, which are off by default.

The first four are folded into one transform, so the image is sampled once. Their order, probabilities and draws are
those of HRNet's training code: half body, scale, rotation, flip. What colours and cutout do to the pixels is in
``appearance``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hrpose.errors import check
from hrpose.geometry import apply, compose, fit_aspect, mirror, region_transform
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
    region: tuple[Tensor, Tensor],
    joints: Tensor,
    visible: Tensor,
    image_width: int,
    size: tuple[int, int],
    skeleton: Skeleton,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> View:
    """Draw one training view of a person.

    Args:
        region:      centre (2,) and extent (2,) in image pixels, as ``geometry.box_regions`` makes them: padded, and in
                     the input's aspect.
        joints:      (K, 2) x, y in image pixels; visible: (K,) > 0 where labelled.
        image_width: pixels, for mirroring.
        size:        (width, height) of the input.
        rng:         the sample's own generator; every draw comes from it, in a fixed order.
    """
    center, extent = region
    visible = (visible > 0).double()
    half = half_body_region(joints, visible, size, skeleton, augmentation, rng)
    if half is not None:
        center, extent = half
    scale = 1 + float(np.clip(augmentation.scale * rng.standard_normal(), -augmentation.scale, augmentation.scale))
    turned = rng.random() < augmentation.rotation_probability
    angle = augmentation.rotation_deg * float(np.clip(rng.standard_normal(), -2, 2)) if turned else 0.0
    mirrored = skeleton.flip_pairs is not None and rng.random() < augmentation.flip_probability

    if mirrored:
        center = torch.stack([image_width - 1 - center[0], center[1]])
    angle_deg = torch.tensor([angle], dtype=torch.float64)
    transform = region_transform(center[None], extent[None, 0] * scale, angle_deg, size)[0]
    if mirrored:
        transform = compose(transform, mirror(image_width))
        joints, visible = swap_sides(joints, visible, skeleton)
    strengths = augmentation.brightness, augmentation.contrast, augmentation.saturation
    factors = tuple(rng.uniform(1 - v, 1 + v) if v else 1.0 for v in strengths)
    hole = random_square(round(augmentation.cutout * size[1]), size, rng) if augmentation.cutout else (0, 0, 0, 0)
    return View(transform, apply(transform, joints), visible, factors, hole)


def random_square(side: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A square around a pixel drawn uniformly from an input of `size`, clipped at its border (DeVries and Taylor,
    "Improved Regularization of Convolutional Neural Networks with Cutout"): left, top, right, bottom."""
    width, height = size
    left, top = int(rng.integers(width)) - side // 2, int(rng.integers(height)) - side // 2
    return max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)


def swap_sides(joints: Tensor, visible: Tensor, skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """Exchange left and right joints, as a mirror image does."""
    order = list(range(skeleton.num_joints))
    for left, right in skeleton.flip_pairs or ():
        order[left], order[right] = right, left
    return joints[order], visible[order]


def half_body_region(
    joints: Tensor,
    visible: Tensor,
    size: tuple[int, int],
    skeleton: Skeleton,
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor] | None:
    """The region around the visible joints of the upper or lower body, or None to keep the whole person.

    The upper body is chosen when a standard normal draw is below 0.5, so with probability 0.69, as in HRNet's code.
    """
    lower = torch.zeros(skeleton.num_joints, dtype=torch.bool)
    lower[list(skeleton.lower_body)] = True
    seen = visible > 0
    if int(seen.sum()) <= augmentation.half_body_min_joints or rng.random() >= augmentation.half_body_probability:
        return None
    upper_joints, lower_joints = joints[seen & ~lower], joints[seen & lower]
    prefer_upper = rng.standard_normal() < 0.5
    if prefer_upper and len(upper_joints) > 2:
        chosen = upper_joints
    else:
        chosen = lower_joints if len(lower_joints) > 2 else upper_joints
    if len(chosen) < 2:
        return None
    extent = chosen.amax(0) - chosen.amin(0)
    if float(extent.max()) <= 0:
        return None
    return chosen.mean(0), fit_aspect(extent[None], size[0] / size[1])[0] * HALF_BODY_PADDING


def plain_view(region: tuple[Tensor, Tensor], joints: Tensor, visible: Tensor, size: tuple[int, int]) -> View:
    """The view without augmentation: what evaluation shows the network."""
    center, extent = region
    transform = region_transform(center[None], extent[None, 0], torch.zeros(1, dtype=torch.float64), size)[0]
    return View(transform, apply(transform, joints), (visible > 0).double())
