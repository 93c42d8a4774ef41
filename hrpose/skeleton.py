"""What the joints of a data set are: names, edges to draw, left/right pairs, OKS sigmas."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hrpose.errors import InputError, check, shown

# Also in the short forms of MPII and others: rkne, lank, pelv.
_LOWER_BODY = ("hip", "pelv", "kne", "ank", "foot", "feet", "toe", "heel", "thigh", "shin", "leg")


@dataclass(frozen=True)
class Skeleton:
    """Joints of one kind of person annotation; validated when made.

    Args:
        name:       what to call it in messages and reports.
        joints:     K joint names, unique.
        edges:      pairs of joint indices (0-based) that a picture connects.
        flip_pairs: (left, right) joint indices that a mirror image swaps; () if no joint has a partner, None if
                    unknown (then mirroring is switched off in training and evaluation: a wrong pairing is silent).
        sigmas:     K per-joint constants of OKS in units of sqrt(person area): COCO's k_j = 2 sigma_j; None if unknown.
    Raises: InputError naming the field.
    """

    name: str
    joints: tuple[str, ...]
    edges: tuple[tuple[int, int], ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] | None = None
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        where = f"skeleton {self.name!r}"
        check(isinstance(self.name, str), where, f"name must be a text, got {self.name!r}")
        joints = self._as_tuple("joints")
        k = len(joints)
        check(k > 0, where, "joints must name at least one joint, got none")
        check(all(isinstance(j, str) and j for j in joints), where, f"joints must be names, got {joints}")
        repeated = sorted({j for j in joints if joints.count(j) > 1})
        check(not repeated, where, f"joints must have unique names, repeated: {repeated}")
        self._as_pairs("edges")
        pairs = () if self.flip_pairs is None else self._as_pairs("flip_pairs")
        paired = [j for pair in pairs for j in pair]
        once = len(paired) == len(set(paired))
        check(once, where, f"flip_pairs must hold each joint at most once, got {self.flip_pairs}")
        if self.sigmas is not None:
            sigmas = self._as_tuple("sigmas")
            check(len(sigmas) == k, where, f"sigmas must be {k} numbers, one per joint, got {len(sigmas)}")
            valid = all(_is_real(s) and 0 < s < 1e6 for s in sigmas)
            check(valid, where, f"sigmas must be numbers > 0 and < 1e6, got {shown(sigmas)}")
            object.__setattr__(self, "sigmas", tuple(float(s) for s in sigmas))

    def _as_tuple(self, field: str) -> tuple[Any, ...]:
        """Make `field` a tuple, so that skeletons compare equal however their joints were listed."""
        value = getattr(self, field)
        valid = isinstance(value, Iterable) and not isinstance(value, str)
        check(valid, f"skeleton {self.name!r}", f"{field} must be a list, got {shown(value)}")
        object.__setattr__(self, field, tuple(value))
        return getattr(self, field)

    def _as_pairs(self, field: str) -> tuple[tuple[int, int], ...]:
        k = len(self.joints)
        rule = f"{field} must be pairs of two different joint indices 0..{k - 1}"
        pairs = []
        for pair in self._as_tuple(field):
            valid = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_is_index(j) for j in pair)
            valid = valid and all(0 <= j < k for j in pair) and pair[0] != pair[1]
            check(valid, f"skeleton {self.name!r}", f"{rule}, got {shown(pair)}")
            pairs.append((int(pair[0]), int(pair[1])))
        object.__setattr__(self, field, tuple(pairs))
        return tuple(pairs)

    @property
    def num_joints(self) -> int:
        return len(self.joints)

    @property
    def lower_body(self) -> tuple[int, ...]:
        """Indices of the joints from the hips downwards, by name; the half-body augmentation splits here."""
        return tuple(i for i, name in enumerate(self.joints) if any(part in name.lower() for part in _LOWER_BODY))

    @property
    def torso(self) -> tuple[tuple[int, int], ...]:
        """(left shoulder, right hip) and (right shoulder, left hip), the diagonals that PCK measures with; () if not
        named."""
        found = {side_and_part(name): i for i, name in enumerate(self.joints)}
        diagonals = ((("left", "shoulder"), ("right", "hip")), (("right", "shoulder"), ("left", "hip")))
        return tuple((found[a], found[b]) for a, b in diagonals if a in found and b in found)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON and checkpoints; ``Skeleton.from_dict`` reads it back."""
        pairs = None if self.flip_pairs is None else [list(p) for p in self.flip_pairs]
        return {"name": self.name, "joints": list(self.joints), "edges": [list(e) for e in self.edges],
                "flip_pairs": pairs, "sigmas": None if self.sigmas is None else list(self.sigmas)}  # fmt: skip

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Skeleton:
        """The skeleton that ``to_dict`` described. Raises: InputError naming the field."""
        fields = ("name", "joints", "edges", "flip_pairs", "sigmas")
        valid = isinstance(values, dict) and all(field in values for field in fields)
        check(valid, "skeleton", f"must be an object with {', '.join(fields)}, got {shown(values)}")
        return Skeleton(*(values[field] for field in fields))


def side_and_part(name: str) -> tuple[str, str]:
    """What a joint's name says: ("left", "shoulder") for left_shoulder, LeftShoulder, l_shoulder and shoulder.L;
    ("", "neck") for a name without a side. Abbreviations written as one word (lsho, rank) are not guessed at."""
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
    """The (left, right) index pairs that the names tell.

    None where they tell too little to be sure of all pairs, because half a pairing is a wrong one: no name has a side,
    a side has no partner, two names mean the same joint, or names beside the pairs look like a pair too (lank, rank).
    """
    sides = [side_and_part(name) for name in joints]
    left = {part: i for i, (side, part) in enumerate(sides) if side == "left"}
    right = {part: i for i, (side, part) in enumerate(sides) if side == "right"}
    sided = sum(1 for side, _ in sides if side)
    if not left or left.keys() != right.keys() or sided != len(left) + len(right):
        return None
    middle = {part for side, part in sides if not side}
    if any(part[:i] + "r" + part[i + 1 :] in middle for part in middle for i in range(len(part)) if part[i] == "l"):
        return None
    return tuple((i, right[part]) for part, i in left.items())


def skeleton_from_category(category: dict[str, Any], where: str) -> Skeleton:
    """The skeleton of a COCO category: `keypoints` (names) and, where given, `skeleton` (1-based edges), `flip_pairs`
    (0-based index pairs or pairs of names) and `sigmas`; the last two are extensions of hrpose to the format.

    What the category leaves out comes from the built-in skeleton with the same joint names, then (flip pairs) from the
    names themselves. `where` names the file in errors. Raises: InputError naming the field; also where flip_pairs give
    a joint another partner than its namesake of the other side, as indices counted from 1 would.
    """
    where = f"{where}: categories"
    names = category.get("keypoints")
    valid = isinstance(names, list) and all(isinstance(n, str) for n in names)
    check(valid, where, f"keypoints must be a list of joint names, got {shown(names)}")
    joints, k = tuple(names), len(names)
    known = next((s for s in BUILT_IN if s.joints == joints), None)

    edges = category.get("skeleton")
    if edges is not None:
        rule = f"skeleton must be a list of pairs of joint numbers 1..{k}, counted from 1"
        valid = _is_pairs(edges, (int,)) and all(1 <= j <= k for edge in edges for j in edge)
        check(valid, where, f"{rule}, got {shown(edges)}")
        edges = [(a - 1, b - 1) for a, b in edges]
    else:
        edges = known.edges if known else ()

    pairs = category.get("flip_pairs")
    if pairs is not None:
        valid = _is_pairs(pairs, (int, str))
        check(valid, where, f"flip_pairs must be a list of pairs of joint indices or names, got {shown(pairs)}")
        unknown = [j for pair in pairs for j in pair if isinstance(j, str) and j not in joints]
        check(not unknown, where, f"flip_pairs must use the names in keypoints, unknown: {unknown}")
        pairs = [[joints.index(j) if isinstance(j, str) else j for j in pair] for pair in pairs]
    else:
        pairs = known.flip_pairs if known else pairs_from_names(joints)

    sigmas = category.get("sigmas")
    if sigmas is None and known:
        sigmas = known.sigmas
    name = category.get("name")
    try:
        skeleton = Skeleton(f"{name if isinstance(name, str) else 'person'}-{k}", joints, edges, pairs, sigmas)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    _check_namesakes(skeleton, where)
    same = known is not None and skeleton.sigmas == known.sigmas  # only what scores like it may bear its name
    return replace(skeleton, name=known.name) if same else skeleton


def _check_namesakes(skeleton: Skeleton, where: str) -> None:
    partner = {joint: other for a, b in skeleton.flip_pairs or () for joint, other in ((a, b), (b, a))}
    sides = [side_and_part(name) for name in skeleton.joints]
    for joint, (side, part) in enumerate(sides):
        mirrored = ({"left": "right", "right": "left"}.get(side), part)
        namesakes = [i for i, named in enumerate(sides) if named == mirrored]
        if skeleton.flip_pairs is not None and namesakes and partner.get(joint) not in namesakes:
            name, wanted = skeleton.joints[joint], skeleton.joints[namesakes[0]]
            got = skeleton.joints[partner[joint]] if joint in partner else "no joint"
            raise InputError(f"{where}: flip_pairs must pair {name} with {wanted} (indices start at 0), got {got}")


def _is_pairs(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(j) in kinds for j in pair) for pair in value
    )


def _is_index(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


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

# MPII is measured with PCKh, which needs no sigmas. Its own short names are rank, rkne, rhip, ..., in this order.
MPII16 = Skeleton(
    name="MPII-16",
    joints=(
        "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax",
        "upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow",
        "left_wrist",
    ),
    edges=(
        (0, 1), (1, 2), (2, 6), (3, 6), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (10, 11), (11, 12), (12, 7), (13, 7),
        (13, 14), (14, 15),
    ),
    flip_pairs=((5, 0), (4, 1), (3, 2), (15, 10), (14, 11), (13, 12)),
)  # fmt: skip

BUILT_IN = (COCO17, LSP14, MPII16)
