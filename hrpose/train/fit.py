"""Training: epochs of steps, checkpoints, validation. Functions that take values; no framework."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hrpose.checkpoint import Checkpoint, digest, load_checkpoint, save_checkpoint
from hrpose.data.dataset import EpochBatches, PoseDataset, Sample
from hrpose.data.feed import feed
from hrpose.data.loading import dead_worker_as_input_error
from hrpose.errors import InputError, check
from hrpose.infer.protocol import check_model
from hrpose.ranks import ALONE, Ranks
from hrpose.train.average import Average
from hrpose.train.compiled import compile_failure_as_input_error, compiled
from hrpose.train.distributed import (
    Agreement,
    SharedStatistics,
    check_share,
    share_batch_norm,
    with_averaged_gradients,
)
from hrpose.train.log import RunLog
from hrpose.train.loss import joint_weights
from hrpose.train.memory import memory_kept
from hrpose.train.recipe import Recipe
from hrpose.train.step import BufferCopy, StepOptions, resolve_precision, train_step
from hrpose.train.stop import Interrupted, StopRequest
from hrpose.train.threads import slowdown_of_threads

LAST, BEST = "last.pt", "best.pt"
_EPOCHS = "epoch-*.pt"
_LOG_EVERY = 50  # steps
_LONG_WAIT, _SHORT_WAIT_SECONDS = 0.25, 10.0  # share of an epoch that is worth advice, and seconds that are not
_THREADS_CHECKED_AFTER = 10  # steps of this process: the loading processes are busy by then


class Diverged(InputError):
    """The loss was not finite for too many steps in a row; the message names the persons of the last batch."""


@dataclass
class Progress:
    """Where a run is: `step` batches of `epoch` are done. loss_sum: of the good steps of this epoch. best: the score of
    BEST. bad_steps: how many in a row were skipped, skipped: how many in all. seconds: spent on this epoch's steps,
    waited: of these, for data."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    good_steps: int = 0
    best: float = -float("inf")
    bad_steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def loss(self) -> float | None:
        return self.loss_sum / self.good_steps if self.good_steps else None

    def next_epoch(self) -> None:
        self.epoch, self.step, self.loss_sum, self.good_steps = self.epoch + 1, 0, 0.0, 0
        self.seconds = self.waited = 0.0


def fit(
    model: nn.Module,
    data: PoseDataset,
    recipe: Recipe,
    out: str | Path,
    validate: Callable[[nn.Module], dict[str, Any]] | None = None,
    score: str = "AP",
    device: str | torch.device = "cpu",
    workers: int = 0,
    resume: bool = False,
    checkpoint_seconds: float = 300.0,
    report: Callable[[str], Any] = lambda line: print(line, file=sys.stderr),
    ranks: Ranks = ALONE,
    keep: int = 0,
) -> list[dict[str, Any]]:
    """Train `model` on `data` by `recipe`.

    Writes into the folder `out`: log.jsonl (a line per epoch and every 50 steps), last.pt (at the start, after each
    epoch, every `checkpoint_seconds`, and when the process is asked to stop) and best.pt (the epoch with the highest
    validation score, of equals the last). Without `resume` a run that is in `out` is replaced.
    A run that is killed and resumed ends with the same weights, to the bit on the CPU, as one that was not. A step
    whose loss is not finite is reported and skipped.

    Args:
        model:      made by ``create_model``; trained in place, in channels_last. With the recipe's ema_decay it ends
                    with the average of the weights, which is what `validate` sees and the checkpoints hold.
        validate:   the scores of a model in eval mode as plain values, called after each epoch; None without a
            validation set. A score that is None was not measurable and does not count.
        score:      the name among them that decides which epoch is best.
        workers:    processes that load data; the results do not depend on it.
        resume:     go on from out/last.pt; a run that is complete is left as it is.
        ranks:      the processes that train together (``hrpose.ranks.joined``), each called with the same arguments and
                    its own device. The recipe's batch is that of all: each has an equal share of it, and the gradients
                    are averaged. Rank 0 alone writes and reports. `validate` is called on all, rank 0's scores count.
        keep:       of how many epochs, the last ones, the network is kept as epoch-001.pt and so on.
    Returns: the log's epoch entries: epoch (from 0), mean loss, lr at the epoch's start, images_per_s, waiting (the
        share of the time in which the network waited for data), what `validate` found.
    Raises: Interrupted after SIGTERM, SIGINT or SIGHUP; Diverged; InputError if the checkpoint to resume is of another
        run, if an image is broken or a checkpoint cannot be written (the one before it stays).
    """
    out, device = Path(out), torch.device(device)
    check(hasattr(model, "hrpose_config"), "fit", f"model must be made by create_model, got {type(model).__name__}")
    check(keep >= 0, "fit", f"keep must be >= 0, got {keep}")
    check(len(data) > 0, "fit", "data must hold at least one person, got none")
    check_model(model, data.size, data.skeleton)
    joints, hard = data.skeleton.num_joints, recipe.hard_keypoints
    check(hard is None or hard <= joints, "fit", f"hard_keypoints must be at most {joints}, the joints, got {hard}")
    step = _step_options(recipe, data, device)
    check_share(min(recipe.batch_size, len(data)), ranks)
    model.to(device=device, memory_format=torch.channels_last)
    if recipe.sync_bn and ranks.world > 1:
        share_batch_norm(model)
    report, fingerprint = report if ranks.first else lambda line: None, _fingerprint(data)
    same = ranks.gather((model.hrpose_config, recipe.to_dict(), fingerprint))
    check(all(other == same[0] for other in same), "fit", "network, recipe and data must be the same on all ranks")
    network = compiled(with_averaged_gradients(model, ranks, data.size), recipe.compile)
    run = _Run(
        model, data, recipe, out, _optimizer(model, recipe), Progress(), report, fingerprint, ranks,
        Average(model, recipe.ema_decay) if recipe.ema_decay else None,
        torch.amp.GradScaler("cuda") if step.precision == "fp16" else None,
    )  # fmt: skip
    progress = run.progress
    if resume:
        run.restore()
    log = ranks.on_first(lambda: run.prepare_folder(resume))
    if progress.epoch >= recipe.epochs:
        report(f"the run in {out} is complete: all {recipe.epochs} epochs are done")

    kept = memory_kept() if device.type == "cpu" else nullcontext()
    failing = compile_failure_as_input_error(recipe.compile)
    with kept, StopRequest() as stop, dead_worker_as_input_error(), failing:
        agreement = Agreement(ranks, stop)
        while progress.epoch < recipe.epochs:
            _train_epoch(run, network, log, agreement, device, step, workers, checkpoint_seconds)
            entry = run.epoch_entry()
            if validate is not None:
                run.save()
                with stop.at_once(f"while epoch {progress.epoch + 1} was scored"):
                    found = validate(run.result.eval())
                scores = ranks.on_first(partial(_plain_scores, found))
                _check_scores(scores, entry, score)
                entry |= scores
                run.keep_best(entry, score)
            run.keep_epochs(entry, keep)
            if ranks.first:
                log.write(**entry)
            report(_line(entry, recipe))
            if progress.epoch == 0:
                _advise_on_loading(run, workers)
            progress.next_epoch()
            run.save()
            signal = agreement.ask()
            if signal and progress.epoch < recipe.epochs:
                raise Interrupted(f"stopped after epoch {progress.epoch}", signal)
    if run.average:
        model.load_state_dict(run.average.model.state_dict())
    return ranks.on_first(lambda: [entry for entry in log.entries() if entry["kind"] == "epoch"])


@dataclass
class _Run:
    """What a run trains, by what, and where it stands; reads and writes its checkpoints."""

    model: nn.Module
    data: PoseDataset
    recipe: Recipe
    out: Path
    optimizer: torch.optim.Optimizer
    progress: Progress
    report: Callable[[str], Any]
    fingerprint: str
    ranks: Ranks
    average: Average | None
    scaler: torch.amp.GradScaler | None
    saved_at: float = 0.0

    @property
    def result(self) -> nn.Module:
        """The network to validate and to keep."""
        return self.average.model if self.average else self.model

    @property
    def steps(self) -> int:
        """Batches of a whole epoch."""
        return len(EpochBatches(len(self.data), self.recipe.batch_size, self.recipe.seed, 0))

    def prepare_folder(self, resume: bool) -> RunLog:
        for part in self.out.glob(".*.part"):  # what a process that was killed while it saved has left
            part.unlink(missing_ok=True)
        if not resume:
            for other in (self.out / BEST, *self.out.glob(_EPOCHS)):  # of another run
                other.unlink(missing_ok=True)
            self.save()  # a run without room for its checkpoint shall not find that out in an hour
        progress = self.progress
        return RunLog(self.out / "log.jsonl", (progress.epoch, progress.step) if resume else None)

    def save(self) -> None:
        """Write LAST: all that it takes to go on."""
        state = {"progress": vars(self.progress).copy(), "optimizer": self.optimizer.state_dict()}
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        if self.average:  # which the file's weights are
            state |= {"trained": _on_cpu(self.model), "averaged_steps": self.average.steps}
        self._write(LAST, {**state, "persons": len(self.data), "data": self.fingerprint})
        self.saved_at = time.monotonic()

    def restore(self) -> None:
        """Go on from LAST, which rank 0 reads. Raises: InputError if it is of another run."""
        checkpoint = self.ranks.on_first(self._read_last)
        training = checkpoint.training
        self.model.load_state_dict(training.get("trained", checkpoint.weights))
        if self.average:
            self.average.model.load_state_dict(checkpoint.weights)
            self.average.steps = training["averaged_steps"]
        if self.scaler:
            self.scaler.load_state_dict(training["scaler"])
        self.optimizer.load_state_dict(training["optimizer"])
        for name, value in training["progress"].items():
            setattr(self.progress, name, value)
        self.saved_at = time.monotonic()

    def _read_last(self) -> Checkpoint:
        path = self.out / LAST
        check(path.is_file(), f"resume {self.out}", f"holds no run ({LAST}); without resuming, a new one is started")
        checkpoint = load_checkpoint(path)
        training, where = checkpoint.training, f"resume {path}"
        check("optimizer" in training, where, "holds no state of a run to go on with")
        pairs = {
            "network": (checkpoint.config, self.model.hrpose_config),
            "input": (checkpoint.size, tuple(self.data.size)),
            "joints": (checkpoint.skeleton.joints, self.data.skeleton.joints),
            "persons": (training["persons"], len(self.data)),
        }
        default = Recipe().to_dict()  # a field that is newer than the file had its default
        saved = default | training["recipe"]
        saved["augmentation"] = default["augmentation"] | saved["augmentation"]
        pairs |= {name: (saved[name], value) for name, value in self.recipe.to_dict().items()}
        for name, (theirs, mine) in pairs.items():
            check(theirs == mine, where, f"is a run with {name} = {theirs}, asked to go on with {name} = {mine}")
        same = training.get("data", self.fingerprint) == self.fingerprint  # older files hold none
        check(same, where, "is a run on other data: boxes, joints, file names, flip pairs, seed or augmentation differ")
        return checkpoint

    def keep_best(self, entry: dict[str, Any], score: str) -> None:
        """Write BEST if the epoch's score is the highest so far, of equals the later: on a small validation set a score
        is often at its end (0 or 1) while the network still improves."""
        value = entry[score]
        if value is None or not value >= self.progress.best:
            return
        self.progress.best = value
        self._write_result(BEST, entry)

    def keep_epochs(self, entry: dict[str, Any], keep: int) -> None:
        """Write the epoch's network, and remove those of more than `keep` epochs ago."""
        done = self.progress.epoch + 1
        if keep and self.ranks.first:
            self._write_result(_EPOCHS.replace("*", f"{done:03}"), entry)
            for old in sorted(self.out.glob(_EPOCHS), key=lambda path: (len(path.name), path.name))[:-keep]:
                old.unlink(missing_ok=True)

    def _write_result(self, name: str, entry: dict[str, Any]) -> None:
        # Without them the file is the same for every run of the recipe.
        timing = ("kind", "seconds", "images_per_s", "waiting")
        plain = {k: v for k, v in entry.items() if isinstance(v, (int, float, str, bool, type(None)))}
        self._write(name, {"entry": {k: v for k, v in plain.items() if k not in timing}})

    def epoch_entry(self) -> dict[str, Any]:
        progress, recipe = self.progress, self.recipe
        images = progress.step * min(recipe.batch_size, len(self.data))
        return {
            "kind": "epoch",
            "epoch": progress.epoch,
            "step": progress.step,
            "loss": progress.loss,
            "lr": recipe.lr_at(progress.epoch * self.steps, self.steps),
            "skipped": progress.skipped,
            "seconds": round(progress.seconds, 1),
            "images_per_s": round(images / progress.seconds, 1) if progress.seconds else None,
            "waiting": round(progress.waited / progress.seconds, 3) if progress.seconds else None,
        }

    def _write(self, name: str, training: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        training = {**training, "recipe": self.recipe.to_dict()}
        config, size = self.model.hrpose_config, tuple(self.data.size)
        checkpoint = Checkpoint(config, _on_cpu(self.result), self.data.skeleton, size, training)
        save_checkpoint(checkpoint, self.out / name)


def _train_epoch(
    run: _Run,
    network: nn.Module,
    log: RunLog,
    agreement: Agreement,
    device: torch.device,
    options: StepOptions,
    workers: int,
    checkpoint_seconds: float,
) -> None:
    """The steps of the epoch that are left. `network`: what to call for the run's model."""
    progress, recipe, steps, ranks = run.progress, run.recipe, run.steps, run.ranks
    if progress.step == steps:  # the process before this one ended while the epoch was scored
        return
    batches = EpochBatches(
        len(run.data), recipe.batch_size, recipe.seed, progress.epoch, progress.step, ranks.rank, ranks.world
    )
    loaded = _waited_for(feed(run.data, batches, workers, device), progress)
    statistics = BufferCopy(run.model)
    shared = None if recipe.sync_bn else SharedStatistics(run.model, ranks)
    network.train()
    clock = time.monotonic()
    bar = tqdm(
        total=steps, initial=progress.step, desc=f"epoch {progress.epoch + 1}/{recipe.epochs}", unit="batch",
        leave=False, disable=None if ranks.first else True, dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        for taken, batch in enumerate(loaded, 1):
            lr = recipe.lr_at(progress.epoch * steps + progress.step, steps)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            loss = train_step(network, run.optimizer, batch, device, options, statistics, run.scaler, agreement)
            if shared and loss == loss:
                shared.average()
            if run.average and loss == loss:
                run.average.update(run.model)
            progress.step += 1
            progress.seconds, clock = progress.seconds + time.monotonic() - clock, time.monotonic()
            _count_step(run, loss, agreement.bad_ranks)
            bar.set_postfix_str(_bar_text(progress, batches.batch_size), refresh=False)
            bar.update()
            if progress.step % _LOG_EVERY == 0 and ranks.first:
                log.write(kind="step", epoch=progress.epoch, step=progress.step, loss=progress.loss, lr=lr)
            if agreement.signal:
                ranks.on_first(run.save)  # nobody ends before: torchrun would end the one that writes
                where = f"epoch {progress.epoch + 1} after {progress.step} of {steps} batches"
                raise Interrupted(f"stopped in {where}", agreement.signal)
            if time.monotonic() - run.saved_at > checkpoint_seconds:
                run.save()
            if taken == _THREADS_CHECKED_AFTER and device.type == "cpu" and ranks.first:
                _warn_of_slow_threads(run)


def _step_options(recipe: Recipe, data: PoseDataset, device: torch.device) -> StepOptions:
    return StepOptions(
        recipe.sigma_for(data.size),
        resolve_precision(recipe.precision, device),
        recipe.hard_keypoints,
        joint_weights(data.skeleton.joints).to(device) if recipe.weighted_joints else None,
        recipe.accumulate,
        recipe.clip_norm,
    )


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    # One fused pass over the parameters; the default would loop over them in Python on the CPU.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=0.9, fused=fused)
    return torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=fused)


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}


def _count_step(run: _Run, loss: float, bad_ranks: Sequence[int]) -> None:
    """Note the loss of a step, or that it was skipped. Raises: Diverged after too many of these in a row."""
    progress = run.progress
    if loss == loss:
        progress.bad_steps = 0
        progress.loss_sum += loss
        progress.good_steps += 1
        return
    progress.bad_steps += 1
    progress.skipped += 1
    where, shares = f"epoch {progress.epoch + 1}, batch {progress.step}", [_share(run, rank) for rank in bad_ranks]
    ids = [run.data.persons[i].annotation_id for share in shares for i in share]
    if run.ranks.world > 1:
        where += f", rank {', '.join(map(str, bad_ranks))}"
    run.report(f"{where}: the loss is not finite, the step is skipped; annotations {ids}")
    if progress.bad_steps >= run.recipe.max_bad_steps:
        message = f"{where}: the loss was not finite {progress.bad_steps} times in a row (last: annotations {ids}); "
        raise Diverged(message + "lower lr, or look at these annotations")


def _share(run: _Run, rank: int) -> list[int]:
    """The persons that a rank had in the step just done."""
    progress, recipe = run.progress, run.recipe
    batches = EpochBatches(
        len(run.data), recipe.batch_size, recipe.seed, progress.epoch, progress.step - 1, rank, run.ranks.world
    )
    return [index for _, index in next(iter(batches))]


def _waited_for(batches: Iterator[Sample], progress: Progress) -> Iterator[Sample]:
    """The same batches; how long each one took to come is added to `progress`."""
    asked = time.monotonic()
    for batch in batches:
        progress.waited += time.monotonic() - asked
        yield batch
        asked = time.monotonic()


def _advise_on_loading(run: _Run, workers: int) -> None:
    progress = run.progress
    if progress.waited < max(_SHORT_WAIT_SECONDS, _LONG_WAIT * progress.seconds):
        return
    advice = [f"more --workers than {workers}"] if workers < (os.cpu_count() or 1) else []
    advice += ["--cache DIR"] if run.data.windows is None else []
    if advice:
        run.report(f"the network waited for data for a large part of the epoch; what may help: {', '.join(advice)}")


def _warn_of_slow_threads(run: _Run) -> None:
    threads, slower = torch.get_num_threads(), slowdown_of_threads()
    if slower > 1.5:
        reason = "other processes use the cores"
        run.report(f"{threads} threads compute {slower:.0f} times slower than one, {reason}: try --threads 1")


def _plain(value: Any) -> Any:
    """A numpy or torch scalar as Python's own number, which log and checkpoint can hold."""
    return (
        value.item() if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1) else value
    )


def _plain_scores(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in scores.items()}


def _check_scores(scores: dict[str, Any], entry: dict[str, Any], score: str) -> None:
    check(score in scores, "fit", f"validate must return {score!r}, got {', '.join(scores)}")
    taken = sorted(entry.keys() & scores.keys())
    check(not taken, "fit", f"validate must return other names than those of the log's own values, got {taken}")


def _fingerprint(data: PoseDataset) -> str:
    """A digest of all that makes the samples, except for the pixels."""
    persons, joints = data.persons, data.skeleton.num_joints
    unlike = next((p for p in persons if len(p.joints) != joints or len(p.visible) != joints), None)
    check(unlike is None, "fit", f"data must hold persons with {joints} joints each, got {unlike}")
    return digest(
        {
            "skeleton": data.skeleton.to_dict(),
            "augmentation": repr(data.augmentation),
            "seed": data.seed,
            "padding": data.padding,
            "files": "\n".join(p.file_name for p in persons),
            "boxes": torch.from_numpy(np.array([p.box for p in persons], np.float64)),
            "joints": torch.from_numpy(np.array([p.joints for p in persons], np.float64)),
            "visible": torch.from_numpy(np.array([p.visible for p in persons], np.int64)),
        }
    )


def _bar_text(progress: Progress, batch_size: int) -> str:
    rate = f"{progress.step * batch_size / max(progress.seconds, 1e-9):.0f} images/s"
    return rate if progress.loss is None else f"loss {progress.loss:.5f}, {rate}"


def _line(entry: dict[str, Any], recipe: Recipe) -> str:
    loss = "no step with a finite loss" if entry["loss"] is None else f"loss {entry['loss']:.6f}"
    parts = [f"epoch {entry['epoch'] + 1}/{recipe.epochs}", loss, f"lr {entry['lr']:.1e}"]
    if entry["images_per_s"]:
        parts.append(f"{entry['images_per_s']:.0f} images/s, {100 * entry['waiting']:.0f} % waiting for data")
    parts += [
        f"{name} {100 * entry[name]:.1f}" for name in ("AP", "PCK@0.2", "PCKh@0.5") if entry.get(name) is not None
    ]
    return ", ".join(parts)
