"""Training: it learns, it can be stopped anywhere without a trace in the result, and it says what goes wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import hrpose
from hrpose.checkpoint import digest, load_checkpoint, save_checkpoint
from hrpose.data.augment import Augmentation
from hrpose.data.coco import Person
from hrpose.data.dataset import PoseDataset, Sample
from hrpose.data.feed import feed
from hrpose.errors import InputError
from hrpose.infer.protocol import Protocol, estimate
from hrpose.models import create_model
from hrpose.skeleton import Skeleton
from hrpose.train.fit import BEST, LAST, Diverged, Progress, fit
from hrpose.train.recipe import Recipe
from hrpose.train.step import BufferCopy, StepOptions, train_step
from hrpose.train.stop import Interrupted
from hrpose.train.threads import slowdown_of_threads

LOOP = sys.modules[fit.__module__]  # `hrpose.train.fit` written out is the function

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
DOTS = Skeleton("dots", ("left_eye", "right_eye", "nose", "left_foot", "right_foot"), flip_pairs=((0, 1), (3, 4)))
PLAIN = Augmentation(scale=0.0, rotation_deg=0.0, flip_probability=0.0, half_body_probability=0.0)
TINY = Recipe(epochs=3, batch_size=4, lr=1e-3, drops=(2,), precision="fp32", seed=5)


def draw_persons(folder: Path, count: int, side: int = 48) -> list[Person]:
    """Grey pictures with five coloured dots each, which are the joints."""
    rng = np.random.default_rng(1)
    persons = []
    for i in range(count):
        picture = Image.new("RGB", (side, side), (90, 90, 90))
        joints = rng.uniform(0.15 * side, 0.85 * side, (5, 2))
        for (x, y), color in zip(joints, COLORS, strict=True):
            ImageDraw.Draw(picture).ellipse([x - 4, y - 4, x + 4, y + 4], fill=color)
        picture.save(folder / f"{i}.png")
        box = (2.0, 2.0, side - 4.0, side - 4.0)
        persons.append(Person(i, f"{i}.png", box, 100 + i, tuple(map(tuple, joints.tolist())), (2,) * 5, box[2] ** 2))
    return persons


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dots")


@pytest.fixture(scope="module")
def persons(folder: Path) -> list[Person]:
    return draw_persons(folder, 14)  # 3 batches of 4 an epoch: 2 persons are left over


def dataset(
    persons: list[Person], folder: Path, recipe: Recipe = TINY, size: tuple[int, int] = (32, 32)
) -> PoseDataset:
    return PoseDataset(persons, folder, size, DOTS, recipe.augmentation, recipe.seed)


def weight_score(model: torch.nn.Module) -> dict[str, float]:
    """A stand-in for AP that tells networks apart and is best in the second epoch of TINY."""
    assert not model.training
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    return {"AP": -abs(total - 2730.0)}


def run_fit(persons, folder, out, recipe=TINY, validate=weight_score, seed=0, report=lambda line: None, **options):
    torch.manual_seed(seed)
    model = create_model("dpn1_32", 5)
    return fit(model, dataset(persons, folder, recipe), recipe, out, validate, report=report, **options)


def outcome(out: Path) -> dict[str, object]:
    """All that a run leaves behind, except for how long it took."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timing = ("seconds", "images_per_s", "waiting")
    timeless = [{k: v for k, v in line.items() if k not in timing} for line in lines]
    files = {name: load_checkpoint(out / name) for name in (LAST, BEST) if (out / name).exists()}
    return {"log": timeless} | {name: digest([c.weights, c.training]) for name, c in files.items()}


@pytest.fixture(scope="module")
def whole(persons, folder, tmp_path_factory) -> dict[str, object]:
    """What TINY leaves behind when nothing stops it."""
    out = tmp_path_factory.mktemp("whole")
    run_fit(persons, folder, out)
    return outcome(out)


class Killed(BaseException):
    """Ends a run on the spot, as kill -9 would."""


def run_until_done(out: Path, start) -> int:
    """Call start(resume) until it is not killed any more; returns how often it was."""
    kills = 0
    while True:
        try:
            start((out / LAST).exists())
            return kills
        except Killed:
            kills += 1


def test_sixteen_persons_are_learnt_by_heart(tmp_path):
    people = draw_persons(tmp_path, 16, side=64)
    recipe = Recipe(30, 8, 5e-3, (24,), augmentation=PLAIN, precision="fp32", sigma=1.0)
    data = PoseDataset(people, tmp_path, (64, 64), DOTS, PLAIN)
    torch.manual_seed(0)
    model = create_model("dpn1_32", 5)
    log = fit(model, data, recipe, tmp_path / "run", report=lambda line: None)
    samples = [data[0, i] for i in range(16)]
    crops, joints = torch.stack([s.image for s in samples]), torch.stack([s.joints for s in samples])
    identity = torch.eye(2, 3, dtype=torch.float64).repeat(16, 1, 1)
    found, _ = estimate(model.eval(), crops, identity, DOTS, Protocol(flip=False))
    right = (found - joints).norm(dim=2) <= 0.2 * 60 * 64 / 75  # the box of 60 px fills the input with its margins
    assert right.float().mean() > 0.9
    assert [entry["epoch"] for entry in log] == list(range(30))
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    assert log[0]["lr"] == 5e-3 and log[-1]["lr"] == pytest.approx(5e-4)


def test_files_of_a_run(persons, folder, tmp_path, whole):
    lines = []
    log = run_fit(persons, folder, tmp_path, report=lines.append)
    assert outcome(tmp_path) == whole  # the same once more
    assert [(e["epoch"], e["step"], e["skipped"]) for e in log] == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]
    assert [e["lr"] for e in log] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert log == [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(e["images_per_s"] == pytest.approx(12 / e["seconds"], rel=1) for e in log if e["seconds"])
    assert [line.split(",")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    last = load_checkpoint(tmp_path / LAST)
    assert last.training["progress"]["epoch"] == 3 and last.size == (32, 32) and last.skeleton == DOTS
    assert last.training["recipe"] == TINY.to_dict()
    assert not list(tmp_path.glob(".*"))


def test_waiting_for_data_is_reported_with_advice(persons, folder, tmp_path, monkeypatch):
    def slow(*arguments):
        for batch in feed(*arguments):
            time.sleep(0.1)
            yield batch

    monkeypatch.setattr(LOOP, "feed", slow)
    monkeypatch.setattr(LOOP, "_SHORT_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(LOOP, "_LONG_WAIT", 0.01)
    lines = []
    log = run_fit(persons, folder, tmp_path / "slow", replace(TINY, epochs=2, drops=()), report=lines.append)
    for entry, line in zip(log, (lines[0], lines[2]), strict=True):
        assert 0.3 <= entry["waiting"] * entry["seconds"] + 0.1 and entry["waiting"] <= 1
        assert f"{100 * entry['waiting']:.0f} % waiting for data" in line
    assert lines[1].endswith("what may help: more --workers than 0, --cache DIR") and len(lines) == 3
    monkeypatch.setattr(LOOP, "_SHORT_WAIT_SECONDS", 1e9)
    run_fit(persons, folder, tmp_path / "short", replace(TINY, epochs=1), report=lines.append)
    assert len(lines) == 4


def test_best_is_the_epoch_with_the_highest_score(persons, folder, tmp_path):
    seen, scores = [], iter([0.5, None, 0.75, 0.75, 0.25])

    def validate(model):
        seen.append(digest({k: v.clone() for k, v in model.state_dict().items()}))
        return {"AP": next(scores), "more": "text"}

    run_fit(persons, folder, tmp_path, replace(TINY, epochs=5), validate)
    best = load_checkpoint(tmp_path / BEST)
    assert digest(best.weights) == seen[3] and best.training["entry"]["epoch"] == 3  # of equals the last
    assert best.training["entry"]["AP"] == 0.75 and best.training["entry"]["more"] == "text"
    assert len(set(seen)) == 5


def test_last_epochs_are_kept(persons, folder, tmp_path):
    def kept() -> dict[str, int]:
        return {p.name: load_checkpoint(p).training["entry"]["epoch"] for p in tmp_path.glob("epoch-*")}

    seen = []

    def validate(model):
        seen.append(digest({k: v.clone() for k, v in model.state_dict().items()}))
        if len(seen) == 4:
            raise Killed
        return {"AP": 1.0}

    recipe = replace(TINY, epochs=4)
    with pytest.raises(Killed):
        run_fit(persons, folder, tmp_path, recipe, validate, keep=2)
    assert kept() == {"epoch-002.pt": 1, "epoch-003.pt": 2}
    run_fit(persons, folder, tmp_path, recipe, validate, keep=2, resume=True)
    assert kept() == {"epoch-003.pt": 2, "epoch-004.pt": 3}
    assert [digest(load_checkpoint(tmp_path / f"epoch-00{n}.pt").weights) for n in (3, 4)] == [seen[2], seen[4]]
    run_fit(persons, folder, tmp_path, replace(TINY, epochs=1), validate=None)  # a new run; none are asked for
    assert kept() == {}
    run_fit(persons, folder, tmp_path, replace(TINY, epochs=1), validate=None, keep=1)
    assert kept() == {"epoch-001.pt": 0}


def test_a_negative_score_counts_and_a_new_run_drops_the_best_of_the_old(persons, folder, tmp_path):
    recipe = replace(TINY, epochs=1)
    run_fit(persons, folder, tmp_path, recipe, lambda model: {"minus error": -250.0}, score="minus error")
    assert load_checkpoint(tmp_path / BEST).training["entry"]["minus error"] == -250.0
    run_fit(persons, folder, tmp_path, recipe, validate=None)
    assert not (tmp_path / BEST).exists()


def test_killed_in_every_step(persons, folder, tmp_path, monkeypatch, whole):
    """Each process does one step and dies in its second; with a checkpoint after each step the next one repeats
    that."""
    count = 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count > 1:
            raise Killed
        return train_step(*arguments)

    def start(resume):
        nonlocal count
        count = 0
        run_fit(persons, folder, tmp_path, resume=resume, seed=int(resume), checkpoint_seconds=0)

    monkeypatch.setattr(LOOP, "train_step", counted)
    assert run_until_done(tmp_path, start) == 8
    assert outcome(tmp_path) == whole


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_save(persons, folder, tmp_path, monkeypatch, whole, after):
    """The n-th process dies before, or right after, it writes its n-th checkpoint."""
    allowed = saved = 0

    def save(checkpoint, path):
        nonlocal saved
        saved += 1
        if saved < allowed or after:
            save_checkpoint(checkpoint, path)
        if saved == allowed:
            raise Killed

    def start(resume):
        nonlocal allowed, saved
        allowed, saved = allowed + 1, 0
        run_fit(persons, folder, tmp_path, resume=resume, seed=int(resume), checkpoint_seconds=1e9)

    monkeypatch.setattr(LOOP, "save_checkpoint", save)
    assert run_until_done(tmp_path, start) >= 3
    assert outcome(tmp_path) == whole


@pytest.mark.parametrize("where", ["validate", "report"])
def test_killed_while_an_epoch_ends(persons, folder, tmp_path, whole, where):
    """In the validation, or between the log's entry and the checkpoint after it: scored again, logged once."""
    calls = 0

    def deadly(result):
        nonlocal calls
        calls += 1
        if calls % 2:
            raise Killed
        return result

    def start(resume):
        validate = (lambda model: deadly(weight_score(model))) if where == "validate" else weight_score
        report = deadly if where == "report" else lambda line: None
        run_fit(persons, folder, tmp_path, validate=validate, report=report, resume=resume)

    assert run_until_done(tmp_path, start) == 3
    assert outcome(tmp_path) == whole


def test_bf16_resumes_bit_for_bit(persons, folder, tmp_path, monkeypatch):
    recipe = replace(TINY, precision="bf16", schedule="cosine", warmup_steps=4)
    run_fit(persons, folder, tmp_path / "whole", recipe)
    count = 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count % 4 == 0:
            raise Killed
        return train_step(*arguments)

    monkeypatch.setattr(LOOP, "train_step", counted)
    out = tmp_path / "killed"
    kills = run_until_done(
        out, lambda resume: run_fit(persons, folder, out, recipe, resume=resume, checkpoint_seconds=0)
    )
    assert kills == 2 and outcome(out) == outcome(tmp_path / "whole")


# All that has a state of its own, at once: three cycles of an epoch, averaged weights, momentum, parts of batches.
FULL = replace(
    TINY, schedule="sgdr", cycle_epochs=1.0, cycle_factor=1, optimizer="sgd", lr=0.1, ema_decay=0.9, accumulate=2,
    clip_norm=0.01, warmup_steps=2,
)  # fmt: skip


def test_all_options_together_resume_bit_for_bit(persons, folder, tmp_path, monkeypatch):
    run_fit(persons, folder, tmp_path / "whole", FULL)
    count = 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise Killed
        return train_step(*arguments)

    monkeypatch.setattr(LOOP, "train_step", counted)
    out = tmp_path / "killed"
    kills = run_until_done(out, lambda resume: run_fit(persons, folder, out, FULL, resume=resume, checkpoint_seconds=0))
    assert kills == 4 and outcome(out) == outcome(tmp_path / "whole")


def test_averaged_weights_are_validated_kept_and_returned(persons, folder, tmp_path):
    seen = []

    def validate(model):
        assert not model.training
        seen.append(digest({k: v.clone() for k, v in model.state_dict().items()}))
        return {"AP": float(len(seen))}

    torch.manual_seed(0)
    model = create_model("dpn1_32", 5)
    fit(model, dataset(persons, folder, FULL), FULL, tmp_path, validate, report=lambda line: None)
    last, best = load_checkpoint(tmp_path / LAST), load_checkpoint(tmp_path / BEST)
    assert len(set(seen)) == 3
    assert digest(best.weights) == digest(last.weights) == digest(dict(model.state_dict())) == seen[-1]
    assert last.training["averaged_steps"] == 9
    trained = last.training["trained"]
    assert digest(trained) != seen[-1]
    run_fit(persons, folder, tmp_path / "plain", replace(FULL, ema_decay=0.0))
    assert digest(load_checkpoint(tmp_path / "plain" / LAST).weights) == digest(trained)


def test_skipped_steps_are_not_averaged(persons, folder, tmp_path):
    data = Poisoned(persons, folder, (32, 32), DOTS, FULL.augmentation, FULL.seed)
    data.bad = frozenset({3})
    log = fit(create_model("dpn1_32", 5), data, FULL, tmp_path, report=lambda line: None)
    assert log[-1]["skipped"] >= 1
    last = load_checkpoint(tmp_path / LAST)
    assert last.training["averaged_steps"] == 9 - log[-1]["skipped"]
    assert all(bool(t.isfinite().all()) for t in last.training["trained"].values())


class Compiled(torch.nn.Module):
    """As torch.compile's, which prefixes the names in the state dict."""

    calls = 0

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, images):
        Compiled.calls += 1
        return self._orig_mod(images)


def test_compiled_network_is_trained_under_the_names_of_the_plain_one(persons, folder, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(torch, "compile", Compiled)
    run_fit(persons, folder, tmp_path, replace(TINY, compile=True))
    assert Compiled.calls == 9
    plain, last = create_model("dpn1_32", 5), load_checkpoint(tmp_path / LAST)
    assert last.weights.keys() == plain.state_dict().keys()
    assert outcome(tmp_path)["log"] == whole["log"]


def test_compiling_that_fails_is_one_sentence(persons, folder, tmp_path, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    class Failing(Compiled):
        def forward(self, images):
            raise TorchDynamoException("\nno C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", Failing)
    with pytest.raises(
        InputError, match=r"^compile: torch.compile failed \(no C\+\+ compiler\); train with compile=false"
    ):
        run_fit(persons, folder, tmp_path, replace(TINY, compile=True))


@pytest.mark.slow
def test_network_is_compiled_by_torch(persons, folder, tmp_path, whole):
    run_fit(persons, folder, tmp_path, replace(TINY, compile=True))
    assert [entry["loss"] for entry in outcome(tmp_path)["log"]] == pytest.approx(
        [entry["loss"] for entry in whole["log"]], rel=1e-3
    )


def test_workers_change_nothing_and_the_global_generator_is_left_alone(persons, folder, tmp_path, whole):
    torch.manual_seed(0)
    model = create_model("dpn1_32", 5)
    before = torch.get_rng_state()
    fit(model, dataset(persons, folder), TINY, tmp_path, weight_score, workers=2, report=lambda line: None)
    assert torch.equal(torch.get_rng_state(), before)
    assert outcome(tmp_path) == whole


def test_crops_made_on_the_device_train_the_same(persons, folder, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(LOOP, "feed", lambda *arguments: feed(*arguments, crop_on_device=True))
    run_fit(persons, folder, tmp_path)
    assert outcome(tmp_path) == whole


def test_log_that_was_cut_or_has_half_a_line(persons, folder, tmp_path, whole):
    class Enough(Exception):
        pass

    def stop(line):
        if line.startswith("epoch 2"):
            raise Enough

    with pytest.raises(Enough):
        run_fit(persons, folder, tmp_path, report=stop)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"kind": "step", "epo\x00\xff')
    run_fit(persons, folder, tmp_path, resume=True)
    assert outcome(tmp_path) == whole
    log.write_text("")  # lost altogether: the weights do not depend on it
    assert run_fit(persons, folder, tmp_path, resume=True) == []


def test_a_finished_run_is_left_alone(persons, folder, tmp_path):
    run_fit(persons, folder, tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    lines = []
    log = run_fit(persons, folder, tmp_path, resume=True, report=lines.append)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before
    assert len(log) == 3 and lines == [f"the run in {tmp_path} is complete: all 3 epochs are done"]


def test_a_checkpoint_from_before_cutout_and_colours_is_gone_on_with(persons, folder, tmp_path):
    run_fit(persons, folder, tmp_path, replace(TINY, epochs=1))
    last = load_checkpoint(tmp_path / LAST)
    for name in ("cutout", "brightness", "contrast", "saturation"):
        del last.training["recipe"]["augmentation"][name]
    save_checkpoint(last, tmp_path / LAST)
    lines = []
    run_fit(persons, folder, tmp_path, replace(TINY, epochs=1), resume=True, report=lines.append)
    assert lines == [f"the run in {tmp_path} is complete: all 1 epochs are done"]


def test_resume_refuses_another_run(persons, folder, tmp_path):
    with pytest.raises(InputError, match=r"holds no run \(last.pt\)"):
        run_fit(persons, folder, tmp_path / "nothing", resume=True)
    out = tmp_path / "run"
    run_fit(persons, folder, out, replace(TINY, epochs=1))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    base = replace(TINY, epochs=1)
    moved = [replace(persons[0], box=(0.0, 0.0, 40.0, 40.0)), *persons[1:]]
    cases = [
        (persons, replace(base, epochs=2), r"is a run with epochs = 1, asked to go on with epochs = 2"),
        (persons, replace(base, lr=2e-3), r"is a run with lr = 0.001, asked to go on with lr = 0.002"),
        (persons[:-1], base, r"is a run with persons = 14, asked to go on with persons = 13"),
        (moved, base, r"is a run on other data"),
    ]
    for people, recipe, message in cases:
        with pytest.raises(InputError, match=message):
            run_fit(people, folder, out, recipe, resume=True)
    data = PoseDataset(persons, folder, (64, 32), DOTS, base.augmentation, base.seed)
    with pytest.raises(InputError, match=r"is a run with input = \(32, 32\), asked to go on with input = \(64, 32\)"):
        fit(create_model("dpn1_32", 5), data, base, out, resume=True)
    with pytest.raises(InputError, match=r"is a run with network = .*dpn1_32.*asked to go on with .*dpn2_32"):
        fit(create_model("dpn2_32", 5), dataset(persons, folder, base), base, out, resume=True)
    (out / LAST).write_bytes((out / BEST).read_bytes())
    with pytest.raises(InputError, match="holds no state of a run to go on with"):
        run_fit(persons, folder, out, base, resume=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before | {LAST: before[BEST]}


def test_goes_on_from_a_checkpoint_of_the_first_format(persons, folder, tmp_path, whole):
    """Files of early versions have neither the fingerprint of the data nor the seconds, nor newer fields of recipes."""

    class Enough(Exception):
        pass

    def stop(line):
        raise Enough

    with pytest.raises(Enough):
        run_fit(persons, folder, tmp_path, report=stop)
    checkpoint = load_checkpoint(tmp_path / LAST)
    del checkpoint.training["data"], checkpoint.training["progress"]["seconds"]
    del checkpoint.training["recipe"]["hard_keypoints"]
    save_checkpoint(checkpoint, tmp_path / LAST)
    with pytest.raises(InputError, match="a run with hard_keypoints = None, asked to go on with hard_keypoints = 3"):
        run_fit(persons, folder, tmp_path, replace(TINY, hard_keypoints=3), resume=True)
    run_fit(persons, folder, tmp_path, resume=True)
    assert outcome(tmp_path) == whole


def test_input_that_cannot_be_trained_on(persons, folder, tmp_path):
    model, data = create_model("dpn1_32", 5), dataset(persons, folder)
    cases = [
        (torch.nn.Conv2d(3, 5, 1), data, "model must be made by create_model, got Conv2d"),
        (create_model("dpn1_32", 6), data, "must have 5 heatmaps for dots, has 6"),
        (model, dataset([], folder), "data must hold at least one person"),
        (model, dataset(persons, folder, size=(32, 36)), "multiples of 8, got 32x36"),
        (model, dataset([Person(1, "0.png", (0.0, 0.0, 9.0, 9.0))], folder), "persons with 5 joints each"),
    ]
    for network, persons_to_use, message in cases:
        with pytest.raises(InputError, match=message):
            fit(network, persons_to_use, TINY, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    hard = replace(TINY, hard_keypoints=6)
    with pytest.raises(InputError, match="fit: hard_keypoints must be at most 5, the joints, got 6"):
        run_fit(persons, folder, tmp_path / "run", hard)
    with pytest.raises(InputError, match="validate must return 'AP', got PCK"):
        run_fit(persons, folder, tmp_path, validate=lambda model: {"PCK": 1.0})
    with pytest.raises(InputError, match=r"other names than those of the log's own values, got \['loss'\]"):
        run_fit(persons, folder, tmp_path, validate=lambda model: {"AP": 1.0, "loss": 0.0})


def test_fewer_persons_than_a_batch(persons, folder, tmp_path):
    log = run_fit(persons[:3], folder, tmp_path, replace(TINY, batch_size=32))
    assert [e["step"] for e in log] == [1, 1, 1] and all(e["loss"] > 0 for e in log)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_is_one_sentence(persons, folder, tmp_path, workers):
    (tmp_path / "bad.png").write_bytes(b"no image")
    for person in persons:
        os.link(folder / person.file_name, tmp_path / person.file_name)
    people = [*persons[:3], replace(persons[3], file_name="bad.png")]
    with pytest.raises(InputError) as caught:
        run_fit(people, tmp_path, tmp_path / "run", workers=workers)
    assert str(caught.value) == f"image {tmp_path / 'bad.png'}: is not an image that Pillow can read"


class DyingDataset(PoseDataset):
    """Its worker process dies of the second batch, as one does that the system kills for its memory."""

    def sample(self, key, out=None):
        if key[1] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(key, out)


def test_worker_that_is_killed_is_one_sentence(persons, folder, tmp_path):
    data = DyingDataset(persons, folder, (32, 32), DOTS, TINY.augmentation, TINY.seed)
    with pytest.raises(InputError, match=r"^loading: a worker process died, .* use fewer --workers"):
        fit(create_model("dpn1_32", 5), data, TINY, tmp_path, workers=1, report=lambda line: None)
    assert load_checkpoint(tmp_path / LAST).training["progress"]["epoch"] == 0


def batch_of(value: float) -> Sample:
    images = torch.randn(2, 3, 32, 32)
    images[0, 0, 0, 0] = value
    return Sample(images, torch.full((2, 5, 2), 16.0), torch.ones(2, 5), torch.arange(2))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_step_that_is_not_finite_changes_nothing(value):
    model = create_model("dpn1_32", 5).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    device = torch.device("cpu")
    assert train_step(model, optimizer, batch_of(1.0), device, StepOptions(2.0)) > 0
    before = digest([model.state_dict(), optimizer.state_dict()])
    loss = train_step(model, optimizer, batch_of(value), device, StepOptions(2.0), BufferCopy(model))
    assert loss != loss
    assert digest([model.state_dict(), optimizer.state_dict()]) == before
    assert train_step(model, optimizer, batch_of(1.0), device, StepOptions(2.0)) > 0


def test_gradient_that_is_not_finite_is_skipped_too():
    """A finite loss with an infinite gradient: sqrt at 0."""
    model = create_model("dpn1_32", 5).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model.heatmap.register_forward_hook(lambda module, given, out: out + (out - out.detach()).abs().sqrt())
    before = digest(model.state_dict())
    loss = train_step(model, optimizer, batch_of(1.0), torch.device("cpu"), StepOptions(2.0))
    assert loss != loss and digest(model.state_dict()) == before


class Poisoned(PoseDataset):
    """Its persons `bad` have one infinite pixel."""

    bad: frozenset[int] = frozenset()

    def sample(self, key, out=None):
        sample = super().sample(key, out)
        if key[1] in self.bad:
            sample.image[0, 0, 0] = float("inf")
        return sample


def test_divergence_is_reported_skipped_and_ends_the_run(persons, folder, tmp_path):
    data = Poisoned(persons, folder, (32, 32), DOTS, TINY.augmentation, TINY.seed)
    lines = []
    data.bad = frozenset({3})
    log = fit(create_model("dpn1_32", 5), data, TINY, tmp_path / "one", report=lines.append)
    skipped = [line for line in lines if "skipped" in line]
    assert 1 <= len(skipped) <= 3 and all("103" in line for line in skipped)  # annotation ids are 100 + index
    assert (
        skipped[0].startswith("epoch ") and "the loss is not finite, the step is skipped; annotations [" in skipped[0]
    )
    assert log[-1]["skipped"] == len(skipped)
    assert all(bool(t.isfinite().all()) for t in load_checkpoint(tmp_path / "one" / LAST).weights.values())

    data.bad = frozenset(range(14))
    lines.clear()
    recipe = replace(TINY, max_bad_steps=2)
    with pytest.raises(Diverged, match=r"epoch 1, batch 2: the loss was not finite 2 times in a row .*lower lr"):
        fit(create_model("dpn1_32", 5), data, recipe, tmp_path / "all", report=lines.append)
    assert len(lines) == 2


def test_bad_steps_in_a_row_are_counted_across_a_resume(persons, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LOOP, "train_step", lambda *arguments: float("nan"))
    lines = []

    def stop_at_second(line):
        lines.append(line)
        if len(lines) == 2:
            raise Killed

    recipe = replace(TINY, max_bad_steps=3)
    with pytest.raises(Killed):
        run_fit(persons, folder, tmp_path, recipe, checkpoint_seconds=0, report=stop_at_second)
    with pytest.raises(Diverged, match="3 times in a row"):
        run_fit(persons, folder, tmp_path, recipe, resume=True, report=lines.append)


def test_learning_rate_of_every_step(persons, folder, tmp_path, monkeypatch):
    recipe = replace(TINY, schedule="cosine", warmup_steps=2, lr=1.0)
    used = []

    def note(model, optimizer, *rest):
        used.append(optimizer.param_groups[0]["lr"])
        return 0.0

    monkeypatch.setattr(LOOP, "train_step", note)
    run_fit(persons, folder, tmp_path, recipe)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(9) / 9))
    assert used == pytest.approx(cosine * np.array([0.5, *[1.0] * 8]))


def test_full_disk_keeps_the_checkpoint_before(persons, folder, tmp_path):
    done = []

    def fill(model):
        done.append(1)
        if len(done) == 2:  # from here on no file may grow beyond a kilobyte
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        return weight_score(model)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            InputError, match=r"best.pt: cannot be written \(File too large\)|last.pt: cannot be written"
        ):
            run_fit(persons, folder, tmp_path, validate=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path / LAST).training["progress"]["epoch"] == 1
    assert not list(tmp_path.glob(".*.part"))
    run_fit(persons, folder, tmp_path, resume=True)
    assert load_checkpoint(tmp_path / LAST).training["progress"]["epoch"] == 3


@pytest.fixture
def heard():
    """The signals are heard even where they are ignored: under nohup, in the background of a shell."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_after_the_step_and_the_resumed_run_is_the_same(
    persons, folder, tmp_path, monkeypatch, whole, number, heard
):
    count = 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), number)
        return train_step(*arguments)

    monkeypatch.setattr(LOOP, "train_step", counted)
    with pytest.raises(Interrupted, match="stopped in epoch 2 after 2 of 3 batches") as caught:
        run_fit(persons, folder, tmp_path)
    assert caught.value.exit_code == 128 + number and signal.getsignal(number) == signal.default_int_handler
    progress = Progress(**load_checkpoint(tmp_path / LAST).training["progress"])
    assert (progress.epoch, progress.step) == (1, 2)
    run_fit(persons, folder, tmp_path, resume=True)
    assert count == 9 and outcome(tmp_path) == whole


def test_signal_in_the_validation_is_answered_at_once(persons, folder, tmp_path, whole):
    def validate(model):
        if not (tmp_path / BEST).exists():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return weight_score(model)

    started = time.monotonic()
    with pytest.raises(Interrupted, match="stopped while epoch 1 was scored"):
        run_fit(persons, folder, tmp_path, validate=validate)
    assert time.monotonic() - started < 30
    run_fit(persons, folder, tmp_path, resume=True)
    assert outcome(tmp_path) == whole


def test_second_interrupt_ends_at_once(persons, folder, tmp_path, monkeypatch, heard):
    def twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one did not end the step")

    monkeypatch.setattr(LOOP, "train_step", twice)
    with pytest.raises(KeyboardInterrupt):
        run_fit(persons, folder, tmp_path)


def test_signal_in_the_last_step_of_all_lets_the_run_finish(persons, folder, tmp_path):
    def report(line):
        if line.startswith("epoch 3"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert len(run_fit(persons, folder, tmp_path, report=report)) == 3


def test_what_a_killed_process_left_is_removed(persons, folder, tmp_path):
    run_fit(persons, folder, tmp_path, replace(TINY, epochs=1))
    (tmp_path / ".last.pt.4711.part").write_bytes(b"half a checkpoint")
    run_fit(persons, folder, tmp_path, replace(TINY, epochs=1), resume=True)
    assert not list(tmp_path.glob(".*"))


def test_threads_that_hinder_are_reported(persons, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LOOP, "_THREADS_CHECKED_AFTER", 2)
    monkeypatch.setattr(LOOP, "slowdown_of_threads", lambda: 30.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    lines = []
    run_fit(persons, folder, tmp_path, report=lines.append)
    assert lines[0] == "2 threads compute 30 times slower than one, other processes use the cores: try --threads 1"


def test_slowdown_of_threads_leaves_no_trace():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(1)
        assert slowdown_of_threads() == 1.0
        torch.set_num_threads(2)
        assert 0.1 < slowdown_of_threads(budget_s=0.01) < 1000
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)


KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import importlib.util
spec = importlib.util.spec_from_file_location("test_fit", sys.argv[2])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
from pathlib import Path
folder, kills, workers = Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
recipe = tests.replace(tests.FULL if int(sys.argv[5]) == 0 else tests.TINY, epochs=int(sys.argv[6]))
persons = tests.draw_persons(folder, 14)
draw = random.Random(0)

def train(out):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        resume = (out / "last.pt").exists()
        tests.run_fit(persons, folder, out, recipe, resume=resume, checkpoint_seconds=0.05, workers=workers)
        os._exit(0)
    return pid

assert os.waitpid(train(folder / "whole"), 0)[1] == 0
killed = 0
while killed < kills:
    pid = train(folder / "killed")
    time.sleep(draw.uniform(0.02, 0.5))
    ended, status = os.waitpid(pid, os.WNOHANG)
    os.killpg(pid, signal.SIGKILL) if not ended else None
    if ended:
        assert status == 0
        break
    os.waitpid(pid, 0)
    killed += 1
else:
    assert os.waitpid(train(folder / "killed"), 0)[1] == 0
assert tests.outcome(folder / "killed") == tests.outcome(folder / "whole")
print(killed, "kills")
"""


def run_killer(tmp_path: Path, kills: int, workers: int, epochs: int) -> int:
    root = str(Path(hrpose.__file__).parents[1])
    command = [sys.executable, "-c", KILLER, root, __file__, str(tmp_path), str(kills), str(workers), str(epochs)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[0])


def test_kill_9(tmp_path):
    assert run_killer(tmp_path, kills=3, workers=0, epochs=4) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_hundred_kills(tmp_path, workers):
    assert run_killer(tmp_path, kills=100, workers=workers, epochs=200) == 100


def test_scores_may_be_numpy_and_torch_numbers(persons, folder, tmp_path):
    scores = iter([np.float64(0.25), torch.tensor(0.5)])
    entries = run_fit(
        persons, folder, tmp_path / "run", TINY.with_epochs(2), validate=lambda model: {"AP": next(scores)}
    )
    assert [entry["AP"] for entry in entries] == [0.25, 0.5]
    assert load_checkpoint(tmp_path / "run" / BEST).training["entry"]["AP"] == 0.5


def test_hard_keypoints_of_the_recipe_change_the_run(persons, folder, tmp_path, whole):
    """All five joints: the loss is the mean squared error, to rounding; two of them: larger from the first epoch on."""
    all_joints, hardest = (
        run_fit(persons, folder, tmp_path / str(hard), replace(TINY, hard_keypoints=hard)) for hard in (5, 2)
    )
    plain = [entry["loss"] for entry in whole["log"] if entry["kind"] == "epoch"]
    assert all_joints[0]["loss"] == pytest.approx(plain[0], rel=1e-4)
    assert hardest[0]["loss"] > 1.05 * plain[0]


def test_network_with_intermediate_supervision_resumes_bit_for_bit(persons, folder, tmp_path, monkeypatch):
    recipe = replace(TINY, epochs=2, drops=(1,))
    data = dataset(persons, folder, recipe, size=(64, 64))

    def start(out: Path, resume: bool) -> None:
        torch.manual_seed(0)
        fit(create_model("hourglass1", 5), data, recipe, out, report=lambda line: None, resume=resume)

    start(tmp_path / "whole", False)

    def killed_after_four(*args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return train_step(*args)

    calls: list[int] = []
    monkeypatch.setattr(LOOP, "train_step", killed_after_four)
    assert run_until_done(tmp_path / "killed", lambda resume: start(tmp_path / "killed", resume)) == 1
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
