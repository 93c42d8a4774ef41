"""A synthetic data set on disk: JPEG images and a COCO keypoint file, written last."""

import io
import json
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from hrpose.errors import InputError, check, shown
from hrpose.files import write_atomically
from hrpose.skeleton import COCO17, Skeleton
from hrpose.synth.scene import MAX_PEOPLE, SceneOptions, check_joints, render_scene

GENERATOR = "hrpose.synth"
VERSION = 1  # raise when the same seed and options draw other pictures
JPEG_QUALITY = 92
MOST_IMAGES = 1_000_000  # six digits in a file name


def write_dataset(
    root: str | Path,
    split: str,
    count: int,
    seed: int,
    options: SceneOptions | None = None,
    start: int = 0,
    progress: Callable[[int], Any] | None = None,
    skeleton: Skeleton = COCO17,
) -> Path:
    """Scenes start .. start + count - 1 of series `seed` as root/<split>/%06d.jpg and root/<split>.json.

    The JSON appears only when all images are there, so half a data set is never taken for a whole one. A finished data
    set of the same scenes is used again without drawing; an interrupted one (root/<split>.partial tells what it was to
    be) is drawn again over its own files. Nothing else is ever overwritten or deleted.

    Args:
        split:    name of the image folder and the JSON: letters, digits, _ and -.
        progress: called with 1 after each image.
        skeleton: the joints to annotate: COCO17, LSP14, or any whose joints have names of theirs.
    Returns: path of the JSON.
    Raises: InputError on invalid arguments, or if other files are in the way.
    """
    options = SceneOptions() if options is None else options
    root = Path(root)
    _check_arguments(split, count, seed, options, start)
    check_joints(skeleton)
    info = {"description": "hrpose drawn people", "generator": GENERATOR, "version": VERSION, "seed": int(seed)}
    info |= {"start": int(start), "count": int(count), "options": options.to_dict(), "joints": list(skeleton.joints)}
    folder, annotation_file, marker = root / split, root / f"{split}.json", root / f"{split}.partial"
    names = [f"{index:06d}.jpg" for index in range(start, start + count)]

    if annotation_file.exists():
        _check_same(annotation_file, info, "holds another data set")
        missing = [name for name in names if not _has_content(folder / name)]
        check(not missing, str(annotation_file), f"its images must be in {folder}, missing: {shown(missing)}")
        return annotation_file
    if marker.exists():
        _check_same(marker, info, "was left by another data set that was interrupted")
    elif folder.exists():
        valid = folder.is_dir() and not any(folder.iterdir())
        check(valid, str(folder), "must be new or an empty folder, or have its annotations beside it")

    _make_folder(folder)
    write_atomically(marker, json.dumps({"info": info}).encode())
    images, annotations = [], []
    for index, name in zip(range(start, start + count), names, strict=True):
        picture, people = render_scene(seed, index, options, skeleton)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
        _write_image(folder / name, buffer.getvalue())
        images.append({"id": index + 1, "file_name": name, "width": options.width, "height": options.height})
        for number, person in enumerate(people):
            annotations.append({"id": index * MAX_PEOPLE + number + 1, "image_id": index + 1, **person})
        if progress is not None:
            progress(1)
    category = {
        "id": 1,
        "name": "person",
        "supercategory": "person",
        "keypoints": list(skeleton.joints),
        "skeleton": [[a + 1, b + 1] for a, b in skeleton.edges],
    }
    content = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": [category]}
    write_atomically(annotation_file, json.dumps(content).encode())
    marker.unlink(missing_ok=True)
    return annotation_file


def _check_arguments(split: Any, count: Any, seed: Any, options: Any, start: Any) -> None:
    where = "synthetic data set"
    valid = isinstance(split, str) and split.replace("_", "").replace("-", "").isalnum() and split.isascii()
    check(valid, where, f"split must be letters, digits, _ and -, got {shown(split)}")
    check(isinstance(options, SceneOptions), where, f"options must be SceneOptions, got {shown(options)}")
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("start", start, 0)):
        valid = isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least
        check(valid, where, f"{name} must be an integer >= {least}, got {shown(value)}")
    check(start + count <= MOST_IMAGES, where, f"start + count must be <= {MOST_IMAGES}, got {start + count}")


def _check_same(path: Path, info: dict[str, Any], otherwise: str) -> None:
    """Raise InputError unless the JSON file at `path` was made for exactly these scenes."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is in the way and cannot be read as JSON; give another folder or remove it"
        ) from error
    found = content.get("info") if isinstance(content, dict) else None
    found = found if isinstance(found, dict) else {}
    if found.get("generator") != GENERATOR:
        raise InputError(f"{path}: is in the way and was not written by {GENERATOR}; give another folder or remove it")
    differing = [key for key in info if found.get(key) != info[key]]
    if differing:
        told = ", ".join(f"{key} {shown(found.get(key))} instead of {shown(info[key])}" for key in differing)
        raise InputError(f"{path}: {otherwise} ({told}); give another folder or remove it and its images")


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror or error})") from error


def _write_image(path: Path, content: bytes) -> None:
    """Plainly, not atomically: flushing each to the disk takes longer than drawing it, and the JSON comes last."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
