"""What both forms of `hrpose demo` share: drawn scenes, and the picture of what a network found in them."""

from __future__ import annotations

import io
from pathlib import Path

from tqdm import tqdm

from hrpose.data.coco import Annotations, load_annotations
from hrpose.files import write_atomically
from hrpose.image import read_image
from hrpose.infer.predictor import Predictor
from hrpose.skeleton import Skeleton
from hrpose.synth import SceneOptions, write_dataset
from hrpose.viz import contact_sheet, draw_poses

SHOWN = 8


def draw_scenes(
    root: Path, split: str, count: int, seed: int, start: int, options: SceneOptions, skeleton: Skeleton
) -> Annotations:
    """`count` scenes with their annotations in root/split, those that are there already excepted."""
    with tqdm(total=count, desc=f"drawing {split}", unit="scene", disable=None, leave=False) as bar:
        path = write_dataset(root, split, count, seed, options, start, bar.update, skeleton)
    annotations = load_annotations(path)
    print(f"{split}: {count} scenes with {len(annotations.persons)} persons in {path.parent / split}", flush=True)
    return annotations


def save_picture(predictor: Predictor, data: Annotations, folder: Path, path: Path) -> None:
    """The first scenes with what the network found in them, as a JPEG."""
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for person in data.persons:
        boxes.setdefault(person.file_name, []).append(person.box)
    names = list(boxes)[:SHOWN]
    images = [read_image(folder / name) for name in names]
    found = predictor(images, [boxes[name] for name in names])
    pictures = [
        draw_poses(image, poses.keypoints, poses.scores, predictor.skeleton)
        for image, poses in zip(images, found, strict=True)
    ]
    buffer = io.BytesIO()
    contact_sheet(pictures, columns=4, height=384).save(buffer, "JPEG", quality=92)
    write_atomically(path, buffer.getvalue())
