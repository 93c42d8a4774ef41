"""COCO keypoint JSON and detection files, checked field by field, as plain records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrpose.errors import InputError, check
from hrpose.geometry import clip_box
from hrpose.skeleton import Skeleton, skeleton_from_category


@dataclass(frozen=True)
class Person:
    """One box to look at. `joints` and `visible` are empty for a detection, whose joints nobody knows.

    box: x, y, width, height in image pixels. joints: K points x, y in image pixels. visible: K numbers, COCO's v:
    0 not labelled, 1 labelled but hidden, 2 visible. area: of the person in square pixels. score: of the detector.
    """

    image_id: int
    file_name: str
    box: tuple[float, float, float, float]
    annotation_id: int = 0
    joints: tuple[tuple[float, float], ...] = ()
    visible: tuple[int, ...] = ()
    area: float = 0.0
    score: float = 1.0


@dataclass(frozen=True)
class Annotations:
    """A COCO keypoint file: its skeleton, its persons with labelled joints, and the checked JSON for the evaluation."""

    path: str
    skeleton: Skeleton
    category_id: int
    images: dict[int, dict[str, Any]]
    persons: tuple[Person, ...]
    json: dict[str, Any]


def load_annotations(path: str | Path) -> Annotations:
    """Read and check a COCO keypoint file with any number of joints.

    The persons are those to train on and to evaluate with ground-truth boxes: no crowds, at least one labelled joint, box
    clipped to the image (see ``geometry.clip_box``) and not empty. `json` keeps every annotation,
    because the evaluation has to know about crowds and unlabelled persons too.
    Raises: InputError naming the file, the annotation id, the field and the valid values.
    """
    where = f"annotations {path}"
    data = _read_json(path, where)
    check(isinstance(data, dict), where, f"must be an object with images, annotations, categories, got {_kind(data)}")
    for key in ("images", "annotations", "categories"):
        check(key in data, where, f"{key} is missing; a COCO keypoint file has images, annotations and categories")
        valid = isinstance(data[key], list) and all(isinstance(entry, dict) for entry in data[key])
        check(valid, where, f"{key} must be a list of objects, got {_kind(data[key])}")
    category = _person_category(data["categories"], where)
    skeleton = skeleton_from_category(category, where)
    images = _images(data["images"], where)

    annotations, persons, seen = [], [], set()
    for position, entry in enumerate(data["annotations"]):
        for key in ("id", "image_id", "category_id", "bbox"):
            check(key in entry, where, f"annotation {entry.get('id', f'at position {position}')}: {key} is missing")
        if entry["category_id"] != category["id"]:
            known = any(entry["category_id"] == c.get("id") for c in data["categories"])
            check(known, where, f"annotation {entry['id']}: category_id {entry['category_id']!r} is not in categories")
            continue
        annotation = _annotation(entry, skeleton.num_joints, images, where)
        check(annotation["id"] not in seen, where, f"annotation {annotation['id']}: id must be unique, is used twice")
        seen.add(annotation["id"])
        annotations.append(annotation)
        person = _person(annotation, images)
        if person is not None:
            persons.append(person)
    check(bool(persons), where, "must hold at least one person with a labelled keypoint and a box inside its image")
    checked = {"images": list(images.values()), "annotations": annotations, "categories": [category]}
    return Annotations(str(path), skeleton, category["id"], images, tuple(persons), checked)


def load_detections(path: str | Path, annotations: Annotations, min_score: float = 0.0) -> tuple[list[Person], int]:
    """Read a detection file, a list of {image_id, category_id, bbox, score}, as persons to estimate.

    Kept are boxes of the person category with a score >= `min_score` whose image `annotations` lists; returns them with the
    number of boxes left out because their image is not listed (an official file covers more images than a subset does).
    Raises: InputError naming the file, the entry's position and the field.
    """
    where = f"boxes {path}"
    data = _read_json(path, where)
    check(isinstance(data, list), where, f"must be a list of {{image_id, category_id, bbox, score}}, got {_kind(data)}")
    persons, elsewhere = [], 0
    for position, entry in enumerate(data):
        here = f"{where}: entry {position}"
        check(isinstance(entry, dict), here, f"must be an object, got {_kind(entry)}")
        for key in ("image_id", "category_id", "bbox", "score"):
            check(key in entry, here, f"{key} is missing")
        score = entry["score"]
        check(_is_number(score), here, f"score must be a finite number, got {score!r}")
        box = _box(entry["bbox"], here)
        if entry["category_id"] != annotations.category_id or score < min_score:
            continue
        image = annotations.images.get(entry["image_id"]) if isinstance(entry["image_id"], int) else None
        if image is None:
            elsewhere += 1
            continue
        if max(box[2:]) > 0:
            persons.append(Person(entry["image_id"], image["file_name"], box, score=float(score)))
    known = bool(persons) or not elsewhere
    check(known, where, f"all {elsewhere} boxes are for images that {annotations.path} does not list")
    return persons, elsewhere


def load_boxes(path: str | Path) -> dict[str, list[tuple[float, float, float, float]]]:
    """Boxes by file name: from {"photo.jpg": [[x, y, w, h], ...]}, or the persons of a COCO keypoint file.

    Raises: InputError naming the file and the entry.
    """
    where = f"boxes {path}"
    data = _read_json(path, where)
    check(
        isinstance(data, dict), where, f'must be {{"photo.jpg": [[x, y, w, h], ...]}} or a COCO file, got {_kind(data)}'
    )
    by_name: dict[str, list[tuple[float, float, float, float]]] = {}
    if "annotations" in data:
        for person in load_annotations(path).persons:
            by_name.setdefault(person.file_name, []).append(person.box)
        return by_name
    for name, boxes in data.items():
        check(isinstance(boxes, list), f"{where}: {name}", f"must be a list of [x, y, w, h], got {_kind(boxes)}")
        by_name[name] = [_box(box, f"{where}: {name}") for box in boxes]
    return by_name


def check_images(file_names: Iterable[str], folder: str | Path) -> None:
    """Raise an InputError naming the first of `file_names` that `folder` lacks, before any work starts."""
    folder = Path(folder)
    check(folder.is_dir(), f"images {folder}", "is not a folder")
    missing = sorted(name for name in set(file_names) if not (folder / name).is_file())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"images {folder}: {missing[0]} is missing{more}")


def _read_json(path: str | Path, where: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{where}: no such file") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not a JSON text file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not valid JSON ({error})") from None


def _person_category(categories: list[dict[str, Any]], where: str) -> dict[str, Any]:
    with_joints = [c for c in categories if c.get("keypoints")]
    found = [c.get("name", "?") for c in with_joints]
    check(len(with_joints) == 1, where, f"categories must hold exactly one category with keypoints, got {found}")
    check(
        _is_id(with_joints[0].get("id")),
        where,
        f"categories: id must be an integer > 0, got {with_joints[0].get('id')!r}",
    )
    return with_joints[0]


def _images(entries: list[dict[str, Any]], where: str) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        here = f"{where}: image {entry.get('id', f'at position {position}')}"
        for key in ("id", "file_name", "width", "height"):
            check(key in entry, here, f"{key} is missing")
        valid = isinstance(entry["id"], int) and not isinstance(entry["id"], bool) and entry["id"] >= 0
        check(valid, here, f"id must be an integer >= 0, got {entry['id']!r}")
        check(entry["id"] not in images, here, "id must be unique, is used twice")
        name = entry["file_name"]
        check(isinstance(name, str) and bool(name), here, f"file_name must be a name, got {name!r}")
        for key in ("width", "height"):
            check(_is_id(entry[key]), here, f"{key} must be an integer > 0, got {entry[key]!r}")
        images[entry["id"]] = entry
    return images


def _annotation(entry: dict[str, Any], num_joints: int, images: dict[int, Any], where: str) -> dict[str, Any]:
    """A checked copy of an annotation with the fields that pycocotools needs."""
    check(_is_id(entry["id"]), where, f"annotation {entry['id']!r}: id must be an integer > 0")
    here = f"{where}: annotation {entry['id']}"
    known = isinstance(entry["image_id"], int) and entry["image_id"] in images
    check(known, here, f"image_id must be one of the {len(images)} ids in images, got {entry['image_id']!r}")
    crowd = entry.get("iscrowd", 0)
    check(crowd in (0, 1), here, f"iscrowd must be 0 or 1, got {crowd!r}")
    box = _box(entry["bbox"], here)
    keypoints = entry.get("keypoints")
    if keypoints is None:
        check(
            not entry.get("num_keypoints"),
            here,
            f"keypoints is missing, but num_keypoints is {entry.get('num_keypoints')}",
        )
        keypoints = [0] * (3 * num_joints)
    check(isinstance(keypoints, list), here, f"keypoints must be a list of numbers, got {_kind(keypoints)}")
    expected = f"{3 * num_joints} numbers (x, y, v for each of {num_joints} joints)"
    check(len(keypoints) == 3 * num_joints, here, f"keypoints must be {expected}, got {len(keypoints)}")
    for i, value in enumerate(keypoints):
        check(_is_number(value), here, f"keypoints[{i}] must be a finite number, got {value!r}")
        check(i % 3 != 2 or value in (0, 1, 2), here, f"keypoints[{i}] must be a visibility 0, 1 or 2, got {value!r}")
    labelled = sum(v > 0 for v in keypoints[2::3])
    stated = entry.get("num_keypoints", labelled)
    check(stated == labelled, here, f"num_keypoints must be {labelled}, the joints with v > 0, got {stated!r}")
    area = entry.get("area", box[2] * box[3])
    check(_is_number(area), here, f"area must be a finite number, got {area!r}")
    check(area > 0 or not labelled or crowd, here, f"area must be > 0 for a person with keypoints, got {area!r}")
    return {
        **entry,
        "bbox": list(box),
        "keypoints": keypoints,
        "num_keypoints": labelled,
        "area": area,
        "iscrowd": crowd,
    }


def _person(annotation: dict[str, Any], images: dict[int, dict[str, Any]]) -> Person | None:
    if annotation["iscrowd"] or not annotation["num_keypoints"]:
        return None
    image = images[annotation["image_id"]]
    box = clip_box(tuple(annotation["bbox"]), (image["width"], image["height"]))
    if min(box[2:]) < 0 or max(box[2:]) <= 0:
        return None
    values = annotation["keypoints"]
    return Person(
        annotation["image_id"],
        image["file_name"],
        box,
        annotation["id"],
        tuple(zip(map(float, values[0::3]), map(float, values[1::3]), strict=True)),
        tuple(int(v) for v in values[2::3]),
        float(annotation["area"]),
    )


def _box(value: Any, here: str) -> tuple[float, float, float, float]:
    valid = isinstance(value, list) and len(value) == 4 and all(_is_number(v) for v in value)
    check(valid, here, f"bbox must be 4 finite numbers x, y, width, height, got {value!r}")
    check(min(value[2:]) >= 0, here, f"bbox must have width and height >= 0, got {value!r}")
    return tuple(float(v) for v in value)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12 and math.isfinite(value)
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true/false"}
    return names.get(type(value), "a number")
