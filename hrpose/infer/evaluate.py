"""Annotation file and images in, scores out: every person cropped, estimated, scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hrpose import ops
from hrpose.data.appearance import MEAN, STD
from hrpose.data.coco import Annotations, Person, check_images
from hrpose.data.dataset import load_image
from hrpose.data.loading import dead_worker_as_input_error, load
from hrpose.errors import InputError, check
from hrpose.eval.coco import coco_metrics, results_from_predictions
from hrpose.eval.mpii import GroundTruth, check_same_persons, pckh_metrics
from hrpose.eval.pck import pck
from hrpose.geometry import box_regions, crop_transforms
from hrpose.infer.form import crop_dtype, inference_form
from hrpose.infer.protocol import Protocol, check_model, device_of, estimate
from hrpose.ranks import ALONE, Ranks

GROUND_TRUTH = "ground-truth"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """metrics: AP, AR and their kin, "PCK@0.2", MPII's PCKh, and the labels that say how they were measured; plain
    values. results: COCO result entries, for ``eval.coco.save_results``. keypoints, scores: (P, K, 2) in image pixels
    and (P, K) of all persons looked at, in their order, for ``eval.mpii_files.save_predictions``."""

    metrics: dict[str, Any]
    results: list[dict[str, Any]]
    keypoints: np.ndarray
    scores: np.ndarray


def evaluate(
    model: nn.Module,
    annotations: Annotations,
    folder: str | Path,
    size: tuple[int, int],
    detections: Sequence[Person] | None = None,
    boxes_name: str = GROUND_TRUTH,
    protocol: Protocol = Protocol(),  # noqa: B008 - frozen
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[int], Any] | None = None,
    ranks: Ranks = ALONE,
    ground_truth: GroundTruth | None = None,
) -> Evaluation:
    """Score a network on an annotation file.

    Args:
        annotations: the ground truth (``data.load_any``); its skeleton says what the heatmaps mean.
        folder:      where the images are. Their EXIF orientation is ignored: annotations refer to the stored pixels.
        size:        (width, height) of the network's input.
        detections:  boxes to look at (``load_detections``); None for the annotated persons' own.
        boxes_name:  what to call the source of the boxes in the result.
        progress:    called with the number of persons done after each batch.
        ranks:       the processes that do this together, each with the same model: they share the images, rank 0 scores
                     all persons, once each.
        ground_truth: MPII's, of the annotated persons in their order, for PCKh (``eval.mpii.pckh_metrics``).
    Returns: AP and AR are None where the skeleton has no sigmas. PCK@0.2 compares each annotated person with the
        estimate for its own box, so it is None for detections. Both are None for a test set without joints. All
        ranks get the same.
    Raises: InputError for a missing or broken image (before any work starts, if missing) or a model of another
        skeleton.
    """
    skeleton = annotations.skeleton
    persons = annotations.persons if detections is None else detections
    check_model(model, size, skeleton)
    if ground_truth is not None:
        check(detections is None, "evaluate", "ground_truth is of the annotated persons, not of detections")
        check_same_persons(ground_truth, persons)
    check_images((p.file_name for p in persons), folder)
    keypoints, scores = estimate_persons(
        model, persons, folder, size, annotations, protocol, batch_size, workers, progress, ranks
    )
    score = partial(_score, annotations, persons, keypoints, scores, size, boxes_name, protocol)
    return ranks.on_first(partial(score, annotated=detections is None, ground_truth=ground_truth))


def _score(
    annotations: Annotations,
    persons: Sequence[Person],
    keypoints: np.ndarray,
    scores: np.ndarray,
    size: tuple[int, int],
    boxes_name: str,
    protocol: Protocol,
    annotated: bool,
    ground_truth: GroundTruth | None,
) -> Evaluation:
    skeleton = annotations.skeleton
    boxes = [p.box for p in persons]
    areas = box_regions(boxes, size, protocol.padding)[1].prod(1).numpy()
    box_scores = np.array([p.score for p in persons])
    image_ids = [p.image_id for p in persons]
    results = results_from_predictions(
        image_ids, keypoints, scores, box_scores, areas, annotations.category_id, skeleton.sigmas
    )
    metrics: dict[str, Any] = {"AP": None, "AR": None}
    if skeleton.sigmas is not None and annotations.persons:
        metrics = dict(coco_metrics(annotations, results))
    found = None
    if annotated and all(p.joints for p in persons):
        joints, visible = np.array([p.joints for p in persons]), np.array([p.visible for p in persons])
        found = pck(keypoints, joints, visible, np.array(boxes), skeleton)
    metrics["PCK@0.2"] = found.value if found else None
    metrics["PCK reference"] = found.reference if found else None
    if ground_truth is not None:
        metrics |= pckh_metrics(keypoints, ground_truth)
    metrics |= {"persons": len(persons), "boxes": boxes_name, **protocol.label(skeleton)}
    metrics |= {"input": list(size), "skeleton": skeleton.name}
    return Evaluation(metrics, results, keypoints, scores)


def estimate_persons(
    model: nn.Module,
    persons: Sequence[Person],
    folder: str | Path,
    size: tuple[int, int],
    annotations: Annotations,
    protocol: Protocol,
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[int], Any] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (P, K, 2) in image pixels and scores (P, K) of `persons`, in their order; each image is read once, by
    one of the ranks, and all get all."""
    share = partial(_estimate_share, model, persons, folder, size, annotations, protocol, batch_size, workers, progress)
    shares = ranks.on_all(lambda: share(ranks))
    order = np.argsort(np.concatenate([indices for indices, _, _ in shares]))
    keypoints, scores = (np.concatenate(parts)[order] for parts in list(zip(*shares, strict=True))[1:])
    return keypoints, scores


def _estimate_share(
    model: nn.Module,
    persons: Sequence[Person],
    folder: str | Path,
    size: tuple[int, int],
    annotations: Annotations,
    protocol: Protocol,
    batch_size: int,
    workers: int,
    progress: Callable[[int], Any] | None,
    ranks: Ranks,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices (Q,), keypoints (Q, K, 2) and scores (Q, K) of the persons in every `world`-th image from `rank` on."""
    skeleton = annotations.skeleton
    keypoints = np.zeros((len(persons), skeleton.num_joints, 2), np.float32)
    scores = np.zeros((len(persons), skeleton.num_joints), np.float32)
    done: list[int] = []
    device, network = device_of(model), inference_form(model, protocol.precision)
    images = _ImageCrops(persons, Path(folder), size, protocol, crop_dtype(network), ranks)
    loaded = load(images, workers, batch_size=None)
    with dead_worker_as_input_error():
        for indices, crops, transforms in _batches(loaded, batch_size):
            keypoints[indices], scores[indices] = estimate(
                network, crops.to(device), transforms, skeleton, protocol, batch_size
            )
            done += indices
            broken = [i for i in indices if not np.isfinite(scores[i]).all()]
            if broken:
                person = persons[broken[0]]
                annotation = f" (annotation {person.annotation_id})" if person.annotation_id else ""
                where = f"{person.file_name}{annotation}"
                raise InputError(
                    f"model: gives heatmaps that are not finite, first for {where}; its weights are broken"
                )
            if progress:
                progress(len(indices))
    return np.array(done, np.int64), keypoints[done], scores[done]


class _ImageCrops(Dataset[tuple[list[int], Tensor, Tensor]]):
    """Per image of a rank: the indices of its persons, their crops (n, 3, H, W) and transforms (n, 2, 3)."""

    def __init__(
        self,
        persons: Sequence[Person],
        folder: Path,
        size: tuple[int, int],
        protocol: Protocol,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        groups: dict[str, list[int]] = {}
        for index, person in enumerate(persons):
            groups.setdefault(person.file_name, []).append(index)
        self.groups, self.persons = list(groups.items())[ranks.rank :: ranks.world], persons
        self.folder, self.size, self.protocol, self.dtype = folder, size, protocol, dtype

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, position: int) -> tuple[list[int], Tensor, Tensor]:
        _, indices = self.groups[position]
        image = load_image(self.persons[indices[0]], self.folder)
        transforms = crop_transforms([self.persons[i].box for i in indices], self.size, self.protocol.padding)
        output = {"dtype": self.dtype, "memory_format": torch.channels_last}
        return indices, ops.crop(image, transforms, self.size, self.protocol.crop, MEAN, STD, **output), transforms


def _batches(
    loaded: Iterable[tuple[list[int], Tensor, Tensor]], batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Regroup images of any number of persons into batches of `batch_size` persons; the last may be smaller."""
    indices: list[int] = []
    crops: list[Tensor] = []
    transforms: list[Tensor] = []
    for more, some_crops, some_transforms in loaded:
        indices += more
        crops.append(some_crops)
        transforms.append(some_transforms)
        while len(indices) >= batch_size:
            all_crops, all_transforms = torch.cat(crops), torch.cat(transforms)
            yield indices[:batch_size], all_crops[:batch_size], all_transforms[:batch_size]
            indices, crops, transforms = indices[batch_size:], [all_crops[batch_size:]], [all_transforms[batch_size:]]
    if indices:
        yield indices, torch.cat(crops), torch.cat(transforms)
