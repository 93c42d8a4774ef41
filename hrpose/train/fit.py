"""Training: epochs of steps, checkpoints, validation. Functions that take values; no framework."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from hrpose.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hrpose.data.dataset import EpochBatches, PoseDataset, Sample, collate
from hrpose.data.targets import gaussian_targets
from hrpose.errors import InputError, check
from hrpose.train.log import RunLog
from hrpose.train.loss import heatmap_mse
from hrpose.train.recipe import Recipe

LAST, BEST = "last.pt", "best.pt"


class Interrupted(Exception):
    """The run was asked to stop by a signal (SIGTERM, SIGINT) and has written its checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # what a shell reports for a process that died of the signal


class Diverged(InputError):
    """The loss was not finite for too many steps in a row; the message names the persons of the last batch."""


@dataclass
class Progress:
    """Where a run is: `step` batches of `epoch` are done. loss_sum: of the good steps of this epoch. best: the score of
    BEST. bad_steps: how many in a row were skipped, skipped: how many in all."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    good_steps: int = 0
    best: float = -1.0
    bad_steps: int = 0
    skipped: int = 0


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
) -> list[dict[str, Any]]:
    """Train `model` on `data` by `recipe`.

    Writes into the folder `out`: log.jsonl (a line per epoch and every 50 steps), last.pt (after each epoch, every
    `checkpoint_seconds`, and when the process is asked to stop) and best.pt (the epoch with the highest validation score).
    A run that is killed and resumed ends with the same weights, to the bit on the CPU, as one that was not.

    Args:
        model:      made by ``create_model``; trained in place, in channels_last.
        validate:   the scores of a model in eval mode, called after each epoch; None without a validation set.
        score:      the name among them that decides which epoch is best.
        workers:    processes that load data; the results do not depend on it.
        resume:     go on from out/last.pt.
    Returns: the log's epoch entries.
    Raises: Interrupted after SIGTERM or SIGINT; Diverged; InputError if the checkpoint to resume is of another run.
    """
    out, device = Path(out), torch.device(device)
    bf16 = resolve_precision(recipe.precision, device) == "bf16"
    sigma = recipe.sigma_for(data.size)
    model.to(device=device, memory_format=torch.channels_last)
    # One fused pass over the parameters; the default would loop over them in Python on the CPU.
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=device.type in ("cpu", "cuda"))
    progress = Progress()
    if resume:
        progress = _resume(out / LAST, model, optimizer, data, recipe)
    log = RunLog(out / "log.jsonl", (progress.epoch, progress.step) if resume else None)
    steps = len(EpochBatches(len(data), recipe.batch_size, recipe.seed, 0))
    last_saved = time.monotonic()

    def save() -> None:
        nonlocal last_saved
        training = {"progress": vars(progress).copy(), "optimizer": optimizer.state_dict(), "recipe": recipe.to_dict()}
        training["persons"] = len(data)
        save_checkpoint(_checkpoint(model, data, training), out / LAST)
        last_saved = time.monotonic()

    with _StopRequest() as stop:
        while progress.epoch < recipe.epochs:
            epoch_started, first_step = time.monotonic(), progress.step
            batches = EpochBatches(len(data), recipe.batch_size, recipe.seed, progress.epoch, progress.step)
            loader = DataLoader(
                data,
                batch_sampler=batches,
                collate_fn=collate,
                num_workers=workers,
                pin_memory=device.type == "cuda",
                generator=torch.Generator(),  # so that iter() leaves the global generator alone
            )
            model.train()
            bar = tqdm(
                total=steps, initial=first_step, desc=f"epoch {progress.epoch + 1}/{recipe.epochs}", unit="batch",
                leave=False, disable=None, dynamic_ncols=True,
            )  # fmt: skip
            for batch in loader:
                lr = recipe.lr_at(progress.epoch * steps + progress.step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = train_step(model, optimizer, batch, sigma, device, bf16)
                progress.step += 1
                _count_step(loss, batch, data, recipe, progress, report)
                rate = (progress.step - first_step) * batches.batch_size / (time.monotonic() - epoch_started)
                mean_loss = progress.loss_sum / max(progress.good_steps, 1)
                bar.set_postfix_str(f"loss {mean_loss:.5f}, {rate:.0f} images/s", refresh=False)
                bar.update()
                if progress.step % 50 == 0:
                    log.write(kind="step", epoch=progress.epoch, step=progress.step, loss=mean_loss, lr=lr)
                if stop.signal:
                    save()
                    where = f"epoch {progress.epoch + 1} after {progress.step} of {steps} batches"
                    raise Interrupted(f"stopped in {where}", stop.signal)
                if time.monotonic() - last_saved > checkpoint_seconds:
                    save()
            bar.close()
            seconds = time.monotonic() - epoch_started
            images = (progress.step - first_step) * batches.batch_size
            entry = {
                "kind": "epoch",
                "epoch": progress.epoch,
                "step": progress.step,
                "loss": progress.loss_sum / max(progress.good_steps, 1),
                "lr": recipe.lr_at(progress.epoch * steps, steps),
                "skipped": progress.skipped,
                "seconds": round(seconds, 1),
                "images_per_s": round(images / seconds, 1) if images else None,
            }
            save()
            if validate is not None:
                entry |= validate(model.eval())
                value = entry.get(score)
                if value is not None and value > progress.best:
                    progress.best = value
                    kept = {key: v for key, v in entry.items() if isinstance(v, (int, float, str, bool, type(None)))}
                    save_checkpoint(_checkpoint(model, data, {"entry": kept, "recipe": recipe.to_dict()}), out / BEST)
            log.write(**entry)
            report(_line(entry, recipe, score))
            progress.epoch, progress.step, progress.loss_sum, progress.good_steps = progress.epoch + 1, 0, 0.0, 0
            save()
            if stop.signal:
                raise Interrupted(f"stopped after epoch {progress.epoch}", stop.signal)
    return [entry for entry in log.entries() if entry["kind"] == "epoch"]


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Sample, sigma: float, device: torch.device, bf16: bool
) -> float:
    """One step on a batch: targets on the device, forward, loss, backward, update. Returns the loss.

    If the loss or a gradient is not finite nothing is updated, the running statistics of batch norm included: one such
    step would otherwise make every weight NaN.
    """
    images = batch.image.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    before = [b.clone() for b in model.buffers()]
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        heatmaps = model(images)
    height, width = heatmaps.shape[2:]
    stride = images.shape[3] / width
    targets, weights = gaussian_targets(
        batch.joints.to(device), batch.visible.to(device), (width, height), sigma, stride
    )
    loss = heatmap_mse(heatmaps, targets, weights)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if torch.isfinite(loss + norm):
        optimizer.step()
        return float(loss.detach())
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return float("nan")


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means here: bf16 where the device multiplies it faster than fp32, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    try:
        return any(getattr(torch.cpu, name)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    except (AttributeError, RuntimeError):  # private functions of torch, which may go
        return False


def _count_step(
    loss: float, batch: Sample, data: PoseDataset, recipe: Recipe, progress: Progress, report: Callable[[str], Any]
) -> None:
    if loss == loss:
        progress.bad_steps = 0
        progress.loss_sum += loss
        progress.good_steps += 1
        return
    progress.bad_steps += 1
    progress.skipped += 1
    ids = [data.persons[i].annotation_id for i in batch.person.tolist()]
    where = f"epoch {progress.epoch + 1}, batch {progress.step}"
    report(f"{where}: the loss is not finite, the step is skipped; annotations {ids}")
    if progress.bad_steps >= recipe.max_bad_steps:
        message = f"{where}: the loss was not finite {progress.bad_steps} times in a row (last: annotations {ids}); "
        raise Diverged(message + "lower lr, or look at these annotations")


def _checkpoint(model: nn.Module, data: PoseDataset, training: dict[str, Any]) -> Checkpoint:
    weights: dict[str, Tensor] = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return Checkpoint(model.hrpose_config, weights, data.skeleton, data.size, training)


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: PoseDataset, recipe: Recipe
) -> Progress:
    checkpoint = load_checkpoint(path)
    where = f"resume {path}"
    training = checkpoint.training
    check("optimizer" in training, where, "holds no state of a run to go on with (best.pt does not; use last.pt)")
    mine = {"network": model.hrpose_config, "input": data.size, "joints": data.skeleton.joints, "persons": len(data)}
    theirs = {"network": checkpoint.config, "input": checkpoint.size, "joints": checkpoint.skeleton.joints,
              "persons": training["persons"]}  # fmt: skip
    for name, value in mine.items():
        check(theirs[name] == value, where, f"is a run with {name} {theirs[name]}, asked to go on with {value}")
    for name, value in recipe.to_dict().items():
        before = training["recipe"].get(name)
        check(before == value, where, f"is a run with {name} = {before}, asked to go on with {name} = {value}")
    model.load_state_dict(checkpoint.weights)
    optimizer.load_state_dict(training["optimizer"])
    return Progress(**training["progress"])


def _line(entry: dict[str, Any], recipe: Recipe, score: str) -> str:
    parts = [f"epoch {entry['epoch'] + 1}/{recipe.epochs}", f"loss {entry['loss']:.6f}", f"lr {entry['lr']:.1e}"]
    if entry["images_per_s"]:
        parts.append(f"{entry['images_per_s']:.0f} images/s")
    parts += [f"{name} {100 * entry[name]:.1f}" for name in ("AP", "PCK@0.2") if entry.get(name) is not None]
    return ", ".join(parts)


class _StopRequest:
    """Notes SIGTERM and SIGINT instead of dying of them, so that the step in progress is finished and saved."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
