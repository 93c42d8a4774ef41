"""Rows of `ops.crop`: boxes of an image to normalised 192 x 256 crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hrpose import geometry, ops
from hrpose.bench.case import LIBRARY, PYTORCH, REFERENCE, Case, Settings
from hrpose.bench.cuda_graph import enter_ours
from hrpose.bench.engines import COMPILE, compiled
from hrpose.bench.plan import Plan
from hrpose.data.appearance import MEAN, STD

BATCHES = (1, 8)
IMAGES = ((640, 480), (1920, 1080))
SIZE = (192, 256)
LIMIT = 1e-5  # of the largest value, about 2.6
# Between the two modes: OpenCV rounds positions to 1/32 pixel, so they differ by up to 1/64 in x and in y, which at a
# corner of the image, next to black, makes 8 of 255 grey levels.
ROUNDED = 0.06


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    if "fp32" not in dtypes:
        return
    batches = batches or BATCHES
    for mode, size, n in product(("exact", "opencv4"), IMAGES, batches):
        shape = f"{n} of {size[0]}x{size[1]}, {mode}"
        quick = (size, n) == (IMAGES[0], batches[0])
        yield Plan("crop", "crop", shape, "fp32", partial(crop_case, n, size, mode), quick)


def crop_case(n: int, image_size: tuple[int, int], mode: str, settings: Settings) -> Case:
    """`n` persons that fill about half of the image's height, in an image of smooth noise."""
    width, height = image_size
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, height // 16, width // 16))).float()
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")
    image = smooth[0].permute(1, 2, 0).byte().contiguous().to(settings.device)
    lefts, tops = rng.uniform(0, width / 2, n), rng.uniform(0, height / 4, n)
    boxes = np.stack([lefts, tops, np.full(n, 0.2 * width), np.full(n, 0.6 * height)], 1)
    transforms = geometry.crop_transforms(boxes, SIZE)
    matrices = transforms.numpy()
    transforms = transforms.to(settings.device)

    def run(op) -> Tensor:
        return op(image, transforms, SIZE, mode, MEAN, STD)

    _, extents = geometry.box_regions(boxes, SIZE)
    read = 3 * min(float(extents.prod(1).sum()), image.numel() / 3)
    case = Case(run(ops.crop_reference), LIMIT, nbytes=read + n * 3 * SIZE[0] * SIZE[1] * 4)
    enter_ours(case, "hrpose", lambda: run(ops.crop), settings.device)
    fast = compiled(ops.crop_reference, settings.device, [image, transforms])
    case.invite(COMPILE, PYTORCH, lambda: lambda: run(fast))
    pixels_only = 1e-3 if mode == "exact" else ROUNDED  # float32 positions in grid_sample
    case.enter("F.grid_sample", PYTORCH, lambda: crop_grid_sample(image, transforms), pixels_only)
    if settings.device.type == "cpu":
        make = _opencv(image.numpy(), matrices, settings.threads)
        case.invite("OpenCV + torch", LIBRARY, make, LIMIT if mode == "opencv4" else ROUNDED)
    case.enter("reference", REFERENCE, lambda: run(ops.crop_reference))
    return case


def crop_grid_sample(image: Tensor, transforms: Tensor) -> Tensor:
    """The same crops by PyTorch's own sampler: positions in -1..1 of the image's outermost pixel centres."""
    height, width = image.shape[:2]
    inverse = geometry.invert(transforms)
    x = torch.arange(SIZE[0], dtype=torch.float64, device=image.device)
    y = torch.arange(SIZE[1], dtype=torch.float64, device=image.device)[:, None, None]
    a, b, c = inverse[:, None, None].unbind(-1)
    source = a * x[:, None] + b * y + c  # (N, h, w, 2)
    grid = (source * source.new_tensor([2 / (width - 1), 2 / (height - 1)]) - 1).float()
    pixels = image.permute(2, 0, 1).float()[None].expand(len(transforms), -1, -1, -1)
    crops = F.grid_sample(pixels, grid, "bilinear", "zeros", align_corners=True)
    mean, std = (crops.new_tensor(values)[:, None, None] * 255 for values in (MEAN, STD))
    return (crops - mean) / std


def _opencv(image: np.ndarray, matrices: np.ndarray, threads: int):
    def make():
        import cv2

        cv2.setNumThreads(threads)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

        def call() -> Tensor:
            crops = [torch.from_numpy(cv2.warpAffine(image, matrix, SIZE)) for matrix in matrices]
            return torch.stack([(crop.permute(2, 0, 1).float().div_(255) - mean) / std for crop in crops])

        return call

    return make
