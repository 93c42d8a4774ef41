"""From plans to rows, and the command `hrpose bench`."""

import json
import os

import pytest
import torch

from hrpose import ops
from hrpose.bench import networks, select
from hrpose.bench import peaks as peaks_module
from hrpose.bench.case import OURS, PYTORCH, REFERENCE, Case, Settings
from hrpose.bench.peaks import MEMORY_BYTES, Peaks
from hrpose.bench.plan import Plan
from hrpose.bench.run import run
from hrpose.bench.timing import Timing
from hrpose.cli import main

CPU = torch.device("cpu")


class KnownPeaks(Peaks):
    """100 GFLOP/s, 10 GB/s."""

    def gflops(self, dtype):
        return 100.0

    def gbs(self, nbytes):
        return 10.0


def plan(case: Case) -> Plan:
    return Plan("group", "op", "1x1", "fp32", lambda settings: case)


def test_rate_share_and_order_of_a_row():
    calls = []
    case = Case(torch.ones(1), 1e-6, flops=1e9)
    for name, kind in (("hrpose", OURS), ("other", PYTORCH), ("slow", REFERENCE)):
        case.enter(name, kind, lambda name=name: calls.append(name) or torch.ones(1))
    said = []
    [row] = run([plan(case)], Settings(1, 0.001), KnownPeaks(CPU), lambda p: said.append(p.op), said.append)
    assert said == ["op", row]
    assert [entry.name for entry in row.entries] == ["hrpose", "other", "slow"] and row.unit == "GFLOP/s"
    for entry in row.entries:
        assert entry.rate == pytest.approx(1e9 / entry.timing.median * 1e3 / 1e9)
        assert entry.share == pytest.approx(entry.rate / 100)
    first_of_reference = calls.index("slow", 3)  # the first three were the check
    assert set(calls[first_of_reference:]) == {"slow"}


def test_bytes_are_compared_with_bandwidth():
    case = Case(torch.ones(1), 1e-6, nbytes=5e6)
    case.enter("hrpose", OURS, lambda: torch.ones(1))
    [row] = run([plan(case)], Settings(1, 0.001), KnownPeaks(CPU))
    [entry] = row.entries
    assert row.unit == "GB/s" and entry.rate == pytest.approx(5e6 / entry.timing.median * 1e3 / 1e9)
    assert entry.share == pytest.approx(entry.rate / 10)


def test_wrong_results_are_not_timed():
    calls = []
    case = Case(torch.ones(1), 1e-6, flops=1.0)
    case.enter("hrpose", OURS, lambda: calls.append(0) or torch.zeros(1))
    [row] = run([plan(case)], Settings(1, 0.001), KnownPeaks(CPU))
    assert row.error == "hrpose is off by 1.0e+00 of the largest value expected, the limit is 1.0e-06"
    assert row.entries == () and len(calls) == 1


def test_a_network_that_optimize_refuses_is_an_error_row(monkeypatch):
    def refuse(model):
        raise RuntimeError("optimize: the inference form differs from the model by 2.0e-01 of its output")

    monkeypatch.setattr(networks, "optimize", refuse)
    [row] = run(select(["dpn1_32"], [1], ["fp32"]), Settings(1, 0.001), KnownPeaks(CPU))
    assert row.error.endswith("by 2.0e-01 of its output") and row.entries == ()


def test_threads_are_those_asked_for_and_put_back(monkeypatch):
    before, seen = torch.get_num_threads(), []
    case = Case(torch.ones(1), 1e-6, flops=1.0)
    case.enter("hrpose", OURS, lambda: seen.append(torch.get_num_threads()) or torch.ones(1))
    run([plan(case)], Settings(before + 1, 0.001), KnownPeaks(CPU))
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_peaks_are_measured_once_and_computed_as_written_out(monkeypatch):
    asked = []

    def measure(functions, seconds, stopwatch):
        asked.append(functions)
        return {name: Timing(9.0, 4.0, 9.0, 5) for name in functions}

    monkeypatch.setattr(peaks_module, "measure", measure)
    peaks = Peaks(CPU)
    assert peaks.gflops("fp32") == peaks.gflops("fp32") == pytest.approx(2 * 1024**3 / 4e-3 / 1e9)
    assert len(asked) == 1
    assert peaks.gbs(1000_000) == peaks.gbs(2**20) == pytest.approx(2**20 / 4e-3 / 1e9) and len(asked) == 2
    report = peaks.report(("fp32", "bf16"))
    assert list(report) == ["fp32 GFLOP/s", "bf16 GFLOP/s", "memory GB/s"] and len(asked) == 4
    assert report["memory GB/s"] == pytest.approx(MEMORY_BYTES / 4e-3 / 1e9)


@pytest.fixture
def quick_peaks(monkeypatch):
    monkeypatch.setattr("hrpose.cli.bench.Peaks", KnownPeaks)


def test_the_command(not_compiled, quick_peaks, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert main(["bench", "decode", "--batch", "1", "--seconds", "0.01", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("hrpose ") and "measured peaks: 100 fp32 GFLOP/s" in said and "left out: " in said
    assert "1x17x64x48, flip" in said and "the best of PyTorch" in said
    found = json.loads(file.read_text())
    assert set(found) == {"machine", "peaks", "left_out", "rows", "summary"}
    assert {"cpu", "cores", "isa", "threads", "python", "hrpose", "commit", "torch"} <= set(found["machine"])
    [row] = found["rows"]
    assert row["op"] == "decode" and row["error"] is None and row["ratio_reference"] > 0
    assert {entry["kind"] for entry in row["entries"]} == {"hrpose", "pytorch", "library", "reference"}
    assert found["summary"][0]["ratio_reference"] == pytest.approx(row["ratio_reference"])


def test_json_on_standard_output_stands_alone(not_compiled, quick_peaks, capsys):
    assert main(["bench", "decode", "--batch", "1", "--seconds", "0.01", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["rows"]) == 1 and "measured peaks" in said.err


def test_a_wrong_row_ends_with_code_1_after_all_rows(not_compiled, quick_peaks, monkeypatch, capsys, tmp_path):
    right = ops.decode

    def wrong(*arguments, **settings):
        keypoints, scores = right(*arguments, **settings)
        return keypoints + 0.25 * (len(scores) == 1), scores

    monkeypatch.setattr(ops, "decode", wrong)
    command = ["bench", "decode", "--batch", "1", "--batch", "2", "--seconds", "0.01", "--json", f"{tmp_path}/out.json"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert "wrong results, not timed: decode 1x17x64x48, flip fp32" in str(stop.value.code)  # a text: exit code 1
    said = capsys.readouterr().out
    assert "ERROR, not timed: hrpose is off by" in said and "2x17x64x48, flip" in said and "1 failed" in said
    first, second = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "hrpose is off by" in first["error"] and first["entries"] == [] and second["error"] is None


def test_a_run_that_is_stopped_keeps_its_rows(not_compiled, quick_peaks, monkeypatch, tmp_path):
    def stop(row):
        if row.shape.startswith("2x"):
            raise KeyboardInterrupt
        return row.shape

    monkeypatch.setattr("hrpose.cli.bench.format_row", stop)
    command = ["bench", "decode", "--batch", "1", "--batch", "2", "--seconds", "0.01", "--json", f"{tmp_path}/out.json"]
    assert main(command) != 0
    assert [row["shape"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["1x17x64x48, flip"]


def test_only_some_shapes(not_compiled, quick_peaks, capsys):
    main(["bench", "decode", "--batch", "1", "--batch", "3", "--seconds", "0.01", "--only", "3x17"])
    said = capsys.readouterr().out
    assert "3x17x64x48, flip" in said and "1x17x64x48, flip" not in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["decod"], "did you mean 'decode'"),
        (["decode", "--only", "32x24"], "--only must be part of a shape (1x17x64x48, flip; "),
        (["--threads", "0"], "--threads: must be >= 1, got 0"),
        (["--seconds", "0"], "--seconds: must be a number > 0, got 0.0"),
        (["--seconds", "nan"], "--seconds: must be a number > 0, got nan"),
        (["--dtype", "fp16"], "dtype must be 'fp32' or 'bf16', got 'fp16'"),
        (["--batch", "0"], "batch must be an integer >= 1, got 0"),
        (["--device", "tpu"], "--device: must be cpu, or cuda"),
        (["--json", os.devnull + "/x/out.json"], "--json: must be a folder, but /dev/null is a file"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(more, message, capsys):
    assert main(["bench", *more]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and len(said.err.splitlines()) == 1
