"""`hrpose bench`: how fast everything is here, and how fast others are."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import hrpose
from hrpose.bench import Peaks, Row, Settings, select
from hrpose.bench import run as run_rows
from hrpose.bench.catalogue import left_out
from hrpose.bench.machine import describe, format_machine
from hrpose.bench.plan import Plan
from hrpose.bench.row import format_head, format_row, format_summary, summarise
from hrpose.bench.run import settled
from hrpose.cli.arguments import check_output_folder, device_from
from hrpose.errors import check
from hrpose.files import write_atomically

SECONDS = 0.5
ABOUT = """Times hrpose against PyTorch (compiled), ONNX Runtime, OpenVINO, OpenCV and numpy; whoever is not installed
is named (pip install 'hrpose[bench]'). Results are checked before they are timed. "ratio" is a contender's median over
ours: above 1 we are faster. "of peak" compares with what PyTorch's matrix product and sum reach on this machine: more
than 100 % is a kernel that multiplies less than is counted (Winograd, taps in padding) or fetches ahead."""
ROWS_HELP = (
    "ops, models or all; an op's name, such as decode; a network's name, see `hrpose models`; or pipeline "
    "(default: a few of each, about two minutes; all networks take hours, since each row is compiled anew)"
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="time ops, networks and the whole way against others", description=ABOUT)
    parser.add_argument("rows", nargs="*", metavar="ROWS", help=ROWS_HELP)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of every contender (default 1)")
    parser.add_argument("--dtype", action="append", metavar="NAME", help="fp32 or bf16 (default both), repeatable")
    parser.add_argument(
        "--batch",
        action="append",
        type=int,
        metavar="N",
        help="persons or images (default: each row's own), repeatable",
    )
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="rows whose shape contains this, such as 32x24; repeatable"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"of timing per contender (default {SECONDS})"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--json", metavar="FILE", help="also write everything there; - prints it instead of the table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check(options.threads >= 1, "--threads", f"must be >= 1, got {options.threads}")
    valid = math.isfinite(options.seconds) and options.seconds > 0
    check(valid, "--seconds", f"must be a number > 0, got {options.seconds}")
    settings = Settings(options.threads, options.seconds, device_from(options))
    plans = select(options.rows, options.batch, options.dtype, options.only)
    if options.json not in (None, "-"):
        check_output_folder(Path(options.json).absolute().parent, "--json")
    out = sys.stderr if options.json == "-" else sys.stdout

    peaks, machine = Peaks(settings.device), describe(settings, hrpose.__version__)
    with settled(settings):
        ceilings = peaks.report(tuple(dict.fromkeys(plan.dtype for plan in plans)))
    print(format_machine(machine, ceilings), format_head(), sep="\n", file=out, flush=True)
    missing, rows = left_out(plans), []
    head = {"machine": machine, "peaks": ceilings, "left_out": missing}

    def report(row: Row) -> None:
        rows.append(row)
        print(format_row(row), file=out, flush=True)
        if options.json not in (None, "-"):  # each time anew: a run that is stopped keeps the rows it has
            _write_json(options.json, head, rows)

    run_rows(plans, settings, peaks, _announce, report)
    print(format_summary(rows), file=out)
    if missing:
        print(f"{missing}; see `hrpose bench --help`, `hrpose bench all` takes hours", file=out)
    if options.json == "-":
        _write_json(options.json, head, rows)
    wrong = [f"{row.op} {row.shape} {row.dtype}" for row in rows if row.error]
    if wrong:
        raise SystemExit(f"hrpose: error: wrong results, not timed: {'; '.join(wrong)}")


def _announce(plan: Plan) -> None:
    """Compiling can take a minute: say what is going on, to someone who watches."""
    if sys.stderr.isatty():
        print(f"{plan.op} {plan.shape} {plan.dtype} ...", end="\r", file=sys.stderr, flush=True)


def _write_json(file: str, head: dict[str, Any], rows: list[Row]) -> None:
    text = json.dumps({**head, "rows": [row.to_json() for row in rows], "summary": summarise(rows)}, indent=1)
    if file == "-":
        print(text)
    else:
        write_atomically(file, f"{text}\n".encode())
