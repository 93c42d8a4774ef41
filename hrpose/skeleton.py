"""What the joints of a data set are: names, edges to draw, left/right pairs, OKS sigmas."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from hrpose.errors import InputError, check

_LOWER_BODY = ("hip", "pelvis", "knee", "ankle", "foot", "toe", "heel", "thigh", "shin")


@dataclass(frozen=True)
class Skeleton:
    """Joints of one kind of person annotation; validated when made.

    Args:
        name:       what to call it in messages and reports.
        joints:     K joint names, unique.
        edges:      pairs of joint indices (0-based) that a picture connects.
        flip_pairs: (left, right) joint indices that a mirror image swaps; () if no joint has a partner, None if unknown
                    (then mirroring is switched off in training and evaluation, because a wrong pairing is silent).
        sigmas:     K per-joint constants of OKS, in units of sqrt(person area): COCO's k_j = 2 sigma_j. None if unknown.
    Raises: InputError naming the field.
    """

    name: str
    joints: tuple[str, ...]
    edges: tuple[tuple[int, int], ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        where = f"skeleton {self.name!r}"
        k = len(self.joints)
        check(k > 0, where, "joints must name at least one joint, got none")
        check(all(isinstance(j, str) and j for j in self.joints), where, f"joints must be names, got {self.joints}")
        repeated = sorted({j for j in self.joints if self.joints.count(j) > 1})
        check(not repeated, where, f"joints must have unique names, repeated: {repeated}")
        for field, pairs in (("edges", self.edges), ("flip_pairs", self.flip_pairs or ())):
            for pair in pairs:
                valid = len(pair) == 2 and all(isinstance(j, int) and 0 <= j < k for j in pair) and pair[0] != pair[1]
                check(valid, where, f"{field} must be pairs of two different joint indices 0..{k - 1}, got {pair}")
        paired = [j for pair in self.flip_pairs or () for j in pair]
        check(
            len(paired) == len(set(paired)),
            where,
            f"flip_pairs must hold each joint at most once, got {self.flip_pairs}",
        )
        if self.sigmas is not None:
            check(len(self.sigmas) == k, where, f"sigmas must be {k} numbers, one per joint, got {len(self.sigmas)}")
            valid = all(isinstance(s, (int, float)) and math.isfinite(s) and s > 0 for s in self.sigmas)
            check(valid, where, f"sigmas must be finite and > 0, got {self.sigmas}")

    @property
    def num_joints(self) -> int:
        return len(self.joints)

    @property
    def lower_body(self) -> tuple[int, ...]:
        """Indices of the joints from the hips downwards, by name; the half-body augmentation splits here."""
        return tuple(i for i, name in enumerate(self.joints) if any(part in name.lower() for part in _LOWER_BODY))

    @property
    def torso(self) -> tuple[tuple[int, int], ...]:
        """The diagonals (left shoulder, right hip), (right shoulder, left hip) that PCK measures with; () if not named."""
        found = {_side_and_part(name): i for i, name in enumerate(self.joints)}
        diagonals = ((("left", "shoulder"), ("right", "hip")), (("right", "shoulder"), ("left", "hip")))
        return tuple((found[a], found[b]) for a, b in diagonals if a in found and b in found)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON and checkpoints; ``Skeleton.from_dict`` reads it back."""
        pairs = None if self.flip_pairs is None else [list(p) for p in self.flip_pairs]
        return {"name": self.name, "joints": list(self.joints), "edges": [list(e) for e in self.edges],
                "flip_pairs": pairs, "sigmas": None if self.sigmas is None else list(self.sigmas)}  # fmt: skip

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Skeleton:
        pairs, sigmas = values["flip_pairs"], values["sigmas"]
        return Skeleton(
            values["name"],
            tuple(values["joints"]),
            tuple(tuple(e) for e in values["edges"]),
            None if pairs is None else tuple(tuple(p) for p in pairs),
            None if sigmas is None else tuple(sigmas),
        )


def _side_and_part(name: str) -> tuple[str, str]:
    """("left", "shoulder") for left_shoulder, LeftShoulder, l_shoulder, shoulder.L; ("", name) for a joint without a side."""
    words = [w for w in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if w]
    for side, short in (("left", "l"), ("right", "r")):
        for word in (side, short):
            if word in words and len(words) > 1:
                return side, "_".join(w for w in words if w != word)
        for word in words:  # leftshoulder, written as one word
            if word.startswith(side) and len(word) > len(side):
                return side, "_".join(w.removeprefix(side) for w in words)
    return "", "_".join(words)


def pairs_from_names(joints: tuple[str, ...]) -> tuple[tuple[int, int], ...] | None:
    """The (left, right) index pairs that the names tell, or None where no name has a side or a side has no partner."""
    sides = {_side_and_part(name): i for i, name in enumerate(joints)}
    left = {part: i for (side, part), i in sides.items() if side == "left"}
    right = {part: i for (side, part), i in sides.items() if side == "right"}
    if not left or left.keys() != right.keys():
        return None
    return tuple((i, right[part]) for part, i in left.items())


def skeleton_from_category(category: dict[str, Any], where: str) -> Skeleton:
    """The skeleton of a COCO category: `keypoints` (names) and, where given, `skeleton` (1-based edges), `flip_pairs`
    (0-based index pairs or pairs of names) and `sigmas`; the last two are extensions of hrpose to the format.

    What the category leaves out comes from the built-in skeleton with the same joint names, then (flip pairs) from the
    names themselves. `where` names the file in errors. Raises: InputError.
    """
    names = category.get("keypoints")
    valid = isinstance(names, list) and all(isinstance(n, str) for n in names)
    check(valid, where, f"categories: keypoints must be a list of joint names, got {names!r}")
    joints = tuple(names)
    known = next((s for s in BUILT_IN if s.joints == joints), None)
    edges = category.get("skeleton", [])
    check(_is_pairs(edges, int), where, f"categories: skeleton must be a list of 1-based index pairs, got {edges!r}")
    pairs = category.get("flip_pairs")
    if pairs is not None:
        valid = _is_pairs(pairs, (int, str))
        check(valid, where, f"categories: flip_pairs must be a list of pairs of joint indices or names, got {pairs!r}")
        unknown = [j for pair in pairs for j in pair if isinstance(j, str) and j not in joints]
        check(not unknown, where, f"categories: flip_pairs must use the names in keypoints, unknown: {unknown}")
        pairs = tuple(tuple(joints.index(j) if isinstance(j, str) else j for j in pair) for pair in pairs)
    else:
        pairs = known.flip_pairs if known else pairs_from_names(joints)
    sigmas = category.get("sigmas")
    if sigmas is not None:
        check(isinstance(sigmas, list), where, f"categories: sigmas must be a list of numbers, got {sigmas!r}")
        sigmas = tuple(sigmas)
    elif known:
        sigmas = known.sigmas
    name = known.name if known else f"{category.get('name', 'person')}-{len(joints)}"
    try:
        return Skeleton(name, joints, tuple((a - 1, b - 1) for a, b in edges), pairs, sigmas)
    except InputError as error:
        raise InputError(f"{where}: categories: {error}") from None


def _is_pairs(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(
        isinstance(p, (list, tuple)) and len(p) == 2 and all(isinstance(j, kind) for j in p) for p in value
    )


COCO17 = Skeleton(
    name="COCO-17",
    joints=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
        "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
        "right_ankle",
    ),
    edges=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    sigmas=(.026, .025, .025, .035, .035, .079, .079, .072, .072, .062, .062, .107, .107, .087, .087, .089, .089),
)  # fmt: skip

# Leeds Sports Pose defines no sigmas; these are COCO's for the same joints and CrowdPose's for neck and head top.
LSP14 = Skeleton(
    name="LSP-14",
    joints=(
        "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "right_wrist", "right_elbow",
        "right_shoulder", "left_shoulder", "left_elbow", "left_wrist", "neck", "head_top",
    ),
    edges=(
        (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (9, 10), (10, 11), (8, 12), (9, 12), (12, 13),
        (2, 8), (3, 9),
    ),
    flip_pairs=((5, 0), (4, 1), (3, 2), (11, 6), (10, 7), (9, 8)),
    sigmas=(.089, .087, .107, .107, .087, .089, .062, .072, .079, .079, .072, .062, .079, .079),
)  # fmt: skip

BUILT_IN = (COCO17, LSP14)
