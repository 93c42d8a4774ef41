"""`hrpose predict`: keypoints and pictures from photographs."""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from hrpose.cli.arguments import (
    add_device_flag,
    add_protocol_flags,
    check_output_folder,
    device_from,
    protocol_from,
)
from hrpose.data.coco import load_boxes
from hrpose.errors import InputError, check
from hrpose.files import write_atomically
from hrpose.geometry import as_boxes
from hrpose.image import read_image
from hrpose.infer.predictor import Predictor
from hrpose.viz import draw_poses

# Of a folder's files. Pillow's own list also holds what it only writes (PDF) and what is no picture (MPEG, HDF5).
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".ppm", ".pgm",
)  # fmt: skip


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("predict", help="keypoints of the persons in photographs, drawn and as JSON")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="made by `hrpose train` (default: the network that comes with hrpose)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures and keypoints.json")
    parser.add_argument(
        "--box",
        action="append",
        metavar="X,Y,W,H",
        help="a person in image pixels; several times for several persons; --box=X,Y,W,H where X is negative. "
        "Without boxes each image is looked at as one person",
    )
    parser.add_argument(
        "--boxes",
        metavar="FILE.json",
        help='{"photo.jpg": [[x, y, w, h], ...]}, or a COCO file whose boxes to use; an image that it does not name is '
        "looked at as one person. With --data also a detector's [{image_id, category_id, bbox, score}, ...]",
    )
    parser.add_argument("--data", metavar="FILE.json", help="COCO file that names the images of --boxes by their ids")
    parser.add_argument("--min-box-score", type=float, default=0.0, metavar="S", help="leave out detections below")
    parser.add_argument("--min-score", type=float, default=0.2, metavar="S", help="draw joints above (default 0.2)")
    add_protocol_flags(parser)
    add_device_flag(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    valid = math.isfinite(options.min_score) and options.min_score >= 0
    check(valid, "--min-score", f"must be finite and >= 0, got {options.min_score}")
    protocol, device, out = protocol_from(options), device_from(options), Path(options.out)
    check_output_folder(out, "--out")
    paths = image_files(options.images)
    pictures = picture_paths(paths, out)
    boxes = _boxes(options, paths)
    predictor = Predictor(options.checkpoint, device=device, protocol=protocol, batch_size=options.batch_size)
    for path in paths:  # all of them before the first result is written
        read_image(path)
    entries = []
    for path in tqdm(paths, unit="image", disable=None, leave=False):
        image = read_image(path)
        poses = predictor(image, boxes.get(path))
        picture = draw_poses(image, poses.keypoints, poses.scores, predictor.skeleton, options.min_score, poses.boxes)
        _save(picture, pictures[path])
        persons = [
            {
                "box": box.tolist(),
                "keypoints": [[x, y, s] for (x, y), s in zip(points.tolist(), values.tolist(), strict=True)],
            }
            for box, points, values in zip(poses.boxes, poses.keypoints, poses.scores, strict=True)
        ]
        size = {"width": image.shape[1], "height": image.shape[0]}
        entries.append({"image": str(path), **size, "picture": pictures[path].name, "persons": persons})
    found = {
        "joints": list(predictor.skeleton.joints),
        **predictor.protocol.label(predictor.skeleton),
        "images": entries,
    }
    write_atomically(out / "keypoints.json", json.dumps(found, indent=1).encode())
    scores = [score for entry in entries for person in entry["persons"] for _, _, score in person["keypoints"]]
    total, drawn = len(scores) // len(found["joints"]), sum(score >= options.min_score for score in scores)
    print(f"{total} persons in {len(paths)} images: pictures and keypoints.json in {out}")
    print(
        f"{drawn} of {len(scores)} joints are drawn, those with a score of {options.min_score:g} or more (--min-score)"
    )


def image_files(arguments: list[str]) -> list[Path]:
    """The files named, and those in the folders named whose ending is that of an image; each once."""
    paths: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if not path.is_dir():
            paths[path] = None
            continue
        inside = sorted(
            p
            for p in path.iterdir()
            if p.suffix.lower() in IMAGE_ENDINGS and p.is_file() and not p.name.startswith(".")
        )
        check(bool(inside), f"folder {path}", "holds no image files")
        paths.update(dict.fromkeys(inside))
    return list(paths)


def _boxes(options: argparse.Namespace, paths: list[Path]) -> dict[Path, Any]:
    """Boxes for each path; a path without an entry is looked at as one person."""
    check(not (options.box and options.boxes), "--box, --boxes", "cannot be given together")
    check(options.boxes or not options.data, "--data", "goes with --boxes, whose images it names")
    if options.box:
        check(len(paths) == 1, "--box", f"goes with one image, got {len(paths)}; use --boxes FILE.json")
        return {paths[0]: as_boxes([_parse_box(text) for text in options.box], "--box")}
    if options.boxes:
        by_name = load_boxes(options.boxes, options.data, options.min_box_score)
        for name, some in by_name.items():
            as_boxes(some, f"boxes {options.boxes}: {name}")
        found = {path: by_name[name] for path in paths if (name := _name_in(by_name, path)) is not None}
        check(bool(found), f"boxes {options.boxes}", f"names none of the images given, such as {paths[0].name}")
        return found
    return {}


def _name_in(by_name: dict[str, Any], path: Path) -> str | None:
    """The name that stands for the path: as much of its end as possible, since names may hold folders (COCO's may)."""
    ends = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
    return next((end for end in ends if end in by_name), None)


def _parse_box(text: str) -> list[float]:
    try:
        box = [float(part) for part in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4:
        raise InputError(f"--box: must be X,Y,W,H in image pixels, got {text!r}")
    return box


def picture_paths(images: list[Path], out: Path) -> dict[Path, Path]:
    """Where the picture of each image goes: the image's stem and .jpg, with a number where two share it.

    Raises: InputError if a picture would replace one of the images.
    """
    originals = {path.resolve() for path in images}
    pictures: dict[Path, Path] = {}
    taken: set[str] = set()
    for path in images:
        name, number = path.stem, 2
        while name in taken:
            name, number = f"{path.stem}_{number}", number + 1
        taken.add(name)
        pictures[path] = out / f"{name}.jpg"
        lost = pictures[path].resolve() in originals
        check(not lost, "--out", f"must be another folder: {pictures[path]} is one of the images given")
    return pictures


def _save(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    try:
        picture.save(buffer, "JPEG", quality=92)
    except (OSError, ValueError) as error:  # a side of more than 65500 pixels
        raise InputError(f"{path}: cannot be written as JPEG ({error})") from error
    write_atomically(path, buffer.getvalue())
