"""Loading in worker processes, and one sentence instead of a traceback for every way in which that fails."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hrpose.errors import InputError


def load(data: Dataset[Any], workers: int, collate: Callable[[list[Any]], Any] | None = None, **options: Any) -> Any:
    """An iterator over what a DataLoader of `data` yields; `options` go to the DataLoader.

    The global random generator is left alone (a loader draws its workers' seed from there by default, which would make
    a resumed run differ from one that was not stopped). Workers leave SIGINT, SIGTERM and SIGHUP to this process.
    Raises: the InputError that reading a sample raised, as it was raised. A worker that dies is found by a signal
        handler of torch, anywhere in the code of this process: see ``dead_worker_as_input_error``.
    """
    loader = DataLoader(
        _ErrorsAsValues(data),
        collate_fn=partial(_collate_or_error, collate) if collate else _unchanged,
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
        **options,
    )
    return _raising(loader)


@contextmanager
def dead_worker_as_input_error() -> Iterator[None]:
    """Around the code that uses ``load``: a worker process that dies (killed for its memory, say) raises InputError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        advice = (
            "often for lack of memory or of shared memory; use fewer --workers, or 0 to read images in this process"
        )
        raise InputError(f"loading: a worker process died, {advice}") from error


class _ErrorsAsValues(Dataset[Any]):
    """A data set whose InputErrors are handed out as values: a worker would send the text of their traceback
    instead."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type] - every data set here has a length

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.data[key]
        except InputError as error:
            return error


def _collate_or_error(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    errors = [sample for sample in samples if isinstance(sample, InputError)]
    return errors[0] if errors else collate(samples)


def _unchanged(sample: Any) -> Any:
    return sample


def _raising(loader: DataLoader[Any]) -> Iterator[Any]:
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and the stop of a cluster reach the whole process group; workers end when their parent tells them to."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
