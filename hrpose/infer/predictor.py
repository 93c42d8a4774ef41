"""Photographs in, keypoints out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hrpose import ops
from hrpose.checkpoint import load_checkpoint
from hrpose.data.appearance import MEAN, STD
from hrpose.errors import InputError, check
from hrpose.geometry import as_boxes, as_size, crop_transforms, whole_image_box
from hrpose.image import as_image
from hrpose.infer import graphs as cuda_graphs
from hrpose.infer.form import InferenceForm, crop_dtype, inference_form
from hrpose.infer.protocol import Protocol, check_model, check_pose_model, device_of, estimate
from hrpose.shipped import shipped_checkpoint
from hrpose.skeleton import COCO17, Skeleton


@dataclass(frozen=True)
class Poses:
    """The persons of one image.

    keypoints: (P, K, 2) float32 x, y in pixels of the (upright) image, pixel centres at integers.
    scores:    (P, K) float32, height of the heatmap's peak: about 1 for a sure joint, near 0 for a missing one.
    boxes:     (P, 4) x, y, width, height that were looked at, in image pixels.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray


class Predictor:
    """Keypoints of persons in photographs.

        predictor = hrpose.Predictor()                              # or Predictor("runs/mine/best.pt")
        poses = predictor("photo.jpg", boxes=[[48, 20, 180, 320]])
        poses.keypoints                                             # (1, K, 2) in pixels of photo.jpg

    Args:
        model:      a network, which is put into eval mode, or the path of a checkpoint; None: the network that comes
                    with the package (``shipped_checkpoint``). Its inference form is made now (``hrpose.optimize``), so
                    later changes of its weights are not seen.
        size:       (width, height) of the network's input; default: that of the checkpoint, else (192, 256).
        skeleton:   what the heatmaps mean; default: that of the checkpoint, else COCO-17 for 17 heatmaps. Without flip
                    pairs the flip test is off.
        device:     where to compute; default: for a path CUDA if there is a device, else the CPU; for a network where
            it is.
        protocol:   flip test, decoder, crop arithmetic, precision.
        batch_size: images per forward pass; boxes of several images share batches.
        graphs:     on CUDA, run batches of up to 8 images as CUDA graphs, which are captured when first needed; without
                    effect on networks that are not ``create_model``'s.
    Calls are independent of one another, so one predictor may serve several threads.
    Raises: InputError for a broken checkpoint or a skeleton of another number of joints.
    """

    def __init__(
        self,
        model: nn.Module | str | Path | None = None,
        *,
        size: tuple[int, int] | None = None,
        skeleton: Skeleton | None = None,
        device: str | torch.device | None = None,
        protocol: Protocol = Protocol(),  # noqa: B008 - frozen
        batch_size: int = 32,
        graphs: bool = True,
    ) -> None:
        if model is None:
            model = shipped_checkpoint()
        if isinstance(model, (str, Path)):
            checkpoint = load_checkpoint(model)
            model = checkpoint.build()
            size, skeleton = size or checkpoint.size, skeleton or checkpoint.skeleton
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        elif not isinstance(model, nn.Module):
            raise InputError(
                f"Predictor: model must be a network or the path of a checkpoint, got {type(model).__name__}"
            )
        if device is not None:
            model = model.to(device)
        check_pose_model(model)
        self.model = model.eval().to(memory_format=torch.channels_last)
        self.device = device_of(model)
        self.size = as_size(size or (192, 256), "Predictor: size")
        self.skeleton = skeleton or self._default_skeleton()
        self.protocol, self.batch_size = protocol, batch_size
        check(batch_size > 0, "Predictor", f"batch_size must be > 0, got {batch_size}")
        check_model(model, self.size, self.skeleton)
        self.network = inference_form(self.model, protocol.precision)
        self.dtype = crop_dtype(self.network)
        if graphs and self._has_graphs():
            self.network = cuda_graphs.Graphed(self.network, cuda_graphs.Cuda(self.device))

    def _has_graphs(self) -> bool:
        return self.device.type == "cuda" and isinstance(self.network, InferenceForm)

    def _default_skeleton(self) -> Skeleton:
        joints = getattr(self.model, "hrpose_config", {}).get("num_keypoints")
        if joints is None:
            with torch.inference_mode():
                joints = self.model(torch.zeros(1, 3, self.size[1], self.size[0], device=self.device)).shape[1]
        return COCO17 if joints == COCO17.num_joints else Skeleton(f"{joints} joints", tuple(map(str, range(joints))))

    def __call__(self, images: Any, boxes: Any = None) -> Poses | list[Poses]:
        """Estimate the persons in one image or in several.

        Args:
            images: a path, a Pillow image, an (H, W, 3) uint8 RGB array, or a list of these. Files and Pillow images
                are turned upright as their EXIF data says.
            boxes:  (P, 4) x, y, width, height in (upright) image pixels; for a list of images a list with one such
                array, or None, for each. None looks at the whole image as one person.
        Returns: Poses, or a list of them for a list of images.
        Raises: InputError naming the image or box.
        """
        if not isinstance(images, (list, tuple)):
            return self._estimate([as_image(images)], [boxes])[0]
        if boxes is None:
            boxes = [None] * len(images)
        check(
            len(boxes) == len(images),
            "Predictor",
            f"boxes must be a list of {len(images)}, one per image, got {len(boxes)}",
        )
        return self._estimate([as_image(image, f"image {i}") for i, image in enumerate(images)], boxes)

    def _crop(self, image: np.ndarray, transforms: Tensor) -> Tensor:
        """Crops and, for the flip test, their mirrored copies, on the network's device; made there unless the image is
        larger than they are: what is smaller travels."""
        flip, (width, height) = self.protocol.flips(self.skeleton), self.size
        size = len(transforms) * (2 if flip else 1) * 3 * height * width * self.dtype.itemsize
        pixels: Any = image
        if self.device.type != "cpu" and image.nbytes <= size:
            pixels = torch.tensor(np.ascontiguousarray(image), device=self.device)
            transforms = transforms.to(self.device)
        output = {"mirror": flip, "dtype": self.dtype, "memory_format": torch.channels_last}
        return ops.crop(pixels, transforms, self.size, self.protocol.crop, MEAN, STD, **output).to(self.device)

    def _estimate(self, images: Sequence[np.ndarray], boxes: Sequence[Any]) -> list[Poses]:
        checked = [
            as_boxes(
                [whole_image_box((image.shape[1], image.shape[0]))] if some is None else some, f"boxes of image {i}"
            )
            for i, (image, some) in enumerate(zip(images, boxes, strict=True))
        ]
        transforms = [crop_transforms(some, self.size, self.protocol.padding) for some in checked]
        joints = self.skeleton.num_joints
        keypoints = [np.zeros((len(some), joints, 2), np.float32) for some in checked]
        scores = [np.zeros((len(some), joints), np.float32) for some in checked]
        work = [(i, j) for i, some in enumerate(checked) for j in range(len(some))]
        for start in range(0, len(work), self.batch_size):
            batch = work[start : start + self.batch_size]
            of_image: dict[int, list[int]] = {}
            for i, j in batch:
                of_image.setdefault(i, []).append(j)
            matrices = [transforms[i][j] for i, j in of_image.items()]
            crops = [self._crop(images[i], some) for i, some in zip(of_image, matrices, strict=True)]
            if len(crops) > 1:  # all crops, then all mirrored copies
                halves = [c.split(len(some)) for c, some in zip(crops, matrices, strict=True)]
                crops = [torch.cat([part for half in zip(*halves, strict=True) for part in half])]
            found, found_scores = estimate(
                self.network, crops[0], torch.cat(matrices), self.skeleton, self.protocol, self.batch_size
            )
            if not found_scores.isfinite().all():
                i, j = batch[int(found_scores.isfinite().all(1).int().argmin())]
                raise InputError(
                    f"model: gives heatmaps that are not finite, first for box {j} of image {i}; its weights are broken"
                )
            for (i, j), points, values in zip(batch, found.numpy(), found_scores.numpy(), strict=True):
                keypoints[i][j], scores[i][j] = points, values
        return [Poses(k, s, b.float().numpy()) for k, s, b in zip(keypoints, scores, checked, strict=True)]
