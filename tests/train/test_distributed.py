"""Several processes train and score as one does: same samples, same gradients, same scores, and none waits in vain."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_jobs import (
    estimate_and_score,
    evaluate_broken,
    network,
    on_ranks,
    stopped_and_resumed,
    train,
    train_on_bad,
    train_on_unlike,
    train_until_killed,
    wait_for_the_first,
)
from test_fit import TINY, draw_persons, outcome

import hrpose
from hrpose.checkpoint import digest, load_checkpoint
from hrpose.cli import main
from hrpose.data.coco import load_annotations
from hrpose.data.dataset import EpochBatches
from hrpose.errors import InputError
from hrpose.ranks import ALONE, LostRank, joined
from hrpose.train.fit import LAST

ROOT = str(Path(hrpose.__file__).parents[1])
SIX = replace(TINY, batch_size=6)  # 2 batches of 14 persons, divisible by 2 and 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dots")


@pytest.fixture(scope="module")
def persons(folder: Path):
    return draw_persons(folder, 14)


def difference(some: dict, others: dict) -> float:
    return max(float((some[name].double() - others[name].double()).abs().max()) for name in some)


TWO_EPOCHS = replace(TINY, epochs=2, drops=(1,))  # 6 steps


@pytest.mark.parametrize(
    "more", [{}, {"sync_bn": True}, {"accumulate": 2, "clip_norm": 0.01, "ema_decay": 0.9}],
    ids=["no-norm", "sync-bn", "options"],
)  # fmt: skip
def test_two_processes_equal_one_in_float64(persons, folder, tmp_path, more):
    recipe, sync_bn = replace(TWO_EPOCHS, **more), "sync_bn" in more
    alone, losses = train(ALONE, persons, folder, tmp_path / "one", recipe, True, sync_bn)
    found = on_ranks(2, train, persons, folder, tmp_path / "two", recipe, True, sync_bn)
    for weights, two_losses in found:
        assert difference(weights, alone) <= 1e-12
        assert two_losses == pytest.approx(losses, rel=1e-7)  # of single precision
    assert digest(found[0]) == digest(found[1])
    assert difference(alone, network(0, True).state_dict()) > 1e-3  # it has learnt


@pytest.mark.parametrize("broken", ["averaging", "stride", pytest.param("norm", marks=pytest.mark.slow)])
def test_two_processes_would_differ_without(persons, folder, tmp_path, broken):
    """Averaging, strided shares, shared batch norm: each is needed for the test above to hold."""
    norm = broken == "norm"
    alone, _ = train(ALONE, persons, folder, tmp_path / "one", TWO_EPOCHS, True, norm)
    found = on_ranks(2, train, persons, folder, tmp_path / "two", TWO_EPOCHS, True, norm, broken)
    assert min(difference(weights, alone) for weights, _ in found) > 1e-6
    assert (digest(found[0][0]) == digest(found[1][0])) == (broken != "averaging")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_a_batch_are_the_batch(world):
    whole = list(EpochBatches(14, 6, 5, 3, 1))
    shares = [list(EpochBatches(14, 6, 5, 3, 1, rank, world)) for rank in range(world)]
    for number, batch in enumerate(whole):
        assert [key for keys in zip(*(share[number] for share in shares), strict=True) for key in keys] == batch
    with pytest.raises(InputError, match=r"rank must be 0\.\.1, got 2"):
        EpochBatches(14, 6, 5, 3, 1, 2, 2)


def test_batch_that_cannot_be_shared_is_refused(persons, folder, tmp_path):
    for world, recipe, people, size in ((3, TINY, persons, 4), (2, replace(TINY, batch_size=32), persons[:13], 13)):
        rule = f"must be divisible by the number of processes, {world}, among whom it is shared, got {size}"
        with pytest.raises(InputError, match=rule):
            train(replace(ALONE, world=world), people, folder, tmp_path, recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_signal_to_one_rank_saves_and_the_resumed_run_is_the_same(persons, folder, tmp_path, world):
    recipe = replace(SIX, epochs=2, drops=(1,)) if world == 3 else TINY
    found = on_ranks(world, stopped_and_resumed, persons, folder, tmp_path, recipe)
    assert found == [(found[0][0], found[0][0], (0, 2))] * world
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")  # log, last.pt, best.pt


@pytest.mark.slow
def test_running_statistics_are_the_mean_of_all_ranks(persons, folder, tmp_path):
    """After one step: momentum times the mean of what each rank saw of its own share."""
    recipe = replace(TINY, epochs=1, batch_size=14)
    found = on_ranks(2, train, persons, folder, tmp_path, recipe)
    apart = on_ranks(2, train, persons, folder, tmp_path, recipe, False, True, "statistics")
    buffers = [name for name in found[0][0] if "running" in name]
    for name in buffers:
        assert torch.equal(found[0][0][name], found[1][0][name])
        torch.testing.assert_close(found[0][0][name], (apart[0][0][name] + apart[1][0][name]) / 2)
    assert any(not torch.equal(apart[0][0][name], apart[1][0][name]) for name in buffers)


def test_step_that_is_not_finite_on_one_rank_is_skipped_by_all(persons, folder, tmp_path):
    recipe = replace(TINY, epochs=1)
    order = [[index for _, index in batch] for batch in EpochBatches(14, 4, TINY.seed, 0)]
    bad = order[1][1]  # which the second rank has in the second step
    (lines, weights, finite), (silent, same, _) = on_ranks(2, train_on_bad, persons, folder, tmp_path, [bad], recipe)
    share = [100 + index for index in order[1][1::2]]
    skipped = f"epoch 1, batch 2, rank 1: the loss is not finite, the step is skipped; annotations {share}"
    assert [line for line in lines if "skipped" in line] == [skipped]
    assert weights == same and finite and silent == []
    found = on_ranks(2, train_on_bad, persons, folder, tmp_path, range(14), replace(recipe, max_bad_steps=2))
    message = "epoch 1, batch 2, rank 0, 1: the loss was not finite 2 times in a row"
    assert all(lines[-1].startswith(message) for lines, _, _ in found)


def write_coco(folder: Path, persons, count: int) -> Path:
    """`count` persons in the 14 pictures, several in each."""
    names = [["left_eye", "right_eye", "nose", "left_foot", "right_foot"], [[0, 1], [3, 4]]]
    category = {"id": 1, "name": "person", "keypoints": names[0], "flip_pairs": names[1], "sigmas": [0.5] * 5}
    annotations = []
    for i in range(count):
        like, shift = persons[i % 14], i / count  # which makes each person's box another
        keypoints = [value for x, y in like.joints for value in (x, y, 2)]
        box = [like.box[0] + shift, *like.box[1:]]
        annotations.append(
            {"id": i + 1, "image_id": i % 14, "category_id": 1, "bbox": box, "area": like.area, "iscrowd": 0,
             "keypoints": keypoints, "num_keypoints": 5}
        )  # fmt: skip
    images = [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 48} for i in range(14)]
    path = folder / f"{count}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [category]}))
    return path


@pytest.mark.parametrize("world", [2, 3])
def test_evaluation_counts_every_person_once(persons, folder, world):
    path = write_coco(folder, persons, 101)
    _, found, score = estimate_and_score(ALONE, path, folder, 0)
    assert score.metrics["persons"] == 101 and score.metrics["AP"] > 0
    shared = on_ranks(world, estimate_and_score, path, folder, 0)
    assert sum(done for done, _, _ in shared) == 101 and min(done for done, _, _ in shared) >= 101 // world - 8
    for _, theirs, their_score in shared:
        assert all(np.array_equal(mine, other) for mine, other in zip(found, theirs, strict=True))
        assert their_score.metrics == score.metrics and their_score.results == score.results
        assert np.array_equal(their_score.keypoints, score.keypoints)


def test_image_that_one_rank_cannot_read_is_every_ranks_error(persons, folder, tmp_path):
    path = write_coco(tmp_path, persons, 14)
    for person in persons:
        os.link(folder / person.file_name, tmp_path / person.file_name)
    (tmp_path / "3.png").unlink()
    (tmp_path / "3.png").write_bytes(b"no image")
    error = (InputError, f"image {tmp_path / '3.png'}: is not an image that Pillow can read")
    found = on_ranks(2, evaluate_broken, path, tmp_path)
    assert {message for _, message in found} == {error[1]} and sorted(kind.__name__ for kind, _ in found) == [
        "ErrorOfRank", "InputError",
    ]  # fmt: skip
    people = load_annotations(path).persons
    found = on_ranks(2, train, people, tmp_path, tmp_path / "run")  # here there is no time to ask the others
    assert sorted(kind.__name__ for kind, _ in found) == ["InputError", "LostRank"] and error in found


def test_rank_that_is_killed_ends_the_others_with_a_sentence(persons, folder, tmp_path):
    started = time.monotonic()
    (kind, message), gone = on_ranks(2, train_until_killed, persons, folder, tmp_path)
    assert gone is None and kind is LostRank and time.monotonic() - started < 60
    assert message.startswith("another process of this run has ended or does not answer, its own message says why (")
    assert load_checkpoint(tmp_path / LAST).training["progress"]["epoch"] == 1
    assert len(train(ALONE, persons, folder, tmp_path, resume=True)[1]) == 3  # one process alone goes on with it


def test_ranks_with_unlike_data_are_refused(persons, folder, tmp_path):
    error = (InputError, "fit: network, recipe and data must be the same on all ranks")
    assert on_ranks(2, train_on_unlike, persons, folder, tmp_path) == [error, error]


def test_waiting_for_long_work_has_its_own_limit(persons, folder):
    assert on_ranks(2, wait_for_the_first, 4.0, 60.0) == [[0, 1], [0, 1]]
    assert on_ranks(2, wait_for_the_first, 4.0, 1.0)[1][0] is LostRank


def test_alone_nothing_is_asked_of_anybody():
    assert ALONE.first and ALONE.gather(3) == [3] and ALONE.gather_numbers([1.0, 2.0]) == [[1.0, 2.0]]
    assert ALONE.on_all(lambda: 4) == [4] and ALONE.on_first(lambda: 5) == 5


def test_environment_that_is_not_whole(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not; start with torchrun"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE must be a number, got 'two'"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as ranks:
        assert ranks == ALONE


def torchrun(arguments: list[str], restarts: int = 0) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, *launcher, "-m", "hrpose", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def worker_of(launcher: subprocess.Popen, rank: int) -> int | None:
    """The process that is rank number `rank`."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return int(pid)
    return None


def wait_for(condition, launcher: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_cache_and_ablation_under_torchrun(persons, folder, tmp_path):
    """Rank 0 decodes, the other one finds the file; the table and the weights are those of a single process."""
    path = write_coco(folder, persons, 14)
    command = ["ablate", "III", "--only", "dpn1_32 dilation=4", "--seeds", "1", "--width", "32", "--height", "32"]
    command += ["--data", str(path), "--images", str(folder), "--val", str(path), "--epochs", "2", "--sync-bn"]
    command += ["--set", "batch_size=4", "--set", "precision=fp32", "--device", "cpu", "--workers", "0"]
    command += ["--cache", str(tmp_path / "cache"), "--out"]
    launcher = torchrun([*command, str(tmp_path / "two")])
    printed = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, printed
    assert printed.count("cache: decoding 14 persons") == 1 and printed.count("| dpn1_32 dilation=4 | 1 | 2 |") == 1
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 1

    assert main([*command, str(tmp_path / "one")]) == 0
    runs = [load_checkpoint(tmp_path / name / "dpn1_32-dilation-4" / "seed0" / LAST) for name in ("one", "two")]
    assert difference(runs[0].weights, runs[1].weights) < 0.02  # 20 times lr: Adam makes steps of rounding errors
    tables = [json.loads((tmp_path / name / "table.json").read_text())[0] for name in ("one", "two")]
    assert tables[0]["epochs"] == tables[1]["epochs"] == [2]

    launcher = torchrun([*command, str(tmp_path / "two")])  # all there
    printed = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0 and printed.count("is complete") == 1, printed


@pytest.mark.slow
def test_command_line_under_torchrun(persons, folder, tmp_path):
    """Killed with and without restarts, stopped by SIGTERM, resumed; a run of somebody else is never gone on with."""
    path = write_coco(folder, persons, 28)
    arguments = ["train", "--data", str(path), "--images", str(folder), "--val", str(path), "--model", "dpn1_32"]
    arguments += ["--width", "32", "--height", "32", "--epochs", "20", "--set", "batch_size=4", "--set"]
    arguments += ["precision=fp32", "--device", "cpu", "--workers", "0", "--checkpoint-seconds", "0.05", "--out"]

    whole = torchrun([*arguments, str(tmp_path / "whole")])
    printed = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0 and printed.count("epoch 20/20") == 1 and printed.count("28 persons") == 1

    def begun(out: Path) -> bool:
        return (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) > 2

    out = tmp_path / "restarted"
    launcher = torchrun([*arguments, str(out)], restarts=2)
    wait_for(lambda: begun(out), launcher)
    first = worker_of(launcher, 1)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: worker_of(launcher, 0) not in (None, first), launcher)
    printed = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0 and outcome(out) == outcome(tmp_path / "whole"), printed

    launcher = torchrun([*arguments, str(out)], restarts=1)  # refused, also when torchrun tries again
    printed = launcher.communicate(timeout=120)[0]
    assert launcher.returncode != 0 and printed.count("holds a run already") == 2

    out = tmp_path / "stopped"
    launcher = torchrun([*arguments, str(out)])
    wait_for(lambda: begun(out), launcher)
    launcher.send_signal(signal.SIGTERM)
    printed = launcher.communicate(timeout=60)[0]
    assert launcher.returncode != 0 and printed.count("the same command with --resume goes on from here") == 1

    launcher = torchrun([*arguments, str(out), "--resume"])
    before = len((out / "log.jsonl").read_text().splitlines())
    wait_for(lambda: len((out / "log.jsonl").read_text().splitlines()) > before + 1, launcher)
    started = time.monotonic()
    os.kill(worker_of(launcher, 1), signal.SIGKILL)
    printed = launcher.communicate(timeout=60)[0]
    assert launcher.returncode != 0 and time.monotonic() - started < 45
    assert "another process of this run has ended" in printed and "RuntimeError" not in printed

    launcher = torchrun([*arguments, str(out), "--resume"])
    printed = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0 and outcome(out) == outcome(tmp_path / "whole"), printed
