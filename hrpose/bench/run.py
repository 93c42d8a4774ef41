"""Runs rows: build, check the results, time, compare with the machine's peak."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from hrpose.bench.case import REFERENCE, Case, Settings, WrongResult, check_results
from hrpose.bench.peaks import Peaks
from hrpose.bench.plan import Plan
from hrpose.bench.row import Entry, Row
from hrpose.bench.timing import measure, stopwatch_for
from hrpose.ops import _ext


def run(
    plans: Sequence[Plan],
    settings: Settings,
    peaks: Peaks,
    announce: Callable[[Plan], object] = lambda plan: None,
    report: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """The rows of these plans; each is announced before it is built and reported as soon as it is there."""
    rows = []
    with settled(settings):
        for plan in plans:
            announce(plan)
            rows.append(run_one(plan, settings, peaks))
            report(rows[-1])
    return rows


@torch.no_grad()
def run_one(plan: Plan, settings: Settings, peaks: Peaks) -> Row:
    """One row; it has an error and no times if a contender computes something else than it should."""
    torch._dynamo.reset()  # a graph compiled for the last row's shape would be compiled anew for all shapes
    isa = _ext.isa() if settings.device.type == "cpu" else None
    row = {
        "group": plan.group, "op": plan.op, "shape": plan.shape, "dtype": plan.dtype,
        "device": settings.device.type, "isa": isa, "threads": settings.threads,
    }  # fmt: skip
    try:
        case = plan.build(settings)
        check_results(case)
    except WrongResult as error:
        return Row(**row, error=str(error))
    unit, work = ("GFLOP/s", case.flops) if case.flops else ("GB/s", case.nbytes)
    peak = peaks.gflops(plan.dtype) if case.flops else peaks.gbs(case.nbytes)
    return Row(**row, unit=unit, entries=_times(case, settings, work, peak), absent=case.absent)


def _times(case: Case, settings: Settings, work: float, peak: float) -> tuple[Entry, ...]:
    """The reference has its own rounds: its temporaries empty the caches and the allocator's pools, which in turn would
    slow down whoever comes next."""
    stopwatch = stopwatch_for(settings.device)
    timings = {}
    for apart in (False, True):
        calls = {c.name: c.call for c in case.contenders if (c.kind == REFERENCE) == apart}
        timings |= measure(calls, settings.seconds, stopwatch=stopwatch) if calls else {}
    rates = {name: work / (timing.median * 1e6) for name, timing in timings.items()}
    return tuple(Entry(c.name, c.kind, timings[c.name], rates[c.name], rates[c.name] / peak) for c in case.contenders)


@contextlib.contextmanager
def settled(settings: Settings) -> Iterator[None]:
    """torch with the threads asked for; on CUDA float32 that is float32, cuDNN's fastest algorithms, and the device as
    the current one, on whose stream time is taken."""
    threads, flags = torch.get_num_threads(), torch.backends.cudnn
    before = flags.allow_tf32, flags.benchmark
    torch.set_num_threads(settings.threads)
    flags.allow_tf32, flags.benchmark = False, True
    current = torch.cuda.device(settings.device) if settings.device.type == "cuda" else contextlib.nullcontext()
    try:
        with current:
            yield
    finally:
        torch.set_num_threads(threads)
        flags.allow_tf32, flags.benchmark = before
