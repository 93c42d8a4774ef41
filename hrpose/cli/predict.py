"""`hrpose predict`: keypoints and pictures from photographs."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from hrpose.cli.arguments import add_device_flag, add_protocol_flags, device_from, protocol_from
from hrpose.data.coco import load_boxes
from hrpose.errors import InputError, check
from hrpose.files import write_atomically
from hrpose.geometry import as_boxes
from hrpose.image import read_image
from hrpose.infer.predictor import Predictor
from hrpose.viz import draw_poses


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("predict", help="keypoints of the persons in photographs, drawn and as JSON")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="made by `hrpose train` or `hrpose demo`")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures and keypoints.json")
    parser.add_argument(
        "--box", action="append", metavar="X,Y,W,H", help="a person in image pixels; several times for several persons"
    )
    parser.add_argument(
        "--boxes", metavar="FILE.json", help='{"photo.jpg": [[x, y, w, h], ...]}, or a COCO file whose boxes to use'
    )
    parser.add_argument("--min-score", type=float, default=0.2, metavar="S", help="draw joints above (default 0.2)")
    add_protocol_flags(parser)
    add_device_flag(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    predictor = Predictor(
        options.checkpoint,
        device=device_from(options),
        protocol=protocol_from(options),
        batch_size=options.batch_size,
    )
    paths = image_files(options.images)
    boxes = _boxes(options, paths)
    for path in paths:  # all of them before the first result is written
        read_image(path)
    out = Path(options.out)
    names = _output_names(paths)
    entries = []
    for path in tqdm(paths, unit="image", disable=None, leave=False):
        image = read_image(path)
        poses = predictor(image, boxes.get(path))
        picture = draw_poses(image, poses.keypoints, poses.scores, predictor.skeleton, options.min_score, poses.boxes)
        _save(picture, out / f"{names[path]}.jpg")
        persons = [
            {
                "box": box.tolist(),
                "keypoints": [[x, y, s] for (x, y), s in zip(points.tolist(), values.tolist(), strict=True)],
            }
            for box, points, values in zip(poses.boxes, poses.keypoints, poses.scores, strict=True)
        ]
        size = {"width": image.shape[1], "height": image.shape[0]}
        entries.append({"image": str(path), **size, "picture": f"{names[path]}.jpg", "persons": persons})
    found = {
        "joints": list(predictor.skeleton.joints),
        **predictor.protocol.label(predictor.skeleton),
        "images": entries,
    }
    write_atomically(out / "keypoints.json", json.dumps(found, indent=1).encode())
    total = sum(len(entry["persons"]) for entry in entries)
    print(f"{total} persons in {len(paths)} images: pictures and keypoints.json in {out}")


def image_files(arguments: list[str]) -> list[Path]:
    """The files named, and those in the folders named whose ending Pillow knows; each once."""
    known = Image.registered_extensions()
    paths: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if not path.is_dir():
            paths[path] = None
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in known and not p.name.startswith("."))
        check(bool(inside), f"folder {path}", "holds no image files")
        paths.update(dict.fromkeys(inside))
    return list(paths)


def _boxes(options: argparse.Namespace, paths: list[Path]) -> dict[Path, Any]:
    """Boxes for each path; a path without an entry is looked at as one person."""
    check(not (options.box and options.boxes), "--box, --boxes", "cannot be given together")
    if options.box:
        check(len(paths) == 1, "--box", f"goes with one image, got {len(paths)}; use --boxes FILE.json")
        return {paths[0]: as_boxes([_parse_box(text) for text in options.box], "--box")}
    if options.boxes:
        by_name = load_boxes(options.boxes)
        found = {path: by_name[path.name] for path in paths if path.name in by_name}
        check(bool(found), f"--boxes {options.boxes}", f"names none of the images given, such as {paths[0].name}")
        return found
    return {}


def _parse_box(text: str) -> list[float]:
    try:
        box = [float(part) for part in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4:
        raise InputError(f"--box: must be X,Y,W,H in image pixels, got {text!r}")
    return box


def _output_names(paths: list[Path]) -> dict[Path, str]:
    """A name for each picture: the file's stem, with a number where two images share it."""
    names: dict[Path, str] = {}
    for path in paths:
        name, number = path.stem, 2
        while name in names.values():
            name, number = f"{path.stem}_{number}", number + 1
        names[path] = name
    return names


def _save(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    write_atomically(path, buffer.getvalue())
