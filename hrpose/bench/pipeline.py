"""Rows of the whole way from an image file and boxes to keypoints."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hrpose import geometry, ops
from hrpose.bench.case import LIBRARY, OURS, PYTORCH, REFERENCE, Case, Settings
from hrpose.bench.engines import compiled
from hrpose.bench.networks import trained
from hrpose.bench.plan import Plan
from hrpose.cost import count_cost
from hrpose.data.appearance import MEAN, STD
from hrpose.data.coco import load_annotations
from hrpose.image import read_image
from hrpose.infer import Predictor, Protocol
from hrpose.models.fold import fold_batch_norms
from hrpose.skeleton import COCO17
from hrpose.synth import SceneOptions, write_dataset

BATCHES = (1, 4)
MODEL, SIZE = "dpn4_32", (192, 256)
SCENE = SceneOptions(width=640, height=480, max_people=4, difficulty=1.0)
# Of the largest coordinate: a thousandth of a pixel, since all use OpenCV's arithmetic for the crops. A heatmap pixel
# more or less is 1e-2.
LIMIT = 2e-6
HRNET = "OpenCV, {}, numpy"  # as HRNet's test code goes about it


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    if "fp32" not in dtypes:
        return
    for index, persons in enumerate(batches or BATCHES):
        shape = f"{persons} of {SCENE.width}x{SCENE.height}, {MODEL}"
        yield Plan(
            "pipeline",
            "pipeline",
            shape,
            "fp32",
            partial(pipeline_case, persons),
            quick=index == 0,
        )


@torch.no_grad()
def pipeline_case(persons: int, settings: Settings) -> Case:
    """A drawn picture as a JPEG file, its people's boxes as often as needed, flip test with shift, quarter offset."""
    folder = tempfile.TemporaryDirectory()
    annotations = load_annotations(write_dataset(folder.name, "bench", 1, 7, SCENE))
    file = next((Path(folder.name) / "bench").glob("*.jpg"))
    drawn = [person.box for person in annotations.persons]
    boxes = [drawn[index % len(drawn)] for index in range(persons)]
    model = trained(MODEL).to(settings.device)

    def plain() -> tuple[Tensor, Tensor]:
        return plain_pipeline(model, file, boxes)

    case = Case(plain(), LIMIT, flops=4 * persons * count_cost(model, SIZE).macs)

    def enter(name: str, **options) -> None:
        predictor = Predictor(copy.deepcopy(model), protocol=Protocol(crop="opencv4"), **options)  # optimizes by itself

        def ours() -> tuple[np.ndarray, np.ndarray]:
            poses = predictor(file, boxes)
            return poses.keypoints, poses.scores

        case.enter(name, OURS, ours)

    enter("hrpose.Predictor")
    if settings.device.type == "cuda":
        enter("hrpose.Predictor without CUDA graphs", graphs=False)
    folded = copy.deepcopy(model)
    fold_batch_norms(folded)
    folded.to(memory_format=torch.channels_last)
    in_channels_last = compiled(folded, settings.device)

    def fast(images: Tensor) -> Tensor:
        return in_channels_last(images.contiguous(memory_format=torch.channels_last))

    for name, kind, network in (("torch.compile", PYTORCH, fast), ("eager", LIBRARY, model)):
        case.invite(HRNET.format(name), kind, _hrnet(network, file, boxes, settings))
    case.enter("reference", REFERENCE, plain)
    case.keep.append(folder)
    return case


def plain_pipeline(model: nn.Module, file: Path, boxes: Sequence) -> tuple[Tensor, Tensor]:
    """The same with the references of this package's ops."""
    device = next(model.parameters()).device
    transforms = geometry.crop_transforms(boxes, SIZE)
    image = torch.from_numpy(read_image(file).copy())  # a Pillow image is read-only
    crops = ops.crop_reference(image, transforms, SIZE, "opencv4", MEAN, STD).to(device)
    heatmaps, flipped = model(crops).cpu(), model(crops.flip(3)).cpu()
    back = geometry.heatmap_to_image(transforms, 4)
    return ops.decode_reference(heatmaps, flipped, COCO17.flip_pairs, transforms=back)


def _hrnet(network: Callable[[Tensor], Tensor], file: Path, boxes: Sequence, settings: Settings):
    """Its steps: OpenCV reads and crops, numpy mirrors, loops over persons and joints take the maxima."""

    def make():
        import cv2

        cv2.setNumThreads(settings.threads)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

        def call() -> tuple[np.ndarray, np.ndarray]:
            image = cv2.cvtColor(cv2.imread(str(file), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            transforms = geometry.crop_transforms(boxes, SIZE)
            crops = []
            for matrix in transforms.numpy():
                crop = cv2.warpAffine(image, matrix, SIZE, flags=cv2.INTER_LINEAR)
                crops.append((torch.from_numpy(crop).permute(2, 0, 1).float().div_(255) - mean) / std)
            images = torch.stack(crops).to(settings.device)
            heatmaps = network(images).cpu().numpy().copy()
            mirror = torch.from_numpy(np.flip(images.cpu().numpy(), 3).copy()).to(settings.device)
            heatmaps = merge_flipped(heatmaps, network(mirror).cpu().numpy())
            return decode_loops(heatmaps, geometry.heatmap_to_image(transforms, 4).numpy())

        return call

    return make


def merge_flipped(heatmaps: np.ndarray, flipped: np.ndarray) -> np.ndarray:
    """The mean of (N, K, H, W) maps and those of the mirrored input, put back in order and shifted by one pixel."""
    back = flipped[:, :, :, ::-1].copy()
    for left, right in COCO17.flip_pairs:
        back[:, [left, right]] = back[:, [right, left]]
    back[:, :, :, 1:] = back.copy()[:, :, :, :-1]
    return (heatmaps + back) * 0.5


def decode_loops(heatmaps: np.ndarray, transforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maxima, quarter offset and transform, one person and joint after the other.

    Args: heatmaps (N, K, H, W); transforms (N, 2, 3), heatmap pixels -> image pixels.
    Returns: keypoints (N, K, 2), scores (N, K).
    """
    n, k, h, w = heatmaps.shape
    flat = heatmaps.reshape(n, k, -1)
    index, scores = flat.argmax(2), flat.max(2)
    points = np.stack([index % w, index // w], 2).astype(np.float64) * (scores > 0)[..., None]
    for person in range(n):
        for joint in range(k):
            values = heatmaps[person, joint]
            x, y = (int(v) for v in points[person, joint])
            if 1 < x < w - 1 and 1 < y < h - 1:
                slopes = np.array([values[y, x + 1] - values[y, x - 1], values[y + 1, x] - values[y - 1, x]])
                points[person, joint] += np.sign(slopes) * 0.25
    for person in range(n):
        for joint in range(k):
            points[person, joint] = transforms[person] @ np.array([*points[person, joint], 1.0])
    return points, scores
