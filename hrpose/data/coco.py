"""COCO keypoint JSON and detection files, checked field by field, as plain records."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrpose.data.fields import is_id, is_number, kind, read_json
from hrpose.errors import InputError, check, shown
from hrpose.geometry import clip_box
from hrpose.skeleton import COCO17, Skeleton, skeleton_from_category


@dataclass(frozen=True)
class Person:
    """One box to look at. `joints` and `visible` are empty for a detection, whose joints nobody knows.

    box: x, y, width, height in image pixels. joints: K points x, y in image pixels. visible: K numbers, COCO's v:
    0 not labelled, 1 labelled but hidden, 2 visible. area: of the person in square pixels. score: of the detector.
    image_size: (width, height) that the file states for the image; None if unknown.
    """

    image_id: int
    file_name: str
    box: tuple[float, float, float, float]
    annotation_id: int = 0
    joints: tuple[tuple[float, float], ...] = ()
    visible: tuple[int, ...] = ()
    area: float = 0.0
    score: float = 1.0
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Annotations:
    """A keypoint file: its skeleton, its persons with labelled joints, and COCO's checked JSON for the evaluation."""

    path: str
    skeleton: Skeleton
    category_id: int
    images: dict[int, dict[str, Any]]
    persons: tuple[Person, ...]
    json: dict[str, Any]


def load_annotations(path: str | Path, or_images: bool = False) -> Annotations:
    """Read and check a COCO keypoint file with any number of joints.

    The persons are those to train on and to evaluate with ground-truth boxes: no crowds, at least one labelled joint,
    box clipped to the image (see ``geometry.clip_box``) and not empty. `json` keeps the annotations of all persons,
    because the evaluation has to know about crowds and unlabelled persons too, with the fields that it uses.
    With `or_images` also a file without annotations, such as image_info_test-dev2017.json: images to estimate detected
    persons in; COCO's 17 joints are meant where its categories name none.
    Raises: InputError naming the file, the annotation id, the field and the valid values.
    """
    where = f"annotations {path}"
    data = read_json(path, where)
    check(isinstance(data, dict), where, f"must be an object with images, annotations, categories, got {kind(data)}")
    if or_images and "images" in data and data.get("annotations", []) == []:
        return _image_list(data, path, where)
    for key in ("images", "annotations", "categories"):
        check(key in data, where, f"{key} is missing; a COCO keypoint file has images, annotations and categories")
        _check_objects(data[key], key, where)
    category = _person_category(data["categories"], where)
    skeleton = skeleton_from_category(category, where)
    images = _images(data["images"], where)

    annotations, persons, seen = [], [], set()
    other_categories = {c["id"] for c in data["categories"] if type(c.get("id")) is int and c is not category}
    for position, entry in enumerate(data["annotations"]):
        name = shown(entry["id"]) if "id" in entry else f"at position {position}"
        here = f"{where}: annotation {name}"
        for key in ("id", "image_id", "category_id", "bbox"):
            check(key in entry, here, f"{key} is missing")
        category_id = entry["category_id"]
        if type(category_id) is int and category_id in other_categories:
            continue
        known = type(category_id) is int and category_id == category["id"]
        check(known, here, f"category_id must be that of one of categories, got {shown(category_id)}")
        annotation = _annotation(entry, skeleton.num_joints, images, here)
        check(annotation["id"] not in seen, here, "id must be unique, is used twice")
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

    Kept are boxes of the person category with a score >= `min_score` whose image `annotations` lists; boxes of width
    and height 0 are left out. Returns them with the number of boxes left out because their image is not listed (an
    official file covers more images than a subset does).
    Raises: InputError naming the file, the entry's position and the field; also if no box is of the person category, or
        none is for a listed image.
    """
    where = f"boxes {path}"
    check(is_number(min_score), where, f"min_score must be a finite number, got {shown(min_score)}")
    data = read_json(path, where)
    check(isinstance(data, list), where, f"must be a list of {{image_id, category_id, bbox, score}}, got {kind(data)}")
    persons, of_category, elsewhere = [], 0, 0
    for position, entry in enumerate(data):
        here = f"{where}: entry {position}"
        check(isinstance(entry, dict), here, f"must be an object, got {kind(entry)}")
        for key in ("image_id", "category_id", "bbox", "score"):
            check(key in entry, here, f"{key} is missing")
        for key in ("image_id", "category_id"):
            check(type(entry[key]) is int, here, f"{key} must be an integer, got {shown(entry[key])}")
        score = entry["score"]
        check(is_number(score), here, f"score must be a finite number, got {shown(score)}")
        box = _box(entry["bbox"], here)
        if entry["category_id"] != annotations.category_id:
            continue
        of_category += 1
        if score < min_score:
            continue
        image = annotations.images.get(entry["image_id"])
        if image is None:
            elsewhere += 1
        elif max(box[2:]) > 0:
            size = image["width"], image["height"]
            persons.append(Person(entry["image_id"], image["file_name"], box, score=float(score), image_size=size))
    known = bool(of_category) or not data
    check(known, where, f"none of the {len(data)} boxes has the category_id of persons, {annotations.category_id}")
    known = bool(persons) or not elsewhere
    check(known, where, f"all {elsewhere} boxes are for images that {annotations.path} does not list")
    return persons, elsewhere


def load_boxes(
    path: str | Path, named_by: str | Path | None = None, min_score: float = 0.0
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Boxes by file name: from {"photo.jpg": [[x, y, w, h], ...]}, the persons of a COCO keypoint file, or a detection
    file (``load_detections``), the names of whose images are in the COCO file `named_by`. An image that a COCO file
    lists and nobody is in has no boxes.

    Raises: InputError naming the file and the entry.
    """
    where = f"boxes {path}"
    data = read_json(path, where)
    detections = isinstance(data, list) and named_by is not None
    rule = 'must be {"photo.jpg": [[x, y, w, h], ...]} or a COCO file'
    hint = "; detections need a file that names their images" if isinstance(data, list) else ""
    check(isinstance(data, dict) or detections, where, f"{rule}, got {kind(data)}{hint}")
    by_name: dict[str, list[tuple[float, float, float, float]]] = {}
    if detections or "annotations" in data:
        annotations = load_annotations(named_by if detections else path, or_images=detections)
        persons = load_detections(path, annotations, min_score)[0] if detections else annotations.persons
        by_name = {image["file_name"]: [] for image in annotations.images.values()}
        for person in persons:
            by_name[person.file_name].append(person.box)
        return by_name
    for name, boxes in data.items():
        here = f"{where}: {name}"
        check(isinstance(boxes, list), here, f"must be a list of [x, y, w, h], got {kind(boxes)}")
        by_name[name] = [_box(box, here) for box in boxes]
    return by_name


def check_images(file_names: Iterable[str], folder: str | Path) -> None:
    """Raise an InputError naming the first of `file_names` that `folder` lacks, before any work starts."""
    check(os.path.isdir(folder), f"images {folder}", "is not a folder")
    missing = sorted(name for name in set(file_names) if not os.path.isfile(os.path.join(folder, name)))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"images {folder}: {missing[0]} is missing{more}")


def _image_list(data: dict[str, Any], path: str | Path, where: str) -> Annotations:
    for key in ("images", "categories"):
        _check_objects(data.get(key, []), key, where)
    images = _images(data["images"], where)
    check(bool(images), where, "images must hold at least one image")
    skeleton, category_id = COCO17, 1
    if any(category.get("keypoints") for category in data.get("categories", [])):
        category = _person_category(data["categories"], where)
        skeleton, category_id = skeleton_from_category(category, where), category["id"]
    return Annotations(str(path), skeleton, category_id, images, (), {})


def _check_objects(value: Any, key: str, where: str) -> None:
    valid = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    check(valid, where, f"{key} must be a list of objects, got {shown(value)}")


def _person_category(categories: list[dict[str, Any]], where: str) -> dict[str, Any]:
    with_joints = [c for c in categories if c.get("keypoints")]
    found = [c.get("name", "?") for c in with_joints]
    rule = "categories must hold exactly one category with keypoints"
    check(len(with_joints) == 1, where, f"{rule}, got {shown(found)}")
    category = with_joints[0]
    number = category.get("id")
    check(is_id(number), where, f"categories: id must be an integer > 0, got {shown(number)}")
    same = sum(c.get("id") == number for c in categories)
    check(same == 1, where, f"categories: id must be unique, {number} is used {same} times")
    return category


def _images(entries: list[dict[str, Any]], where: str) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        number = entry.get("id")
        here = f"{where}: image {shown(number) if 'id' in entry else f'at position {position}'}"
        for key in ("id", "file_name", "width", "height"):
            check(key in entry, here, f"{key} is missing")
        check(is_id(number) or (type(number) is int and number == 0), here, "id must be an integer >= 0")
        check(number not in images, here, "id must be unique, is used twice")
        name = entry["file_name"]
        check(isinstance(name, str) and bool(name), here, f"file_name must be a name, got {shown(name)}")
        for key in ("width", "height"):
            check(is_id(entry[key]), here, f"{key} must be an integer > 0, got {shown(entry[key])}")
        images[number] = entry
    return images


def _annotation(entry: dict[str, Any], num_joints: int, images: dict[int, Any], here: str) -> dict[str, Any]:
    """A checked copy of an annotation, with the fields that pycocotools needs."""
    check(is_id(entry["id"]), here, f"id must be an integer > 0, got {shown(entry['id'])}")
    image_id = entry["image_id"]
    known = type(image_id) is int and image_id in images
    check(known, here, f"image_id must be one of the {len(images)} ids in images, got {shown(image_id)}")
    crowd = entry.get("iscrowd", 0)
    check(type(crowd) is int and crowd in (0, 1), here, f"iscrowd must be 0 or 1, got {shown(crowd)}")
    box = _box(entry["bbox"], here)

    stated = entry.get("num_keypoints")
    keypoints = entry.get("keypoints")
    if keypoints is None:
        check(not stated, here, f"keypoints is missing, but num_keypoints is {shown(stated)}")
        keypoints = [0] * (3 * num_joints)
    check(isinstance(keypoints, list), here, f"keypoints must be a list of numbers, got {kind(keypoints)}")
    expected = f"{3 * num_joints} numbers (x, y, v for each of {num_joints} joints)"
    check(len(keypoints) == 3 * num_joints, here, f"keypoints must be {expected}, got {len(keypoints)}")
    bad = next((i for i, value in enumerate(keypoints) if not is_number(value)), None)
    if bad is not None:
        raise InputError(f"{here}: keypoints[{bad}] must be a finite number, got {shown(keypoints[bad])}")
    visible = keypoints[2::3]
    bad = next((i for i, v in enumerate(visible) if v not in (0, 1, 2)), None)
    if bad is not None:
        raise InputError(f"{here}: keypoints[{3 * bad + 2}] must be a visibility 0, 1 or 2, got {visible[bad]!r}")
    labelled = sum(v > 0 for v in visible)
    if stated is not None:
        rule = f"num_keypoints must be {labelled}, the number of joints with v > 0"
        check(type(stated) is int and stated == labelled, here, f"{rule}, got {shown(stated)}")

    needs_area = bool(labelled and not crowd)  # OKS divides by it
    hint = "area is missing; where there is no outline of the person, use width * height of bbox"
    check("area" in entry or not needs_area, here, hint)
    area = entry.get("area", box[2] * box[3])
    check(is_number(area), here, f"area must be a finite number, got {shown(area)}")
    rule = "area must be > 0 for a person with keypoints" if needs_area else "area must be >= 0"
    check(area > 0 or (area == 0 and not needs_area), here, f"{rule}, got {area!r}")
    return {
        "id": entry["id"],
        "image_id": image_id,
        "category_id": entry["category_id"],
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
    size = image["width"], image["height"]
    box = clip_box(tuple(annotation["bbox"]), size)
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
        image_size=size,
    )


def _box(value: Any, here: str) -> tuple[float, float, float, float]:
    valid = isinstance(value, list) and len(value) == 4 and all(map(is_number, value))
    check(valid, here, f"bbox must be 4 finite numbers x, y, width, height, got {shown(value)}")
    check(min(value[2:]) >= 0, here, f"bbox must have width and height >= 0, got {value!r}")
    return tuple(float(v) for v in value)
