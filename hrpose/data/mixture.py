"""Several annotation files as one training set: the joints of the first, found in the others by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hrpose.data.coco import Annotations, Person, check_images
from hrpose.data.formats import load_any
from hrpose.errors import check
from hrpose.skeleton import Skeleton


@dataclass(frozen=True)
class Mixture:
    """persons: of all files, with the joints of `skeleton`, file names relative to `folder`. summary: for people."""

    persons: tuple[Person, ...]
    folder: Path
    skeleton: Skeleton
    summary: str


def load_mixture(files: Sequence[str | Path], folders: Sequence[str | Path]) -> Mixture:
    """Read annotation files (COCO or MPII), each with the folder of its images, to train on all of them at once.

    The first decides on the joints. Those of the others are matched by name: what a file does not label is unlabelled
    in all its persons, what the first does not know is dropped, and so is a person of whom nothing is left. A file
    that is given twice counts twice.
    Raises: InputError as ``load_any`` and ``check_images`` do, and for a file without a joint of the first.
    """
    sets = []
    for file, folder in zip(files, folders, strict=True):
        sets.append(load_any(file))
        check_images((p.file_name for p in sets[-1].persons), folder)
    first = sets[0]
    if len(sets) == 1:
        return Mixture(first.persons, Path(folders[0]), first.skeleton, f"{len(first.persons)} persons")
    whole = [Path(os.path.abspath(folder)) for folder in folders]
    root = Path(os.path.commonpath(whole))
    persons: list[Person] = []
    parts = []
    for given, folder in zip(sets, whole, strict=True):
        taken = _with_joints_of(first, given)
        persons += [replace(p, file_name=(folder.relative_to(root) / p.file_name).as_posix()) for p in taken]
        common = len(set(first.skeleton.joints) & set(given.skeleton.joints))
        parts.append(f"{len(taken)} of {given.path} ({common} of {first.skeleton.num_joints} joints)")
    return Mixture(tuple(persons), root, first.skeleton, f"{len(persons)} persons: {', '.join(parts)}")


def _with_joints_of(first: Annotations, other: Annotations) -> list[Person]:
    """The persons of `other` that have a labelled joint of `first`, with the joints of `first` in its order."""
    theirs, mine = other.skeleton.joints, first.skeleton.joints
    source = [theirs.index(name) if name in theirs else None for name in mine]
    rule = f"must have a joint of {first.path} ({', '.join(mine)})"
    check(any(i is not None for i in source), f"annotations {other.path}", f"{rule}, has {', '.join(theirs)}")
    persons = []
    for person in other.persons:
        joints = tuple((0.0, 0.0) if i is None else person.joints[i] for i in source)
        visible = tuple(0 if i is None else person.visible[i] for i in source)
        if any(visible):
            persons.append(replace(person, joints=joints, visible=visible))
    return persons
