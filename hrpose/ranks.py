"""The processes that torchrun starts to do one piece of work together: which one this is, what they tell each other."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hrpose.errors import InputError, check

T = TypeVar("T")

# How long a process waits for the others before it gives up on them. Rank 0 alone writes checkpoints and computes AP.
_PATIENCE = timedelta(minutes=10)


class LostRank(InputError):
    """Another process of the run has ended or does not answer; why is in its own message."""


class ErrorOfRank(InputError):
    """The error of another rank, which ends this one too; that one says it."""


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`. Every method but `first` is called by all of them, in the same order;
    alone, they do nothing."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """The one that writes files and prints."""
        return self.rank == 0

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """The values of all ranks, in their order. Any that pickle can hold."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group)
        return values

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """The same for a few numbers, in one small message: each rank adds its row to a table of zeros."""
        if self.world == 1:
            return [list(values)]
        table = torch.zeros(self.world, len(values), dtype=torch.float64)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(table)
        return table.tolist()

    def on_all(self, work: Callable[[], T], patience: timedelta = _PATIENCE) -> list[T]:
        """What `work` gives on each rank. If it raises InputError on some, all raise the first of these. Those that are
        done wait `patience` for the others."""
        if self.world == 1:
            return [work()]
        with _patient(patience) as group:  # before the work: who waits within the group sees when another one ends
            mine = _outcome(work)
            outcomes = self.gather(mine, group)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, InputError):
                raise mine if rank == self.rank else ErrorOfRank(str(outcome))
        return outcomes

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, which alone does it, or the InputError that it raises there."""
        if self.world == 1:
            return work()
        values = [_outcome(work) if self.first else None]
        dist.broadcast_object_list(values, src=0)
        if isinstance(values[0], InputError):
            raise values[0] if self.first else ErrorOfRank(str(values[0]))
        return values[0]


ALONE = Ranks()


@contextmanager
def _patient(patience: timedelta) -> Iterator[dist.ProcessGroup | None]:
    """All processes as a group that waits so long; None for the one there is."""
    if patience == _PATIENCE:
        yield None
        return
    group = dist.new_group(timeout=patience, backend="gloo")
    yield group
    dist.destroy_process_group(group)


def _outcome(work: Callable[[], T]) -> T | InputError:
    try:
        return work()
    except InputError as error:
        return error


def local_rank() -> int | None:
    """Which of the processes on this machine this is, hence which card it uses; None if no launcher started several."""
    return _number("LOCAL_RANK") if _launched() else None


def backends() -> list[str]:
    """By what processes can talk here: gloo for tensors on the CPU, nccl for those on CUDA."""
    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available() and torch.cuda.is_available()}
    return [name for name, there in found.items() if there]


def is_first() -> bool:
    """Whether this is rank 0, or alone."""
    return not _launched() or _number("RANK") == 0


def local_world() -> int:
    """How many processes share this machine."""
    return _number("LOCAL_WORLD_SIZE") if _launched() and "LOCAL_WORLD_SIZE" in os.environ else 1


def restarts() -> int:
    """How often torchrun has started these processes again after one of them died."""
    return _number("TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in os.environ else 0


def launch() -> str | None:
    """A name of the torchrun that started this process, the same after a restart; None without one."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()} {os.getppid()} {job}" if job else None


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other processes that torchrun (or what else sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT) has started, ALONE without it; part from them at the end.

    Tensors on the CPU travel by gloo, those on CUDA by NCCL.
    Raises: LostRank instead of what torch raises if another process ends within; InputError if they do not meet.
    """
    if not _launched():
        yield ALONE
        return
    ranks = Ranks(_number("RANK"), _number("WORLD_SIZE"))
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    check(not missing, "environment", f"RANK and WORLD_SIZE are set, {', '.join(missing)} are not; start with torchrun")
    cards = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if cards:
        torch.cuda.set_device(_number("LOCAL_RANK") % cards)
    with lost_rank_as_input_error():
        store = next(dist.rendezvous("env://", timeout=_PATIENCE))[0]
        backends = "cpu:gloo,cuda:nccl" if cards else "gloo"
        store = dist.PrefixStore(_attempt(store, ranks), store)
        dist.init_process_group(backends, timeout=_PATIENCE, store=store, rank=ranks.rank, world_size=ranks.world)
        yield ranks
        dist.destroy_process_group()  # not after an error: NCCL would wait for those that are gone


def _attempt(store: dist.Store, ranks: Ranks) -> str:
    """A name that these very processes have for what they do together.

    When torchrun starts processes again they find in its store what those before them wrote: addresses where nobody
    listens. So rank 0 invents a name, and the others take one only if it is confirmed to them.
    """
    me, end = uuid.uuid4().hex, time.monotonic() + _PATIENCE.total_seconds()
    if ranks.first:
        store.set("attempt", me)
        for rank in range(1, ranks.world):
            store.set(f"{me} confirms {rank}", store.get(f"{me} {rank}"))  # get waits for it
        return me
    while time.monotonic() < end:
        name = store.get("attempt").decode()
        store.set(f"{name} {ranks.rank}", me)
        time.sleep(0.02)
        if store.check([f"{name} confirms {ranks.rank}"]) and store.get(f"{name} confirms {ranks.rank}") == me.encode():
            return name
    raise LostRank("rank 0 of this run has not come; its own message says why")


@contextmanager
def lost_rank_as_input_error() -> Iterator[None]:
    """Around code in which processes talk: one that is gone (killed, or ended by an error of its own) raises LostRank
    in the others."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
        if not isinstance(error, dist.DistError) and not any(name in reason for name in ("gloo", "NCCL", "c10d")):
            raise
        lines = reason.splitlines() or [type(error).__name__]
        raise LostRank(
            f"another process of this run has ended or does not answer, its own message says why ({lines[0][:200]})"
        ) from error


def _launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] != "1"


def _number(name: str) -> int:
    text = os.environ[name]
    check(text.isdecimal(), "environment", f"{name} must be a number, got {text!r}")
    return int(text)
