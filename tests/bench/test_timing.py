"""The timer: who is called when, which samples count, when it ends."""

import time

import numpy as np
import pytest

from hrpose.bench.timing import LEAST_SAMPLES, PATIENCE, Sample, cpu_stopwatch, measure


class Machine:
    """A clock that only sampled calls move, each by what `samples` says for its name; it writes down what happens."""

    def __init__(self, samples: dict[str, list[Sample]]):
        self.samples = {name: iter(values) for name, values in samples.items()}
        self.now, self.said, self.current = 0.0, [], None
        self.functions = {name: (lambda name=name: self.call(name)) for name in samples}

    def call(self, name: str) -> None:
        self.said.append(f"warm {name}")
        self.current = name

    def stopwatch(self, function, repeats: int) -> Sample:
        name = next(name for name, other in self.functions.items() if other is function)
        assert self.current == name, "a warm call must come right before"
        self.said.append(f"{name} x{repeats}")
        sample = next(self.samples[name])
        self.now += sample.ms * repeats / 1e3
        return sample

    def measure(self, seconds: float, sample_ms: float = 2.0):
        return measure(self.functions, seconds, sample_ms, self.stopwatch, lambda: self.now)


def steady(ms: float, count: int = 1000) -> list[Sample]:
    return [Sample(ms, 0)] * count


def test_samples_interleave_and_repeat_quick_calls():
    machine = Machine({"a": steady(0.5), "b": steady(10.0)})
    timings = machine.measure(seconds=0.05)
    calibration, rounds = machine.said[:4], machine.said[4:]
    assert calibration == ["warm a", "a x1", "warm b", "b x1"]
    assert rounds == ["warm a", "a x4", "warm b", "b x1"] * (len(rounds) // 4)
    assert len(rounds) // 4 == 9  # 12 ms a round, 100 ms for two functions
    assert (timings["a"].median, timings["b"].median, timings["a"].samples) == (0.5, 10.0, 9)


def test_percentiles_are_those_of_the_undisturbed_samples():
    values = np.random.default_rng(0).uniform(1, 3, 40)
    spoilt = {3, 4, 17, 30}
    samples = [Sample(900.0 if i in spoilt else v, int(i in spoilt)) for i, v in enumerate(values)]
    machine = Machine({"a": [Sample(2.0, 0), *samples, *steady(2.0)]})
    timing = machine.measure(seconds=sum(s.ms for s in samples) / 1e3 - 1e-9)["a"]
    clean = [v for i, v in enumerate(values) if i not in spoilt]
    expected = [np.percentile(clean, q) for q in (50, 10, 90)]
    assert [timing.median, timing.p10, timing.p90] == pytest.approx(expected)
    assert (timing.samples, timing.dropped, timing.disturbed) == (36, 4, 0)


def test_more_time_is_taken_until_enough_samples_are_undisturbed():
    busy = [Sample(5.0, 1)] * 10
    machine = Machine({"a": [Sample(5.0, 0), *busy, *steady(2.0)]})
    timing = machine.measure(seconds=0.05)["a"]
    assert (timing.median, timing.samples, timing.dropped, timing.disturbed) == (2.0, LEAST_SAMPLES, 10, 0)


def test_on_a_hopelessly_busy_machine_the_least_disturbed_samples_count():
    switches = [9, 1, 8, 2, 7, 3, 6, 4, 5, 9, 9, 9, 9, 9, 9, 9]
    machine = Machine({"a": [Sample(10.0, 0), *(Sample(10.0 + s, s) for s in switches), *[Sample(99.0, 9)] * 99]})
    timing = machine.measure(seconds=0.05)["a"]
    assert timing.median == 13.0 and timing.samples == timing.disturbed == LEAST_SAMPLES  # 1, 2, 3, 4, 5 switches
    assert PATIENCE * 0.05 <= machine.now < PATIENCE * 0.05 + 0.03


def test_slow_calls_get_their_least_number_of_samples():
    assert Machine({"a": steady(1000.0)}).measure(seconds=0.01)["a"].samples == LEAST_SAMPLES


def test_the_stopwatch_tells_the_time():
    calls = []
    sample = cpu_stopwatch(lambda: calls.append(time.sleep(0.002)), 5)
    assert len(calls) == 5 and sample.ms >= 2 and sample.switches >= 0
