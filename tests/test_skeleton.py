"""Skeletons: the published joint orders, what names tell and what they do not, and every message of the validation."""

import json
import re

import pytest

from hrpose.errors import InputError
from hrpose.skeleton import COCO17, LSP14, MPII16, Skeleton, pairs_from_names, side_and_part, skeleton_from_category

MPII = "rank rkne rhip lhip lkne lank pelv thor neck head rwri relb rsho lsho lelb lwri".split()


def test_coco17_is_the_published_order():
    assert COCO17.joints[0] == "nose" and COCO17.joints[5:7] == ("left_shoulder", "right_shoulder")
    assert COCO17.joints[15:] == ("left_ankle", "right_ankle")
    assert COCO17.flip_pairs == tuple((i, i + 1) for i in range(1, 16, 2))  # (1,2)(3,4)...(15,16)
    tenths = (.26, .25, .25, .35, .35, .79, .79, .72, .72, .62, .62, 1.07, 1.07, .87, .87, .89, .89)  # fmt: skip
    assert COCO17.sigmas == pytest.approx([s / 10 for s in tenths], abs=1e-12)
    assert COCO17.lower_body == (11, 12, 13, 14, 15, 16)
    assert COCO17.torso == ((5, 12), (6, 11))
    # person_keypoints_*.json: categories[0].skeleton
    official = [[16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9], [8, 10],
                [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]  # fmt: skip
    assert [[a + 1, b + 1] for a, b in COCO17.edges] == official


def test_lsp14_is_the_published_order():
    order = (
        "right ankle, right knee, right hip, left hip, left knee, left ankle, right wrist, right elbow, right shoulder"
    )
    order += ", left shoulder, left elbow, left wrist, neck, head top"
    assert LSP14.joints == tuple(name.replace(" ", "_") for name in order.split(", "))
    assert {frozenset(pair) for pair in LSP14.flip_pairs} == {
        frozenset(pair) for pair in ((0, 5), (1, 4), (2, 3), (6, 11), (7, 10), (8, 9))
    }
    sigmas = (.089, .087, .107, .107, .087, .089, .062, .072, .079, .079, .072, .062, .079, .079)  # fmt: skip
    assert LSP14.sigmas == sigmas
    assert LSP14.lower_body == (0, 1, 2, 3, 4, 5)
    assert LSP14.torso == ((9, 2), (8, 3))


@pytest.mark.parametrize("skeleton", [COCO17, LSP14, MPII16], ids=lambda s: s.name)
def test_built_in_pairs_are_those_of_the_names(skeleton):
    """The tables were typed; the names say the same independently, left before right."""
    found = pairs_from_names(skeleton.joints)
    assert sorted(found) == sorted(skeleton.flip_pairs)
    for left, right in skeleton.flip_pairs:
        assert skeleton.joints[left].replace("left", "right") == skeleton.joints[right]


def test_mpii16_is_the_published_order():
    """Its short names, and the pairs and halves of HRNet's MPIIDataset."""
    parts = {"ank": "ankle", "kne": "knee", "pelv": "pelvis", "thor": "thorax", "neck": "upper_neck",
             "head": "head_top", "wri": "wrist", "elb": "elbow", "sho": "shoulder", "hip": "hip"}  # fmt: skip
    sides = {"r": "right_", "l": "left_"}
    assert MPII16.joints == tuple(parts[n] if n in parts else sides[n[0]] + parts[n[1:]] for n in MPII)
    assert {frozenset(pair) for pair in MPII16.flip_pairs} == {
        frozenset(pair) for pair in ((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13))
    }
    assert MPII16.lower_body == (0, 1, 2, 3, 4, 5, 6) and MPII16.sigmas is None
    assert MPII16.torso == ((13, 2), (12, 3))


def test_mpii_lower_body_by_its_short_names():
    assert Skeleton("MPII", tuple(MPII)).lower_body == (0, 1, 2, 3, 4, 5, 6)


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("left_shoulder", ("left", "shoulder")),
        ("LeftShoulder", ("left", "shoulder")),
        ("leftshoulder", ("left", "shoulder")),
        ("LEFT SHOULDER", ("left", "shoulder")),
        ("shoulder-left", ("left", "shoulder")),
        ("l_knee", ("left", "knee")),
        ("lKnee", ("left", "knee")),
        ("kneeL", ("left", "knee")),
        ("shoulder.L", ("left", "shoulder")),
        ("shoulder.R", ("right", "shoulder")),
        ("R Big Toe", ("right", "big_toe")),
        ("right_hand_1", ("right", "hand_1")),
        ("lank", ("", "lank")),
        ("rank", ("", "rank")),
        ("lsho", ("", "lsho")),
        ("lip", ("", "lip")),
        ("rib", ("", "rib")),
        ("neck", ("", "neck")),
        ("left", ("", "left")),
        ("upright", ("", "upright")),
        ("l", ("", "l")),
    ],
)
def test_side_and_part(name, expected):
    assert side_and_part(name) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("nose left_eye right_eye", ((1, 2),)),
        ("nose right_eye left_eye", ((2, 1),)),
        ("eye.L eye.R LeftHand RightHand", ((0, 1), (2, 3))),
        ("l_knee r_knee neck", ((0, 1),)),
        ("left_lip right_lip rib", ((0, 1),)),
        ("left_eye right_eye lip rip_cord", ((0, 1),)),  # lip and rip_cord do not differ in l/r alone
        ("nose neck", None),  # no side named
        ("left_eye right_ear", None),  # without partners
        ("left_eye right_eye left_ear", None),
        ("left_eye right_eye eye_left", None),  # the same joint twice
        (" ".join(MPII), None),  # short names are not guessed at ...
        ("left_hip right_hip lank rank", None),  # ... nor does a partial pairing come out where some are long
        ("left_hip right_hip ankL ankR lsho rsho", None),
    ],
)
def test_pairs_from_names(names, expected):
    assert pairs_from_names(tuple(names.split())) == expected


# Validation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "skeleton 3: name must be a text, got 3"),
        ({"joints": ()}, "joints must name at least one joint, got none"),
        ({"joints": "abc"}, "joints must be a list, got 'abc'"),
        ({"joints": None}, "joints must be a list, got None"),
        ({"joints": ("a", 1, "c")}, "joints must be names, got ('a', 1, 'c')"),
        ({"joints": ("a", "", "c")}, "joints must be names, got ('a', '', 'c')"),
        ({"joints": ("a", "b", "a")}, "joints must have unique names, repeated: ['a']"),
        ({"edges": ((0, 3),)}, "edges must be pairs of two different joint indices 0..2, got (0, 3)"),
        ({"edges": ((-1, 1),)}, "edges must be pairs of two different joint indices 0..2, got (-1, 1)"),
        ({"edges": ((1, 1),)}, "edges must be pairs of two different joint indices 0..2, got (1, 1)"),
        ({"edges": ((0, 1, 2),)}, "edges must be pairs of two different joint indices 0..2, got (0, 1, 2)"),
        ({"edges": ((0, True),)}, "edges must be pairs of two different joint indices 0..2, got (0, True)"),
        ({"edges": ((0, 1.0),)}, "edges must be pairs of two different joint indices 0..2, got (0, 1.0)"),
        ({"edges": (0, 1)}, "edges must be pairs of two different joint indices 0..2, got 0"),
        ({"edges": 5}, "edges must be a list, got 5"),
        ({"flip_pairs": ((0, 9),)}, "flip_pairs must be pairs of two different joint indices 0..2, got (0, 9)"),
        ({"flip_pairs": ((0, 1), (1, 2))}, "flip_pairs must hold each joint at most once, got ((0, 1), (1, 2))"),
        ({"sigmas": (0.1, 0.2)}, "sigmas must be 3 numbers, one per joint, got 2"),
        ({"sigmas": (0.1, 0.2, 0)}, "sigmas must be numbers > 0 and < 1e6, got (0.1, 0.2, 0)"),
        ({"sigmas": (0.1, 0.2, float("nan"))}, "sigmas must be numbers > 0 and < 1e6, got (0.1, 0.2, nan)"),
        ({"sigmas": (0.1, 0.2, float("inf"))}, "sigmas must be numbers > 0 and < 1e6, got (0.1, 0.2, inf)"),
        ({"sigmas": (0.1, 0.2, 10**400)}, "sigmas must be numbers > 0 and < 1e6, got (0.1, 0.2, 1000"),
        ({"sigmas": (0.1, 0.2, True)}, "sigmas must be numbers > 0 and < 1e6, got (0.1, 0.2, True)"),
        ({"sigmas": (0.1, 0.2, "x")}, "sigmas must be numbers > 0 and < 1e6, got (0.1, 0.2, 'x')"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_messages(change, message):
    values = {"name": "toy", "joints": ("a", "b", "c")} | change
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Skeleton(**values)
    assert str(caught.value).startswith(f"skeleton {values['name']!r}: ")


def test_lists_and_tuples_make_equal_skeletons():
    a = Skeleton("toy", ["a", "b"], [[0, 1]], [[0, 1]], [1, 2])
    assert a == Skeleton("toy", ("a", "b"), ((0, 1),), ((0, 1),), (1.0, 2.0))
    assert hash(a) == hash(Skeleton("toy", ("a", "b"), ((0, 1),), ((0, 1),), (1.0, 2.0)))


@pytest.mark.parametrize(
    "skeleton", [COCO17, LSP14, Skeleton("x", ("a",)), Skeleton("y", ("a", "b"), flip_pairs=())], ids=lambda s: s.name
)
def test_round_trip_through_json(skeleton):
    assert Skeleton.from_dict(json.loads(json.dumps(skeleton.to_dict()))) == skeleton


@pytest.mark.parametrize("broken", [None, 3, [], {}, {"name": "x", "joints": ["a"]}])
def test_from_dict_refuses_what_is_no_skeleton(broken):
    with pytest.raises(InputError, match="skeleton: must be an object with name, joints, edges, flip_pairs, sigmas"):
        Skeleton.from_dict(broken)


# Categories -----------------------------------------------------------------------------------------------------------


def from_category(names, **more):
    return skeleton_from_category({"name": "cat", "keypoints": list(names), **more}, "file.json")


def test_a_coco_category_is_coco17():
    assert from_category(COCO17.joints) == COCO17  # with edges, pairs and sigmas filled in
    assert from_category(COCO17.joints, skeleton=[[1, 2]]).edges == ((0, 1),)
    assert from_category(LSP14.joints) == LSP14
    reordered = from_category(reversed(COCO17.joints))
    assert reordered.name == "cat-17" and reordered.sigmas is None  # sigmas belong to an order of joints


def test_other_sigmas_do_not_bear_the_published_name():
    assert from_category(COCO17.joints, sigmas=list(COCO17.sigmas)).name == "COCO-17"
    other = from_category(COCO17.joints, sigmas=[0.05] * 17)
    assert other.name == "cat-17" and other.sigmas == (0.05,) * 17


def test_edges_count_from_one_and_pairs_from_zero_or_by_name():
    names = ("nose", "left_eye", "right_eye")
    assert from_category(names, skeleton=[[1, 2], [1, 3]]).edges == ((0, 1), (0, 2))
    assert from_category(names, skeleton=None).edges == ()
    assert from_category(names).flip_pairs == ((1, 2),)
    assert from_category(names, flip_pairs=[[2, 1]]).flip_pairs == ((2, 1),)
    assert from_category(names, flip_pairs=[["left_eye", "right_eye"]]).flip_pairs == ((1, 2),)
    assert from_category(("a", "b", "c"), flip_pairs=[["b", 2]]).flip_pairs == ((1, 2),)
    assert from_category(("a", "b", "c"), flip_pairs=[]).flip_pairs == ()
    assert from_category(("a", "b", "c")).flip_pairs is None
    # a misspelt name has no namesake, so the pair given for it stands
    assert from_category(("lft_eye", "right_eye"), flip_pairs=[[0, 1]]).flip_pairs == ((0, 1),)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"keypoints": None}, "keypoints must be a list of joint names, got None"),
        ({"keypoints": "abc"}, "keypoints must be a list of joint names, got 'abc'"),
        ({"keypoints": ["a", 3]}, "keypoints must be a list of joint names, got ['a', 3]"),
        ({"keypoints": ["a", "a"]}, "joints must have unique names, repeated: ['a']"),
        (
            {"skeleton": [[0, 1]]},
            "skeleton must be a list of pairs of joint numbers 1..3, counted from 1, got [[0, 1]]",
        ),
        (
            {"skeleton": [[1, 4]]},
            "skeleton must be a list of pairs of joint numbers 1..3, counted from 1, got [[1, 4]]",
        ),
        ({"skeleton": [[1, "2"]]}, "skeleton must be a list of pairs of joint numbers 1..3"),
        ({"skeleton": [[1, True]]}, "skeleton must be a list of pairs of joint numbers 1..3"),
        ({"skeleton": {"a": 1}}, "skeleton must be a list of pairs of joint numbers 1..3"),
        ({"skeleton": [[2, 2]]}, "edges must be pairs of two different joint indices"),
        ({"flip_pairs": [[0]]}, "flip_pairs must be a list of pairs of joint indices or names, got [[0]]"),
        ({"flip_pairs": [[0, 1.5]]}, "flip_pairs must be a list of pairs of joint indices or names, got [[0, 1.5]]"),
        ({"flip_pairs": [[True, 2]]}, "flip_pairs must be a list of pairs of joint indices or names, got [[True, 2]]"),
        ({"flip_pairs": [["left_eye", "tail"]]}, "flip_pairs must use the names in keypoints, unknown: ['tail']"),
        ({"flip_pairs": [[1, 3]]}, "flip_pairs must be pairs of two different joint indices 0..2, got [1, 3]"),
        # wrong pairs that would silently teach a network that left is right
        ({"flip_pairs": [[0, 1]]}, "flip_pairs must pair left_eye with right_eye (indices start at 0), got nose"),
        ({"flip_pairs": []}, "flip_pairs must pair left_eye with right_eye (indices start at 0), got no joint"),
        ({"sigmas": 3}, "sigmas must be a list, got 3"),
        ({"sigmas": [0.1, 0.2]}, "sigmas must be 3 numbers, one per joint, got 2"),
        ({"sigmas": [0.1, 0.2, -1]}, "sigmas must be numbers > 0 and < 1e6, got (0.1, 0.2, -1)"),
    ],
)
def test_category_messages(more, message):
    category = {"keypoints": ["nose", "left_eye", "right_eye"]} | more
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        skeleton_from_category(category, "file.json")
    assert str(caught.value).startswith("file.json: categories: ")


def test_pairs_counted_from_one_are_refused_for_coco():
    shifted = [[a + 1, b + 1] for a, b in COCO17.flip_pairs[:-1]]
    with pytest.raises(InputError, match="flip_pairs must pair left_eye with right_eye"):
        from_category(COCO17.joints, flip_pairs=shifted)


def test_real_category(data_root):
    with open(data_root / "coco_mini" / "annotations" / "person_keypoints_val2017.json") as file:
        category = json.load(file)["categories"][0]
    assert skeleton_from_category(category, "coco") == COCO17
