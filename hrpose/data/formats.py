"""Annotation files of any kind: which it is says the file itself."""

from __future__ import annotations

from pathlib import Path

from hrpose.data.coco import Annotations, load_annotations
from hrpose.data.mpii import load_mpii, load_mpii_mat


def load_any(path: str | Path, split: str = "train", or_images: bool = False) -> Annotations:
    """Read an annotation file: COCO's JSON (an object), MPII's JSON (a list of objects) or MPII's original .mat.

    Args:
        split:     of the .mat, "train" or "test" (``load_mpii_mat``); the JSON files are one split each.
        or_images: take COCO's JSON without annotations too (``load_annotations``).
    Raises: InputError naming the file, the entry, the field and the valid values.
    """
    if Path(path).suffix.lower() == ".mat":
        return load_mpii_mat(path, split)
    return load_mpii(path) if _starts_as_list_of_objects(path) else load_annotations(path, or_images)


def _starts_as_list_of_objects(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError:
        return False  # who reads it all says why
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1] == b"[" and start[1:].lstrip()[:1] == b"{"
