"""Ratios, means, the table and the JSON."""

import json

import pytest

from hrpose.bench.case import LIBRARY, OURS, PYTORCH, REFERENCE
from hrpose.bench.row import Entry, Row, format_head, format_row, format_summary, geometric_mean, summarise
from hrpose.bench.timing import Timing


def row(ours: float, *others: tuple[str, float], op: str = "decode", dtype: str = "fp32", **more) -> Row:
    """Medians by kind."""
    entries = [Entry(kind, kind, Timing(ms, ms * 0.9, ms * 1.25, 8, 2), 20 / ms, 0.5 / ms) for kind, ms in others]
    mine = Entry("hrpose", OURS, Timing(ours, ours * 0.9, ours * 1.25, 8, 2), 20 / ours, 0.5 / ours)
    return Row(op, op, "1x17", dtype, "cpu", "avx2", 1, "GB/s", (mine, *entries), **more)


def test_geometric_mean():
    assert geometric_mean([2, 0.5]) == pytest.approx(1.0)
    assert geometric_mean([1, 10, 100]) == pytest.approx(10.0)
    assert geometric_mean([3.0]) == pytest.approx(3.0)
    assert geometric_mean([]) is None


def test_ratios_are_to_the_fastest_of_a_kind():
    timed = row(2.0, (PYTORCH, 6.0), (PYTORCH, 5.0), (LIBRARY, 3.0), (REFERENCE, 40.0))
    assert timed.ratio(PYTORCH) == 2.5 and timed.ratio(LIBRARY) == 1.5 and timed.ratio(REFERENCE) == 20
    assert timed.ratio(PYTORCH, LIBRARY) == 1.5
    assert row(2.0, (REFERENCE, 4.0)).ratio(PYTORCH) is None
    graph = Entry("hrpose, CUDA graph", OURS, Timing(1.0, 1.0, 1.0, 8), 20, 0.5)
    both = Row("g", "o", "s", "fp32", "cuda", None, 1, "GB/s", (*timed.entries, graph))
    assert both.ratio(PYTORCH) == 5.0


def test_means_are_over_the_rows_of_a_group_and_a_dtype():
    failed = Row("decode", "decode", "1x17", "fp32", "cpu", "avx2", 1, error="off by 0.5")
    rows = [row(1, (PYTORCH, 2.0)), row(1, (PYTORCH, 8.0), (LIBRARY, 2.0)), failed]
    rows += [row(2, (PYTORCH, 2.0), dtype="bf16")]
    fp32, bf16 = summarise(rows)
    assert (fp32["group"], fp32["dtype"], fp32["rows"], fp32["failed"]) == ("decode", "fp32", 2, 1)
    assert fp32["ratio_pytorch"] == pytest.approx(4.0) and fp32["ratio_best"] == pytest.approx(2.0)
    assert fp32["ratio_reference"] is None and bf16["ratio_pytorch"] == pytest.approx(1.0)
    text = format_summary(rows)
    assert "4.00x as the best of PyTorch, 2.00x as the best of everybody (2 rows, 1 failed)" in text and "!" not in text
    assert format_summary([]) == ""


def test_a_reference_that_is_faster_than_compiled_is_the_best_of_pytorch():
    found = row(1.0, (PYTORCH, 3.0), (LIBRARY, 4.0), (REFERENCE, 2.0)).to_json()
    assert (found["ratio_pytorch"], found["ratio_best"], found["ratio_reference"]) == (2.0, 2.0, 2.0)


def test_table_lines_up():
    head = format_head().splitlines()[0]
    timed = row(0.25, (PYTORCH, 1.0), absent={"OpenVINO": "not installed: pip install 'hrpose[bench]'"})
    ours, theirs, missing = format_row(timed).splitlines()
    assert ours.startswith("decode ") and ours.split()[:6] == ["decode", "1x17", "fp32", "avx2", "1", "hrpose"]
    assert ours.split()[6:] == ["0.25", "0.225", "0.3125", "80", "GB/s", "200", "%", "2/10"]
    assert theirs.split() == [PYTORCH, "1", "0.9", "1.25", "20", "GB/s", "50", "%", "4.00x", "2/10"]
    for name, text in (("with", "hrpose"), ("shape", "1x17"), ("dtype", "fp32"), ("ISA", "avx2")):
        assert head.index(name) == ours.index(text)
    numbers = {"median ms": "0.25", "p10": "0.225", "p90": "0.3125", "rate": "GB/s", "dropped": "2/10"}
    for name, text in numbers.items():
        assert head.index(name) + len(name) == ours.index(text) + len(text)
    assert missing.strip() == "OpenVINO: not installed: pip install 'hrpose[bench]'"


@pytest.mark.parametrize(("ms", "shown"), [(0.0123456, "0.01235"), (123.456, "123.5"), (12345.6, "12346")])
def test_times_have_four_digits_and_no_exponent(ms, shown):
    assert format_row(row(ms)).split()[6] == shown


def test_disturbed_samples_are_marked_and_explained():
    entry = Entry("hrpose", OURS, Timing(1.0, 1.0, 1.0, 5, 3, 5), 1.0, 0.1)
    marked = Row("crop", "crop", "1", "fp32", "cpu", None, 1, "GB/s", (entry,))
    assert format_row(marked).endswith("3/8!") and "!: other processes" in format_summary([marked])


def test_a_wrong_result_is_shown_instead_of_times():
    text = format_row(Row("crop", "crop", "1", "fp32", "cpu", "avx2", 1, error="hrpose is off by 0.5"))
    assert "ERROR, not timed: hrpose is off by 0.5" in text and "GB/s" not in text


def test_json_holds_everything():
    timed = row(2.0, (PYTORCH, 5.0), (REFERENCE, 8.0), absent={"OpenVINO": "not installed"})
    found = json.loads(json.dumps(timed.to_json()))
    entries = found.pop("entries")
    assert found == {
        "group": "decode", "op": "decode", "shape": "1x17", "dtype": "fp32", "device": "cpu", "isa": "avx2",
        "threads": 1, "unit": "GB/s", "absent": {"OpenVINO": "not installed"}, "error": None,
        "ratio_pytorch": 2.5, "ratio_best": 2.5, "ratio_reference": 4.0,
    }  # fmt: skip
    assert entries[0] == {
        "name": "hrpose", "kind": OURS, "median": 2.0, "p10": 1.8, "p90": 2.5, "samples": 8, "dropped": 2,
        "disturbed": 0, "rate": 10.0, "share": 0.25,
    }  # fmt: skip
    assert [entry["kind"] for entry in entries] == [OURS, PYTORCH, REFERENCE]
