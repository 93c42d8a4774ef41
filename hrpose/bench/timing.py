"""The one timer: interleaved samples of several functions, without those during which the core was taken away."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

LEAST_SAMPLES = 5
PATIENCE = 3  # times the seconds asked for, after which disturbed samples have to do


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call.

    median, p10, p90: of the samples that count.
    samples:   how many count.
    dropped:   how many were thrown away because another process took the core meanwhile.
    disturbed: how many of those that count were disturbed too: not 0 only on a machine so busy that there were fewer
               than LEAST_SAMPLES others.
    """

    median: float
    p10: float
    p90: float
    samples: int
    dropped: int = 0
    disturbed: int = 0


class Sample(NamedTuple):
    """Milliseconds per call, and how often the system took the core away meanwhile."""

    ms: float
    switches: int


Stopwatch = Callable[[Callable[[], object], int], Sample]


def cpu_stopwatch(function: Callable[[], object], repeats: int) -> Sample:
    """Wall-clock time of `repeats` calls."""
    before = _involuntary_switches()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    seconds = time.perf_counter() - start
    return Sample(seconds / repeats * 1e3, _involuntary_switches() - before)


def cuda_stopwatch(function: Callable[[], object], repeats: int) -> Sample:
    """Time between two events on the current stream, in which what the CPU does counts if the card waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return Sample(start.elapsed_time(end) / repeats, 0)


def stopwatch_for(device: torch.device) -> Stopwatch:
    return cuda_stopwatch if device.type == "cuda" else cpu_stopwatch


def measure(
    functions: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    sample_ms: float = 2.0,
    stopwatch: Stopwatch = cpu_stopwatch,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions against each other on a machine that is not ours alone.

    Round robin, so that slow drifts hit all of them. Each sample repeats the call for about `sample_ms`, after a warm
    call that fills the caches again. A sample with an involuntary context switch is thrown away; only if fewer than
    LEAST_SAMPLES are left after PATIENCE times the seconds do those with the fewest switches count.

    Args:
        seconds: per function, warm calls included.
    """
    repeats = {name: _repeats(function, sample_ms, stopwatch) for name, function in functions.items()}
    taken: dict[str, list[Sample]] = {name: [] for name in functions}
    budget, start = seconds * len(functions), clock()
    while True:
        for name, function in functions.items():
            function()
            taken[name].append(stopwatch(function, repeats[name]))
        elapsed = clock() - start
        clean = min(sum(sample.switches == 0 for sample in samples) for samples in taken.values())
        sampled = min(map(len, taken.values())) >= LEAST_SAMPLES
        if sampled and (elapsed >= PATIENCE * budget or (elapsed >= budget and clean >= LEAST_SAMPLES)):
            return {name: _summary(samples) for name, samples in taken.items()}


def _involuntary_switches() -> int:
    """Of this process so far; always 0 on systems that do not say."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _repeats(function: Callable[[], object], sample_ms: float, stopwatch: Stopwatch) -> int:
    function()
    return max(1, int(sample_ms / max(stopwatch(function, 1).ms, 1e-4)))


def _summary(taken: list[Sample]) -> Timing:
    counted = [sample for sample in taken if sample.switches == 0]
    if len(counted) < LEAST_SAMPLES:
        counted = sorted(taken, key=lambda sample: sample.switches)[:LEAST_SAMPLES]
    median, p10, p90 = (float(v) for v in np.percentile([sample.ms for sample in counted], (50, 10, 90)))
    disturbed = sum(sample.switches > 0 for sample in counted)
    return Timing(median, p10, p90, len(counted), len(taken) - len(counted), disturbed)
