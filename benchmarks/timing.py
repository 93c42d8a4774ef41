"""The one timer: interleaved samples of several functions, and what the kernel did to them."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 10th and 90th percentile; samples that count, samples thrown away."""

    median: float
    p10: float
    p90: float
    samples: int
    dropped: int


def measure(
    functions: dict[str, Callable[[], object]], seconds: float = 1.0, sample_ms: float = 2.0
) -> dict[str, Timing]:
    """Time functions against each other on a machine that is not ours alone.

    Round robin, so that slow drifts hit all of them; each sample repeats the call for at least `sample_ms` after a warm
    call; a sample during which another process took the core (an involuntary context switch) is thrown away.
    """
    repeats = {name: _repeats(function, sample_ms) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    dropped = dict.fromkeys(functions, 0)
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, function in functions.items():
            function()
            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            sample = (time.perf_counter() - start) / repeats[name] * 1e3
            if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == switches or dropped[name] > 1000:
                times[name].append(sample)
            else:
                dropped[name] += 1
    return {
        name: Timing(*(float(v) for v in np.percentile(samples, (50, 10, 90))), len(samples), dropped[name])
        for name, samples in times.items()
    }


def _repeats(function: Callable[[], object], sample_ms: float) -> int:
    function()
    start = time.perf_counter()
    function()
    return max(1, int(sample_ms / 1e3 / max(time.perf_counter() - start, 1e-7)))
