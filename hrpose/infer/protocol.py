"""How a network is applied at test time: crops in, keypoints out; every result is labelled with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hrpose import ops
from hrpose.errors import check
from hrpose.geometry import PADDING, heatmap_to_image
from hrpose.ops.decode import REFINEMENTS, check_blur
from hrpose.skeleton import Skeleton

CROPS = ("exact", "opencv4")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Protocol:
    """The choices that change an AP.

    flip:      average with the heatmaps of the mirrored input.
    shift:     move the mirrored heatmaps one pixel right before averaging (HRNet's SHIFT_HEATMAP): a stride-4 grid is
               not symmetric.
    refine:    "quarter": a quarter pixel towards the higher neighbour; "dark": DARK, see ``ops.decode``; "none".
    blur:      the side of DARK's Gaussian: 11 for networks trained with targets of sigma 2, 17 for sigma 3.
    crop:      "exact" bilinear, or "opencv4": the fixed-point arithmetic that published APs were measured with.
    padding:   how much larger than its box the region is that the network sees.
    precision: "fp32", or "bf16" for mixed precision.
    """

    flip: bool = True
    shift: bool = True
    refine: str = "quarter"
    blur: int = 11
    crop: str = "exact"
    padding: float = PADDING
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name, choices in (("refine", REFINEMENTS), ("crop", CROPS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            check(value in choices, "protocol", f"{name} must be one of {', '.join(choices)}, got {value!r}")
        check_blur(self.blur, "protocol")
        valid = math.isfinite(self.padding) and self.padding > 0
        check(valid, "protocol", f"padding must be finite and > 0, got {self.padding}")

    def flips(self, skeleton: Skeleton) -> bool:
        """Does the flip test take place? Without flip pairs it cannot."""
        return self.flip and skeleton.flip_pairs is not None

    def label(self, skeleton: Skeleton) -> dict[str, Any]:
        """The choices as they take effect with `skeleton`, for result lines."""
        flip = self.flips(skeleton)
        decoder = f"dark, blur {self.blur}" if self.refine == "dark" else self.refine
        return {"flip": flip, "shift": flip and self.shift, "decoder": decoder, "crop": self.crop,
                "padding": self.padding, "precision": self.precision}  # fmt: skip


def check_model(model: nn.Module, size: tuple[int, int], skeleton: Skeleton) -> None:
    """Raise an InputError if the model is known not to take inputs of `size` (width, height) or not to have `skeleton`.

    A model that does not say (``create_model``'s do) is asked by the first forward pass.
    """
    check_pose_model(model)
    multiple = getattr(model, "size_multiple", 1)
    fits = size[0] % multiple == 0 and size[1] % multiple == 0
    check(fits, "model", f"takes inputs whose width and height are multiples of {multiple}, got {size[0]}x{size[1]}")
    check_joints(getattr(model, "hrpose_config", {}).get("num_keypoints", skeleton.num_joints), skeleton)


def check_pose_model(model: nn.Module) -> None:
    """Raise an InputError if the model is known to emit something else than heatmaps of keypoints."""
    config = getattr(model, "hrpose_config", {"num_keypoints": 0})
    rule = f"must emit heatmaps of keypoints, {config.get('name')} does not"
    check(config["num_keypoints"] is not None, "model", rule)


def check_joints(heatmaps: int, skeleton: Skeleton) -> None:
    joints = skeleton.num_joints
    check(heatmaps == joints, "model", f"must have {joints} heatmaps for {skeleton.name}, has {heatmaps}")


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: the device of its parameters, or buffers; the CPU for one without."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@torch.inference_mode()
def estimate(
    model: Callable[[Tensor], Tensor],
    crops: Tensor,
    transforms: Tensor,
    skeleton: Skeleton,
    protocol: Protocol,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Keypoints of cropped persons.

    Args:
        model:      in eval mode; images (N, 3, H, W) -> heatmaps (N, K, h, w).
        crops:      (N, 3, H, W) normalised, on the model's device; for the flip test also (2 N, 3, H, W) with the
                    mirrored copies behind (``ops.crop(mirror=True)``), which are made here otherwise.
        transforms: (N, 2, 3) float64, image pixels -> input pixels, that the crops were made with.
        batch_size: images per forward pass, mirrored ones too; None: all at once.
    Returns: keypoints (N, K, 2) x, y in image pixels, scores (N, K), both float32 on the CPU.
    Raises: InputError if the model has another number of heatmaps than `skeleton` has joints.
    """
    flip, n = protocol.flips(skeleton), len(transforms)
    crops = crops.contiguous(memory_format=torch.channels_last)
    if flip and len(crops) == n:
        crops = torch.cat((crops, crops.flip(3)))
    with torch.autocast(crops.device.type, torch.bfloat16, enabled=protocol.precision == "bf16"):
        parts = [model(part) for part in crops.split(batch_size or len(crops))]
    heatmaps = parts[0] if len(parts) == 1 else torch.cat(parts)
    check_joints(heatmaps.shape[1], skeleton)
    keypoints, scores = ops.decode(
        heatmaps[:n],
        heatmaps[n:] if flip else None,
        flip_pairs=skeleton.flip_pairs if flip else None,
        shift=protocol.shift,
        refine=protocol.refine,
        blur=protocol.blur,
        transforms=heatmap_to_image(transforms, crops.shape[3] / heatmaps.shape[3]).to(heatmaps.device),
    )
    return keypoints.cpu(), scores.cpu()
