"""Batches on their way to the network: cropped by workers or on the device, they are the same to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from hrpose.checkpoint import digest
from hrpose.data.augment import Augmentation
from hrpose.data.cache import cache_pixels
from hrpose.data.coco import Person
from hrpose.data.dataset import EpochBatches, PoseDataset
from hrpose.data.feed import PixelBatches, crop_batch, feed
from hrpose.errors import InputError
from hrpose.skeleton import Skeleton

TOY = Skeleton("toy", ("nose", "left_hand", "right_hand"), flip_pairs=((1, 2),))
CPU = torch.device("cpu")
ALL = Augmentation(cutout=0.3, brightness=0.2, contrast=0.4, saturation=0.3)


@pytest.fixture
def data(tmp_path):
    """Persons in pictures of several sizes."""
    rng = np.random.default_rng(1)
    persons = []
    for i in range(9):
        pixels = rng.integers(0, 256, (60 + 3 * i, 90 - 2 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        joints = tuple(map(tuple, rng.uniform(5, 55, (3, 2)).tolist()))
        persons.append(
            Person(i, f"{i}.png", (*rng.uniform(0, 30, 2), *rng.uniform(20, 50, 2)), i, joints, (2, 1, i % 2))
        )
    return PoseDataset(persons, tmp_path, (48, 64), TOY, ALL, seed=7)


def epoch(data, workers=0, on_device=None, device=CPU):
    batches = feed(data, EpochBatches(len(data), 4, 7, 3), workers, device, on_device)
    return [[tensor.cpu() for tensor in batch] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_cropped_on_the_device_or_not(data, workers):
    expected = digest([epoch(data, on_device=False)])
    assert digest([epoch(data, workers)]) == expected
    assert digest([epoch(data, workers, on_device=True)]) == expected


def test_cropped_on_the_device_from_a_cache(data, tmp_path):
    expected = digest([epoch(data)])
    cache_pixels(data, tmp_path / "cache")
    assert digest([epoch(data, 2, on_device=True)]) == expected


def test_a_cuda_card_gives_the_same(data):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    card = torch.device("cuda")
    samples = next(feed(data, EpochBatches(len(data), 4, 7, 3), 2, card))
    assert samples.image.device.type == samples.joints.device.type == "cuda"
    for here, there in zip(epoch(data), epoch(data, 2, device=card), strict=True):
        torch.testing.assert_close(there[0], here[0], rtol=0, atol=1e-5)
        for ours, theirs in zip(here[1:], there[1:], strict=True):
            assert torch.equal(ours, theirs)


def test_decoded_pixels_are_fewer_than_crops(data):
    batch = PixelBatches(data)[[(0, 1), (0, 2)]]
    assert batch.pixels.dtype == torch.uint8 and len(batch.pixels) == 3 * int(batch.sizes.prod(1).sum())
    assert batch.pixels.nbytes < crop_batch(batch, data.size, CPU).image.nbytes


def test_errors_arrive_as_they_are(data):
    (data.folder / "4.png").unlink()
    for on_device in (False, True):
        with pytest.raises(InputError, match=r"4\.png: cannot be read"):
            epoch(data, on_device=on_device)
