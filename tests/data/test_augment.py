"""Augmentation: how often and how far, as published; joints stay on what they label; left stays left."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from hrpose import ops
from hrpose.data.augment import Augmentation, half_body_region, plain_view, random_view, reach, swap_sides
from hrpose.errors import InputError
from hrpose.geometry import apply, box_regions, invert, mirror, region_transform
from hrpose.skeleton import COCO17, Skeleton

SIZE = (192, 256)
WIDTH = 320
STILL = Augmentation(0.0, 0.0, 0.0, 0.0, 0.0)
DRAWS = 4000


def share(p):
    """`p` give or take four standard errors of DRAWS draws, which chance alone exceeds once in 16,000 seeds."""
    return pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / DRAWS))


@pytest.fixture
def person(rng):
    joints = torch.tensor(rng.uniform((60, 40), (260, 260), (17, 2)))
    centers, extents = box_regions([[50, 30, 220, 240]], SIZE)
    return (centers[0], extents[0]), joints, torch.full((17,), 2)


def draw(person, augmentation, rng, skeleton=COCO17):
    return random_view(*person, WIDTH, SIZE, skeleton, augmentation, rng)


def taken_apart(views, region):
    """Of each view's transform: scale factor of the region, angle in degrees, mirrored or not."""
    linear = np.stack([view.transform[:, :2].numpy() for view in views])
    determinant = np.linalg.det(linear)
    mirrored = determinant < 0
    scale = SIZE[0] / np.sqrt(np.abs(determinant)) / float(region[1][0])
    angle = np.degrees(np.arctan2(linear[:, 0, 1], linear[:, 1, 1]))  # the column of y, which mirroring leaves alone
    return scale, angle, mirrored


# Distributions --------------------------------------------------------------------------------------------------------


def test_how_often_and_how_far(person, rng):
    augmentation = dataclasses.replace(Augmentation(), half_body_probability=0.0)
    views = [draw(person, augmentation, rng) for _ in range(DRAWS)]
    scale, angle, mirrored = taken_apart(views, person[0])
    assert np.mean(mirrored) == share(0.5)

    turned = np.abs(angle) > 1e-9
    assert np.mean(turned) == share(0.6)
    assert np.abs(angle).max() == pytest.approx(80, abs=1e-9)
    assert np.mean(np.isclose(np.abs(angle[turned]), 80)) == pytest.approx(0.0455, abs=0.02)  # beyond two sigma
    # a normal clipped at two sigma has the standard deviation 0.9594
    assert np.std(angle[turned]) == pytest.approx(40 * 0.9594, rel=0.05)
    assert np.mean(angle[turned]) == pytest.approx(0, abs=3)
    assert np.mean(angle > 1e-9) == share(0.3)

    assert scale.min() == pytest.approx(0.7) and scale.max() == pytest.approx(1.3)
    assert np.mean(np.isclose(scale, 0.7)) == share(0.1587) and np.mean(np.isclose(scale, 1.3)) == share(0.1587)
    assert np.std(scale) == pytest.approx(0.3 * 0.7185, rel=0.05)  # a normal clipped at one sigma


def test_draws_do_not_depend_on_one_another(person, rng):
    augmentation = dataclasses.replace(Augmentation(), half_body_probability=0.0)
    scale, angle, mirrored = taken_apart([draw(person, augmentation, rng) for _ in range(DRAWS)], person[0])
    table = np.corrcoef([scale, angle, np.abs(angle), mirrored])
    assert np.abs(table[0, 1:]).max() < 0.07 and np.abs(table[3, :3]).max() < 0.07  # 4 standard errors


def test_half_body_of_three_in_ten_persons_with_more_than_eight_joints(person, rng):
    augmentation = dataclasses.replace(STILL, half_body_probability=0.3)
    whole = draw(person, STILL, rng).transform
    for labelled, expected in ((17, 0.3), (9, 0.3), (8, 0.0), (0, 0.0)):
        visible = torch.zeros(17)
        visible[torch.from_numpy(rng.permutation(17)[:labelled])] = 1
        given = (person[0], person[1], visible)
        halves = [not torch.equal(draw(given, augmentation, rng).transform, whole) for _ in range(DRAWS)]
        assert np.mean(halves) == share(expected)


def official_half_body(joints, visible, prefer_upper, aspect):
    """JointsDataset.half_body_transform, restated; `prefer_upper` in place of its np.random.randn() < 0.5."""
    upper, lower = [], []
    for j in range(17):
        if visible[j] > 0:
            (upper if j in range(11) else lower).append(joints[j])
    selected = upper if prefer_upper and len(upper) > 2 else (lower if len(lower) > 2 else upper)
    if len(selected) < 2:
        return None
    selected = np.array(selected)
    center = selected.mean(0)
    w, h = np.amax(selected, 0) - np.amin(selected, 0)
    if w > aspect * h:
        h = w / aspect
    elif w < aspect * h:
        w = h * aspect
    return center, np.array([w, h]) * 1.5


class Preferring:
    """Draws that always want a half body, upper (0.49 < 0.5) or lower (0.5)."""

    def __init__(self, upper):
        self.normal = 0.49 if upper else 0.5

    def random(self):
        return 0.0

    def standard_normal(self):
        return self.normal


@pytest.mark.parametrize("prefer_upper", [True, False])
def test_half_body_region_is_the_official_one(rng, prefer_upper):
    augmentation = dataclasses.replace(STILL, half_body_probability=0.5, half_body_min_joints=0)
    given_up = 0
    for _ in range(300):
        joints = rng.uniform(0, 300, (17, 2))
        visible = (rng.random(17) < rng.choice([0.05, 0.2, 0.8])).astype(np.int64)
        if not visible.any():
            continue
        expected = official_half_body(joints, visible, prefer_upper, SIZE[0] / SIZE[1])
        found = half_body_region(
            torch.tensor(joints), torch.tensor(visible), SIZE, COCO17, augmentation, Preferring(prefer_upper)
        )
        if expected is None:
            given_up += 1
            assert found is None
        else:
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)
    assert 0 < given_up < 150


def test_the_upper_body_is_preferred_with_probability_069(person, rng):
    augmentation = dataclasses.replace(STILL, half_body_probability=1.0)
    upper = person[1][:11].mean(0).numpy()
    centers = [half_body_region(person[1], person[2], SIZE, COCO17, augmentation, rng)[0] for _ in range(DRAWS)]
    assert np.mean([np.allclose(center, upper) for center in centers]) == share(0.6915)  # Phi(0.5)


def test_joints_in_one_point_keep_the_whole_person():
    """A region without extent would be a crop without scale."""
    augmentation = dataclasses.replace(STILL, half_body_probability=1.0)
    region = half_body_region(torch.ones(17, 2), torch.ones(17), SIZE, COCO17, augmentation, Preferring(True))
    assert region is None


def test_no_mirroring_without_known_pairs(person, rng):
    unknown = dataclasses.replace(COCO17, flip_pairs=None)
    views = [draw(person, dataclasses.replace(STILL, flip_probability=1.0), rng, unknown) for _ in range(20)]
    assert not taken_apart(views, person[0])[2].any()


# Of the person above with seeds 0, 1, ...: transform[0], and the left shoulder, as commit 2c6d883 drew them.
DRAWN = (
    ((0.7250449897031961, 0.05319314501389659, -27.98617010459587), (47.21976136559937, 75.50015245783396)),
    ((-0.343870786685344, -0.4421398518579203, 217.34030364834308), (123.95752437598475, 104.05239332628838)),
    ((0.2587459022384016, 0.7957848151618071, -53.16747607980699), (30.43134458262888, 154.86629697978157)),
    ((-0.6191395499959237, -0.20243742462992032, 218.67412949846286), (100.61281381204721, 92.97581423325934)),
)


@pytest.mark.parametrize("seed", range(len(DRAWN)))
def test_draws_are_those_of_earlier_versions(person, seed):
    """A run that began with an older version goes on with the views that it would have seen."""
    for later in ({}, {"cutout": 0.25, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}):
        view = draw(person, Augmentation(**later), np.random.default_rng(seed))
        assert view.transform[0].tolist() == pytest.approx(DRAWN[seed][0], rel=1e-12)
        assert view.joints[5].tolist() == pytest.approx(DRAWN[seed][1], rel=1e-12)


def test_the_text_of_an_augmentation_is_that_of_earlier_versions():
    """Checkpoints hold a digest of it, to tell whether a run goes on with the same views."""
    older = "Augmentation(scale=0.3, rotation_deg=40.0, rotation_probability=0.6, flip_probability=0.5, "
    older += "half_body_probability=0.3, half_body_min_joints=8)"
    assert repr(Augmentation()) == older
    assert repr(Augmentation(contrast=0.5)) == older.replace(")", ", contrast=0.5)")
    assert repr(Augmentation(cutout=0.25)) == older.replace(")", ", cutout=0.25)")


def test_cutout_is_a_square_around_any_pixel(person, rng):
    augmentation = dataclasses.replace(STILL, cutout=0.25)
    holes = np.array([draw(person, augmentation, rng).hole for _ in range(DRAWS)])
    assert (holes[:, :2] >= 0).all() and (holes[:, 2:] <= SIZE).all()
    sides = holes[:, 2:] - holes[:, :2]
    assert sides.max() == 64 and sides.min() == 32  # a centre on the border leaves half of the square inside
    # the centre is 32 px or farther from the left and right in 128 of 192 places, from the others in 192 of 256
    assert np.mean(sides[:, 0] == 64) == share(129 / 192) and np.mean(sides[:, 1] == 64) == share(193 / 256)
    assert np.abs(np.corrcoef(holes[:, 0], holes[:, 1])[0, 1]) < 0.07


def test_factors_are_uniform(person, rng):
    augmentation = dataclasses.replace(STILL, brightness=0.1, saturation=0.4)
    factors = np.array([draw(person, augmentation, rng).factors for _ in range(DRAWS)])
    assert (factors[:, 1] == 1).all()
    for column, strength in ((0, 0.1), (2, 0.4)):
        drawn = (factors[:, column] - 1) / strength
        assert -1 <= drawn.min() < -0.99 and 0.99 < drawn.max() <= 1
        assert np.std(drawn) == pytest.approx(3**-0.5, rel=0.03)
    assert abs(np.corrcoef(factors[:, 0], factors[:, 2])[0, 1]) < 0.07


def test_the_same_generator_gives_the_same_view(person):
    views = [draw(person, Augmentation(), np.random.default_rng(5)) for _ in range(2)]
    assert torch.equal(views[0].transform, views[1].transform) and torch.equal(views[0].joints, views[1].joints)


# Where things are -----------------------------------------------------------------------------------------------------


def test_without_augmentation_the_random_view_is_the_plain_one(person, rng):
    plain, still = plain_view(*person, SIZE), draw(person, STILL, rng)
    assert torch.equal(plain.transform, still.transform) and torch.equal(plain.joints, still.joints)
    assert plain.visible.tolist() == still.visible.tolist() == [1] * 17


def spot(x, y, height=300):
    """A black picture with a soft bright spot at (x, y)."""
    rows, columns = np.mgrid[0:height, 0:WIDTH]
    grey = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 4.0**2))
    return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, 2)


def test_joints_lie_on_the_same_image_content(person, rng):
    """A spot painted at a joint is found at that joint in the crop, and where the view is mirrored at its partner."""
    region, joints, visible = person
    partner = list(range(17))
    for a, b in COCO17.flip_pairs:
        partner[a], partner[b] = b, a
    augmentation = dataclasses.replace(Augmentation(), half_body_probability=0.5)
    seen_mirrored, checked = set(), 0
    for trial in range(60):
        joint = trial % 17
        view = random_view(region, joints, visible, WIDTH, SIZE, COCO17, augmentation, rng)
        mirrored = bool(torch.det(view.transform[:, :2]) < 0)
        expected = view.joints[partner[joint] if mirrored else joint]
        if not (20 < expected[0] < SIZE[0] - 20 and 20 < expected[1] < SIZE[1] - 20):
            continue
        crop = ops.crop(spot(*joints[joint].tolist()), view.transform[None], SIZE)[0, 0].double()
        y, x = (crop.sum(axis) @ torch.arange(len(crop.sum(axis))).double() / crop.sum() for axis in (1, 0))
        assert (float(x), float(y)) == pytest.approx(expected.tolist(), abs=0.1)
        seen_mirrored.add(mirrored)
        checked += 1
    assert checked > 25 and seen_mirrored == {True, False}


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(), STILL, Augmentation(rotation_deg=0.0), Augmentation(half_body_probability=0.5, scale=0.5)],
)
def test_no_view_shows_what_is_out_of_reach(person, rng, augmentation):
    """The four corners of every view, taken back to the picture, lie within reach, and some of them near its end."""
    region, joints, visible = person
    box = reach(region, joints.numpy(), visible.numpy(), SIZE, COCO17, augmentation)
    corners = torch.tensor([[0, 0], [191, 0], [0, 255], [191, 255]]).double()
    shown = torch.cat([apply(invert(draw(person, augmentation, rng).transform), corners) for _ in range(1000)])
    low, high = torch.tensor(box, dtype=torch.float64).reshape(2, 2)
    assert (shown.amin(0) >= low - 1e-9).all() and (shown.amax(0) <= high + 1e-9).all()
    assert (shown.amin(0) < low + 25).all() and (shown.amax(0) > high - 25).all()


def test_the_crop_of_a_mirrored_view_is_the_mirrored_crop(rng):
    """Exactly, with a region whose pixels are those of the crop: column i of one is column w - i of the other, since
    the centre of the region is at w/2, not between the pixel centres at (w - 1)/2."""
    image = rng.integers(0, 256, (300, WIDTH, 3), dtype=np.uint8)
    region = torch.tensor([150.0, 140.0]).double(), torch.tensor([192.0, 256.0]).double()
    joints, visible = torch.tensor(rng.integers(60, 200, (17, 2))).double(), torch.ones(17)
    given = (region, joints, visible)
    plain, mirrored = draw(given, STILL, rng), draw(given, dataclasses.replace(STILL, flip_probability=1.0), rng)
    crops = [ops.crop(image, view.transform[None], SIZE)[0] for view in (plain, mirrored)]
    assert torch.equal(crops[1][:, :, 1:], crops[0].flip(2)[:, :, :-1])
    # and the same content as mirroring the picture first, then cropping around the mirrored centre
    centre = torch.tensor([[WIDTH - 1 - 150.0, 140.0]]).double()
    first = region_transform(centre, torch.tensor([192.0]).double(), torch.zeros(1), SIZE)
    assert torch.equal(crops[1], ops.crop(np.ascontiguousarray(image[:, ::-1]), first, SIZE)[0])
    # the left wrist of the mirrored picture is the right wrist's place, mirrored
    assert mirrored.joints[9].tolist() == [192 - plain.joints[10][0], plain.joints[10][1]]
    assert mirrored.joints[0].tolist() == [192 - plain.joints[0][0], plain.joints[0][1]]


def test_visibility_is_mirrored_with_the_joints(person, rng):
    region, joints, _ = person
    visible = torch.zeros(17)
    visible[[5, 9, 0]] = torch.tensor([1.0, 2.0, 2.0])
    view = draw((region, joints, visible), dataclasses.replace(STILL, flip_probability=1.0), rng)
    assert view.visible.nonzero().flatten().tolist() == [0, 6, 10] and float(view.visible.max()) == 1


def test_mirroring_twice_restores(person):
    _, joints, visible = person
    joints_once = apply(mirror(WIDTH), joints)
    there = swap_sides(joints_once, visible, COCO17)
    assert not torch.equal(there[0], joints_once)
    back = swap_sides(apply(mirror(WIDTH), there[0]), there[1], COCO17)
    torch.testing.assert_close(back[0], joints, rtol=0, atol=1e-12)
    assert torch.equal(back[1], visible)


def test_swap_sides_without_pairs_changes_nothing(person):
    for pairs in ((), None):
        skeleton = Skeleton("x", COCO17.joints, flip_pairs=pairs)
        assert torch.equal(swap_sides(person[1], person[2], skeleton)[0], person[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 1.0}, "scale must be >= 0 and < 1, got 1.0"),
        ({"scale": math.nan}, "scale must be >= 0 and < 1, got nan"),
        ({"rotation_deg": -1}, "rotation_deg must be 0..90, got -1"),
        ({"rotation_deg": 91}, "rotation_deg must be 0..90, got 91"),
        ({"rotation_probability": 1.1}, "rotation_probability must be 0..1, got 1.1"),
        ({"flip_probability": -0.1}, "flip_probability must be 0..1, got -0.1"),
        ({"half_body_probability": math.nan}, "half_body_probability must be 0..1, got nan"),
        ({"half_body_min_joints": -1}, "half_body_min_joints must be >= 0, got -1"),
        ({"cutout": 1.5}, "cutout must be 0..1, got 1.5"),
        ({"brightness": -0.1}, "brightness must be 0..1, got -0.1"),
        ({"contrast": math.nan}, "contrast must be 0..1, got nan"),
        ({"saturation": 2}, "saturation must be 0..1, got 2"),
    ],
)
def test_messages(change, message):
    with pytest.raises(InputError, match=f"augmentation: {message}"):
        Augmentation(**change)


def test_the_defaults_are_those_of_dpn():
    """Scale 30 %, rotation 40 degrees, half body 0.3 for more than 8 joints (poster and SPEC 6.3); no cutout, no
    colours."""
    assert dataclasses.astuple(Augmentation()) == (0.30, 40.0, 0.6, 0.5, 0.3, 8, 0.0, 0.0, 0.0, 0.0)
