"""Samples depend on (seed, epoch, index) alone; an epoch shows each person at most once and can be resumed."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from hrpose import ops
from hrpose.checkpoint import digest
from hrpose.data.appearance import MEAN, STD
from hrpose.data.augment import Augmentation
from hrpose.data.coco import Person, load_annotations
from hrpose.data.dataset import Batches, EpochBatches, PoseDataset, collate, load_image
from hrpose.data.loading import load
from hrpose.errors import InputError
from hrpose.skeleton import Skeleton

TOY = Skeleton("toy", ("nose", "left_hand", "right_hand"), flip_pairs=((1, 2),))
SIZE = (48, 64)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(1)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        coarse.resize((90 + i, 70), Image.Resampling.BILINEAR).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def persons():
    rng = np.random.default_rng(2)
    return [
        Person(i % 4, f"{i % 4}.png", (*rng.uniform(0, 30, 2), *rng.uniform(20, 50, 2)), 100 + i,
               tuple(map(tuple, rng.uniform(5, 65, (3, 2)).tolist())), (2, 1, i % 2), image_size=(90 + i % 4, 70))
        for i in range(11)
    ]  # fmt: skip


def dataset(persons, folder, **changes):
    return PoseDataset(persons, folder, **({"size": SIZE, "skeleton": TOY, "augmentation": Augmentation()} | changes))


# Samples --------------------------------------------------------------------------------------------------------------


def epoch_digest(data, workers, epoch=3):
    batches = EpochBatches(len(data), 3, seed=9, epoch=epoch)
    return digest([[list(batch) for batch in load(Batches(data), workers, sampler=batches, batch_size=None)]])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_change_nothing(persons, folder):
    data = dataset(persons, folder, seed=9)
    alone = epoch_digest(data, 0)
    assert epoch_digest(data, 2) == alone and epoch_digest(data, 4) == alone
    assert epoch_digest(data, 0, epoch=4) != alone
    assert epoch_digest(dataset(persons, folder, seed=10), 0) != alone


def test_order_and_global_generators_change_nothing(persons, folder):
    data = dataset(persons, folder, seed=9)
    keys = [(epoch, index) for epoch in (0, 5) for index in range(len(persons))]
    expected = {key: digest(list(data[key])) for key in keys}
    assert len(set(expected.values())) == len(keys)  # every epoch another view
    for shuffle in range(2):
        torch.manual_seed(shuffle)
        np.random.seed(shuffle)
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        for i in np.random.default_rng(shuffle).permutation(len(keys)):
            assert digest(list(data[keys[i]])) == expected[keys[i]]
        assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


def test_a_plain_sample_by_hand(folder):
    """A box of 24x32 whose region, a quarter larger, is 30x40: a crop of 30x40 shows it pixel by pixel."""
    person = Person(0, "1.png", (20, 10, 24, 32), 1, ((32, 26), (20, 10), (0, 0)), (2, 1, 0))
    data = PoseDataset([person], folder, (30, 40), TOY)
    image, joints, visible, index = data[0, 0]
    pixels = np.asarray(Image.open(folder / "1.png"))[26 - 20 : 26 + 20, 32 - 15 : 32 + 15]
    expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=2e-6)
    assert joints.tolist() == [[15, 20], [3, 4], [-17, -6]] and visible.tolist() == [1, 1, 0] and int(index) == 0
    assert (image.dtype, joints.dtype, visible.dtype) == (torch.float32,) * 3
    assert torch.equal(data[1, 0].image, image)  # no augmentation: no dependence on the epoch


def test_a_part_of_the_picture_is_enough(persons, folder):
    """Samples made of the part of the picture that a person's views reach equal those of the whole picture."""
    data = dataset(persons, folder, augmentation=Augmentation(scale=0.2, rotation_deg=20.0), seed=4)
    shares = []
    for epoch, index in [(epoch, index) for epoch in range(20) for index in range(len(persons))]:
        shot, person = data.shot((epoch, index)), persons[index]
        window = data.window(index)
        shares.append(window.image.size / load_image(person, folder).size)
        back = shot.view.transform.clone()  # of the part's pixels; now of the picture's
        back[:, 2] -= back[:, :2] @ torch.tensor([window.left, window.top]).double()
        whole = ops.crop(load_image(person, folder), back[None], SIZE, mean=MEAN, std=STD)[0]
        torch.testing.assert_close(data[epoch, index].image, whole, rtol=0, atol=1e-5)
    assert min(shares) < 0.8


def test_imagenet_statistics():
    assert MEAN == (0.485, 0.456, 0.406) and STD == (0.229, 0.224, 0.225)


def test_exif_orientation_is_ignored(tmp_path, persons):
    """Annotations refer to the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(stored).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(load_image(persons[0], tmp_path), stored)


def test_collate(persons, folder):
    data = dataset(persons, folder)
    batch = collate([data[0, 4], data[0, 2]])
    assert batch.image.shape == (2, 3, 64, 48) and batch.joints.shape == (2, 3, 2) and batch.visible.shape == (2, 3)
    assert batch.person.tolist() == [4, 2] and torch.equal(batch.image[1], data[0, 2].image)


@pytest.mark.parametrize("changes", [{}, {"cutout": 0.4, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3}])
def test_batches_hold_the_same_samples(persons, folder, changes):
    data = dataset(persons, folder, augmentation=Augmentation(**changes))
    keys = [(2, 4), (2, 2), (3, 4)]
    assert digest([list(Batches(data)[keys])]) == digest([list(collate([data[key] for key in keys]))])


def test_errors_name_the_file_or_the_field(persons, folder):
    data = dataset(persons, folder)
    with pytest.raises(InputError, match=r"key must be \(epoch, index\), as EpochBatches gives, got 3"):
        data[3]
    missing = dataclasses.replace(persons[0], file_name="none.png")
    with pytest.raises(InputError, match=r"image .*none\.png: cannot be read"):
        dataset([missing], folder)[0, 0]
    # an image that was scaled after it was annotated: every joint would silently lie elsewhere
    Image.new("RGB", (45, 35)).save(folder / "0.png")
    with pytest.raises(InputError, match=r"0\.png: must be 90x70, as its annotations state, is 45x35"):
        data[0, 0]
    with pytest.raises(InputError, match="annotation 101: must have 2 joints, has 3"):
        dataset(persons, folder, skeleton=Skeleton("two", ("a", "b")))[0, 1]
    for size in ((48, 0), (48.5, 64), None):
        with pytest.raises(InputError, match="PoseDataset: size: must be two positive integers"):
            dataset(persons, folder, size=size)
    for seed in (-1, 1.5):
        with pytest.raises(InputError, match="PoseDataset: seed must be an integer >= 0"):
            dataset(persons, folder, seed=seed)


def test_an_image_of_unknown_size_is_taken_as_it_is(persons, folder):
    unknown = dataclasses.replace(persons[0], image_size=None)
    Image.new("RGB", (45, 35)).save(folder / "0.png")
    assert load_image(unknown, folder).shape == (35, 45, 3)


def test_real_images_have_the_size_their_file_states(data_root):
    annotations = load_annotations(data_root / "coco_mini" / "annotations" / "person_keypoints_val2017.json")
    for person in annotations.persons[:10]:
        assert load_image(person, data_root / "coco_mini" / "val2017").shape[1::-1] == person.image_size


# Batches of an epoch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size"), [(11, 3), (12, 3), (5, 8), (1, 1), (64, 64), (100, 1)])
def test_every_person_at_most_once(count, batch_size):
    batches = EpochBatches(count, batch_size, seed=1, epoch=2)
    found = list(batches)
    full = max(count // batch_size, 1)  # the rest is left out, unless there is nothing else
    assert len(batches) == len(found) == full
    assert all(len(batch) == min(batch_size, count) for batch in found)
    indices = [index for batch in found for _, index in batch]
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(count))
    assert {epoch for batch in found for epoch, _ in batch} == {2}


def test_batches_are_a_pure_function_of_their_arguments():
    def order(**changes):
        return list(EpochBatches(**({"count": 50, "batch_size": 4, "seed": 1, "epoch": 0} | changes)))

    torch.manual_seed(0)
    np.random.seed(0)
    first = order()
    assert order() == first
    batches = EpochBatches(50, 4, 1, 0)
    assert list(batches) == list(batches) == first
    orders = [[i for batch in order(seed=s, epoch=e) for _, i in batch] for s in range(3) for e in range(3)]
    assert len({tuple(o) for o in orders}) == 9


@pytest.mark.parametrize("done", range(13))
def test_a_resumed_epoch_goes_on_with_the_very_batches(done):
    whole = list(EpochBatches(50, 4, seed=1, epoch=7))
    rest = EpochBatches(50, 4, seed=1, epoch=7, first_batch=done)
    assert list(rest) == whole[done:] and len(rest) == len(whole) - done


def test_over_many_epochs_everyone_is_shown_equally_often():
    """The persons left out for want of a full batch are others in each epoch."""
    counts = np.zeros(11)
    for epoch in range(300):
        for batch in EpochBatches(11, 4, seed=0, epoch=epoch):
            counts[[index for _, index in batch]] += 1
    assert counts.sum() == 300 * 8 and counts.min() > 300 * 8 / 11 - 40  # four standard errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 1, 0), "count must be > 0, got 0"),
        ((5, 0, 1, 0), "batch_size must be > 0, got 0"),
        ((5, 4, -1, 0), "seed and epoch must be >= 0, got -1 and 0"),
        ((5, 4, 1, -1), "seed and epoch must be >= 0, got 1 and -1"),
        ((9, 4, 1, 0, 3), r"first_batch must be 0\.\.2, got 3"),
        ((9, 4, 1, 0, -1), r"first_batch must be 0\.\.2, got -1"),
    ],
)
def test_batches_that_make_no_sense(arguments, message):
    with pytest.raises(InputError, match=message):
        EpochBatches(*arguments)


def test_no_files_are_left_open(persons, folder):
    data = dataset(persons, folder)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for index in range(len(persons)):
        data[0, index]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before
