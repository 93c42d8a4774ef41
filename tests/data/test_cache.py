"""The cache of decoded persons: samples to the bit as without it; never a stale, half or damaged file in use."""

import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hrpose.checkpoint import digest
from hrpose.data import cache as cache_module
from hrpose.data.augment import Augmentation
from hrpose.data.cache import cache_pixels
from hrpose.data.coco import Person
from hrpose.data.dataset import Batches, EpochBatches, PoseDataset
from hrpose.data.loading import load
from hrpose.errors import InputError
from hrpose.skeleton import Skeleton

TOY = Skeleton("toy", ("nose", "left_hand", "right_hand"), flip_pairs=((1, 2),))
SIZE = (24, 32)


def write_pictures(folder: Path, count: int = 4, side: int = 120) -> None:
    rng = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def make_persons(pictures: int = 4, count: int = 11) -> list[Person]:
    rng = np.random.default_rng(2)
    return [
        Person(i % pictures, f"{i % pictures}.png", (*rng.uniform(0, 60, 2), *rng.uniform(20, 50, 2)), 100 + i,
               tuple(map(tuple, rng.uniform(5, 110, (3, 2)).tolist())), (2, 1, i % 2))
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    write_pictures(images)
    return images


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def dataset(folder, persons=None, **changes):
    given = {"size": SIZE, "skeleton": TOY, "augmentation": Augmentation(cutout=0.2, contrast=0.3), "seed": 5}
    return PoseDataset(persons or make_persons(), folder, **(given | changes))


def files(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


def samples(data: PoseDataset, workers: int = 0, epochs: int = 2) -> str:
    batches = [
        list(batch)
        for epoch in range(epochs)
        for batch in load(Batches(data), workers, sampler=EpochBatches(len(data), 3, 5, epoch), batch_size=None)
    ]
    return digest([batches])


@pytest.mark.parametrize("limit", [None, 60_000])
def test_the_same_samples_to_the_bit(folder, store, limit):
    expected = samples(dataset(folder))
    for workers, expected_report in ((0, "made in"), (2, "found")):
        said = []
        data = dataset(folder)
        cache_pixels(data, store, workers, limit, said.append)
        assert expected_report in said[-1]
        assert samples(data) == expected and samples(data, 2) == expected
        kept = sum(data.windows.window(i) is not None for i in range(len(data)))
        assert kept == len(data.windows) and (kept == len(data) if limit is None else 0 < kept < len(data))
        assert limit is None or (store / files(store)[1]).stat().st_size <= limit


def test_workers_make_the_same_file(folder, store, tmp_path):
    for workers in (0, 2):
        cache_pixels(dataset(folder), store / str(workers), workers)
    assert files(store / "0") == files(store / "2")
    for name in files(store / "0"):
        assert (store / "0" / name).read_bytes() == (store / "2" / name).read_bytes()


def test_pixels_come_from_the_file(folder, store):
    data = dataset(folder)
    cache_pixels(data, store)
    for picture in folder.iterdir():
        picture.unlink()
    assert data[0, 3].image.shape == (3, 32, 24)
    assert not data.windows.window(3).image.flags.writeable
    again = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 10_000 and torch.equal(again[0, 3].image, data[0, 3].image)


def test_a_change_makes_another_file(folder, store):
    """Whatever decides on the pixels; what does not, finds the old file."""
    persons = make_persons()
    moved = [Person(**(vars(persons[0]) | {"box": (0.0, 0.0, 40.0, 40.0)})), *persons[1:]]
    cases = [{}, {"persons": moved}, {"persons": persons[::-1]}, {"size": (32, 32)}, {"padding": 1.5}]
    cases += [{"augmentation": None}, {"augmentation": Augmentation(scale=0.1)}]
    for count, changes in enumerate(cases, 1):
        cache_pixels(dataset(folder, **changes), store)
        assert len(files(store)) == 2 * count, changes
    before = files(store)
    for same in ({"seed": 9}, {"size": (48, 64)}, {"augmentation": Augmentation(saturation=0.5)}):
        data = dataset(folder, **same)
        expected = samples(data)
        cache_pixels(data, store)
        assert files(store) == before and samples(data) == expected

    picture = folder / "2.png"
    status = picture.stat()
    Image.new("RGB", (122, 120)).save(picture)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    data = dataset(folder)
    expected = samples(data)
    cache_pixels(data, store)
    assert len(files(store)) == len(before) + 2 and samples(data) == expected


@pytest.mark.parametrize("damage", ["no index", "half an index", "pixels cut", "no pixels"])
def test_what_is_not_whole_is_made_again(folder, store, damage):
    cache_pixels(dataset(folder), store)
    index, pixels = (store / name for name in files(store))
    whole = pixels.read_bytes()
    if damage == "no index":
        index.unlink()
    elif damage == "half an index":
        index.write_bytes(index.read_bytes()[:100])
    elif damage == "pixels cut":
        pixels.write_bytes(whole[:-1])
    else:
        pixels.unlink()
    said = []
    cache_pixels(dataset(folder), store, report=said.append)
    assert "made in" in said[-1] and pixels.read_bytes() == whole and len(files(store)) == 2


def test_errors_leave_nothing_behind(folder, store, monkeypatch):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:500])
    with pytest.raises(InputError, match=r"3\.png: is damaged"):
        cache_pixels(dataset(folder), store)
    assert files(store) == []
    (folder / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png: cannot be read"):
        cache_pixels(dataset(folder), store)
    write_pictures(folder)
    monkeypatch.setattr(cache_module.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match=r"cache .*: cannot be written \(No space left\); 0\.00 GB were written"):
        cache_pixels(dataset(folder), store)
    assert files(store) == []
    monkeypatch.undo()
    with pytest.raises(InputError, match="cache: limit must be > 0, got 0"):
        cache_pixels(dataset(folder), store, limit=0)


def test_parts_of_processes_that_are_gone_are_removed(folder, store):
    store.mkdir()
    old, new = store / ".abc.pixels.1.part", store / ".abc.pixels.2.part"
    for part in (old, new):
        part.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    cache_pixels(dataset(folder), store)
    assert not old.exists() and new.exists()


def kill(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(monkeypatch):
    def some(*arguments, **options):
        for count, pictures in enumerate(load(*arguments, **options)):
            kill() if count == 2 else None
            yield pictures

    monkeypatch.setattr(cache_module, "load", some)


def killed_once_renamed(monkeypatch):
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (rename(*names), kill()))


MOMENTS = {
    "while it writes": (killed_while_writing, 0),
    "before it renames": (lambda patch: patch.setattr(os, "fsync", kill), 0),
    "once it has renamed": (killed_once_renamed, 1),
    "before the index": (lambda patch: patch.setattr(cache_module, "write_atomically", kill), 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9(folder, store, monkeypatch, moment):
    """Whatever a killed process leaves behind is not taken for a whole file, and the next one is right."""
    patch, pixel_files = MOMENTS[moment]
    child = os.fork()
    if child == 0:
        patch(monkeypatch)
        cache_pixels(dataset(folder), store)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = files(store)
    assert len([name for name in left if name.endswith(".pixels")]) == pixel_files
    assert not any(name.endswith(".npy") for name in left)
    data, said = dataset(folder), []
    cache_pixels(data, store, report=said.append)
    assert "made in" in said[-1] and samples(data) == samples(dataset(folder))
