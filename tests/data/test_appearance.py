"""Colours as torchvision defines them, restated in float64; cutout after normalisation; each leaves the rest alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from hrpose import ops
from hrpose.data.appearance import MEAN, STD, change_colors, show
from hrpose.data.augment import Augmentation
from hrpose.data.coco import Person
from hrpose.data.dataset import PoseDataset
from hrpose.skeleton import Skeleton

SIZE = (48, 64)
IDENTITY = torch.eye(2, 3, dtype=torch.float64)


@pytest.fixture
def photo(rng):
    return torch.from_numpy(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8))


def grey(rgb):
    return 0.2989 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def blend(rgb, other, ratio):
    """torchvision.transforms.functional's _blend of float images."""
    return np.clip(ratio * rgb + (1 - ratio) * other, 0, 1)


@pytest.mark.parametrize(
    "factors", [(1.4, 1, 1), (0.3, 1, 1), (1, 1.6, 1), (1, 0, 1), (1, 1, 1.8), (1, 1, 0), (1.2, 0.7, 1.3)]
)
def test_colors_are_those_of_torchvision(photo, factors):
    rgb = photo.permute(2, 0, 1).numpy() / 255.0
    expected = blend(rgb, 0, factors[0])
    expected = blend(expected, grey(expected).mean(), factors[1])
    expected = blend(expected, grey(expected), factors[2])
    found = change_colors(photo.permute(2, 0, 1).float(), *factors)
    np.testing.assert_allclose(found.numpy() / 255, expected, atol=2e-5)  # the mean grey is rounded to 1/256 of a level


def test_colors_change_before_the_crop_is_normalised(photo):
    shown = show(photo, IDENTITY, SIZE, factors=(0.5, 1, 1))
    expected = (photo.numpy() * 0.5 / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(shown.permute(1, 2, 0), expected, atol=2e-6)


def test_the_mean_grey_does_not_depend_on_the_number_of_threads(rng):
    """Sums in float32 would: torch splits them among its threads."""
    crop = torch.from_numpy(rng.uniform(0, 255, (3, 256, 192)).astype(np.float32))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(change_colors(crop, 0.9, 0.5, 1.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_cutout_is_zero_after_normalisation_and_nothing_else_changes(photo):
    plain, holed = show(photo, IDENTITY, SIZE), show(photo, IDENTITY, SIZE, hole=(5, 10, 21, 64))
    assert torch.equal(plain, ops.crop(photo, IDENTITY[None], SIZE, mean=MEAN, std=STD)[0])
    inside = torch.zeros(64, 48, dtype=torch.bool)
    inside[10:64, 5:21] = True
    assert (holed[:, inside] == 0).all() and torch.equal(holed[:, ~inside], plain[:, ~inside])


def test_samples_are_shown_as_they_were_drawn(tmp_path, photo):
    Image.fromarray(photo.numpy()).save(tmp_path / "0.png")
    person = Person(0, "0.png", (4, 4, 38, 54), 1, ((20, 20), (30, 30)), (2, 2))
    skeleton = Skeleton("two", ("a", "b"))

    def sample(**changes):
        augmentation = Augmentation(0.0, 0.0, half_body_probability=0.0, **changes)
        return PoseDataset([person], tmp_path, SIZE, skeleton, augmentation)[0, 0]

    plain, holed, colored = sample(), sample(cutout=0.25), sample(brightness=0.5)
    blank = (holed.image == 0).all(0)
    assert 8 * 8 <= int(blank.sum()) <= 16 * 16 and torch.equal(holed.image[:, ~blank], plain.image[:, ~blank])
    grey_levels = [
        (s.image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) for s in (plain, colored)
    ]
    ratio = grey_levels[1].mean() / grey_levels[0].mean()
    assert 0.5 < ratio < 1.5 and abs(ratio - 1) > 0.01
    for other in (holed, colored):
        assert torch.equal(other.joints, plain.joints) and torch.equal(other.visible, plain.visible)
