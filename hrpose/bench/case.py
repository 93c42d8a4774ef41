"""One row before it is timed: who computes what, how much work it is, and what has to come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What a contender is to a row. LIBRARY: an engine or pipeline that is neither PyTorch's nor ours.
OURS, PYTORCH, LIBRARY, REFERENCE = "hrpose", "pytorch", "library", "reference"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GET_ENGINES = "not installed: pip install 'hrpose[bench]'"


@dataclass(frozen=True)
class Settings:
    """How rows are run.

    threads: of every contender. seconds: of timing per contender. device: where everybody computes.
    """

    threads: int = 1
    seconds: float = 0.5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Contender:
    """One way to compute a row's result.

    kind:  OURS, PYTORCH, LIBRARY or REFERENCE.
    limit: how far its result may be from the expected one, if not as far as the case's.
    """

    name: str
    kind: str
    call: Callable[[], Any]
    limit: float | None = None


@dataclass
class Case:
    """A row's contenders and what they are judged by.

    expected: arrays or tensors, one or several: what every contender has to compute.
    limit:    of `difference`.
    flops:    of one call, a multiply-add counted twice and the taps that fall into padding counted too, or None.
    nbytes:   that one call has to read and write, where that and not arithmetic bounds it.
    absent:   who is missing, and why.
    keep:     what has to live as long as the contenders: a folder with their files.
    """

    expected: Any
    limit: float
    flops: float | None = None
    nbytes: float | None = None
    contenders: list[Contender] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    keep: list[Any] = field(default_factory=list)

    def enter(self, name: str, kind: str, call: Callable[[], Any], limit: float | None = None) -> None:
        self.contenders.append(Contender(name, kind, call, limit))

    def invite(self, name: str, kind: str, make: Callable[[], Callable[[], Any]], limit: float | None = None) -> None:
        """Enter what `make` returns; whoever cannot be made or cannot run here becomes absent, with the reason.

        For others' software, which may be missing or refuse a network; ours must run.
        """
        try:
            call = make()
            call()
        except ImportError:
            self.absent[name] = GET_ENGINES
        except Exception as error:
            reason = " ".join(str(error).split()) or "no reason given"
            self.absent[name] = f"{type(error).__name__}: {reason[:200]}"
        else:
            self.enter(name, kind, call, limit)


class WrongResult(Exception):
    """A contender computed something else than it should."""


def check_results(case: Case) -> None:
    """Raises: WrongResult, with the figures, unless every contender computes what is expected."""
    for contender in case.contenders:
        limit = case.limit if contender.limit is None else contender.limit
        found = difference(contender.call(), case.expected)
        if not found <= limit:
            raise WrongResult(
                f"{contender.name} is off by {found:.1e} of the largest value expected, the limit is {limit:.1e}"
            )


def difference(got: Any, expected: Any) -> float:
    """The largest difference over the largest expected value, the worst of all arrays; inf where shapes differ or a
    value is NaN."""
    ours, theirs = list(_tensors(got)), list(_tensors(expected))
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        b = b.to(a.device)  # where a is: gigabytes of maps stay on the card
        share = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0
        worst = max(worst, share if np.isfinite(share) else float("inf"))
    return worst


def _tensors(output: Any) -> Iterator[Tensor]:
    """Of float64."""
    if isinstance(output, Tensor):
        yield output.detach().double()
    elif isinstance(output, np.ndarray):
        yield torch.from_numpy(output.astype(np.float64))
    elif isinstance(output, Sequence):
        for part in output:
            yield from _tensors(part)
    else:
        raise TypeError(f"neither a tensor nor an array nor a sequence of such: {type(output).__name__}")
