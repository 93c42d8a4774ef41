"""One result: everybody's times for the same work, as a line of a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hrpose.bench.case import LIBRARY, OURS, PYTORCH, REFERENCE
from hrpose.bench.timing import Timing

# Name, width and alignment of the table's columns.
_COLUMNS = (
    ("op", 14, "<"), ("shape", 26, "<"), ("dtype", 5, "<"), ("ISA", 10, "<"), ("threads", 7, ">"), ("with", 24, "<"),
    ("median ms", 10, ">"), ("p10", 9, ">"), ("p90", 9, ">"), ("rate", 13, ">"), ("of peak", 7, ">"),
    ("ratio", 7, ">"), ("dropped", 9, ">"),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One contender's result.

    kind:  what it is, see `bench.case`.
    rate:  GFLOP/s or GB/s, as the row's `unit` says.
    share: rate over the machine's measured peak; above 1 where work that is counted is saved (Winograd, skipped taps).
    """

    name: str
    kind: str
    timing: Timing
    rate: float
    share: float


@dataclass(frozen=True)
class Row:
    """One op or network on one input, by everybody who competes.

    group:  the rows it shares a mean with: those of the same op, or "models".
    isa:    instruction set of our kernels; None where they do not run.
    unit:   "GFLOP/s" or "GB/s", whichever bounds the op.
    absent: who is missing, and why.
    error:  what was computed wrongly, by whom and by how much; then nothing was timed.
    """

    group: str
    op: str
    shape: str
    dtype: str
    device: str
    isa: str | None
    threads: int
    unit: str = ""
    entries: tuple[Entry, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def median(self, *kinds: str) -> float | None:
        """Milliseconds of the fastest contender of these kinds, None without one."""
        return min((entry.timing.median for entry in self.entries if entry.kind in kinds), default=None)

    def ratio(self, *kinds: str) -> float | None:
        """How many times longer than ours the fastest of these kinds takes; None without one."""
        ours, theirs = self.median(OURS), self.median(*kinds)
        return None if ours is None or theirs is None else theirs / ours

    def to_json(self) -> dict[str, Any]:
        """Plain values: the fields, each entry's with its timing's beside them, and the three ratios."""
        entries = [
            {"name": e.name, "kind": e.kind, **dataclasses.asdict(e.timing), "rate": e.rate, "share": e.share}
            for e in self.entries
        ]
        ratios = {f"ratio_{name}": self.ratio(*kinds) for name, kinds in RATIOS.items()}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "entries": entries, **ratios}


# Whom a row is compared with: the best PyTorch path, the best of everybody, the plain reference. That is PyTorch too,
# and where it is faster than what the compiler makes of it, it is the best path.
RATIOS = {
    "pytorch": (PYTORCH, REFERENCE),
    "best": (PYTORCH, LIBRARY, REFERENCE),
    "reference": (REFERENCE,),
}


def geometric_mean(values: Iterable[float]) -> float | None:
    """exp(mean log v) of positive values, None of none: ratios of 2 and 1/2 make 1."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows, failed rows and geometric means of the ratios, per group and dtype in the order of appearance."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.group, row.dtype), []).append(row)
    return [
        {
            "group": group,
            "dtype": dtype,
            "rows": sum(row.error is None for row in members),
            "failed": sum(row.error is not None for row in members),
            **{
                f"ratio_{name}": geometric_mean(r for row in members if (r := row.ratio(*kinds)) is not None)
                for name, kinds in RATIOS.items()
            },
        }
        for (group, dtype), members in groups.items()
    ]


def format_head() -> str:
    """The table's first two lines."""
    line = _line([name for name, _, _ in _COLUMNS])
    return f"{line}\n{'-' * len(line)}"


def format_row(row: Row) -> str:
    """The lines of a row: ours first, then everybody with the ratio of their median to ours, then who is missing."""
    lines = []
    start = [row.op, row.shape, row.dtype, row.isa or "-", str(row.threads)]
    if row.error is not None:
        lines.append(f"{_line(start)}  ERROR, not timed: {row.error}")
    ours = row.median(OURS)
    for entry in row.entries:
        timing = entry.timing
        dropped = f"{timing.dropped}/{timing.dropped + timing.samples}{'!' if timing.disturbed else ''}"
        ratio = "" if entry.kind == OURS or ours is None else f"{timing.median / ours:.2f}x"
        times = [_number(value, 4) for value in (timing.median, timing.p10, timing.p90)]
        rate = f"{_number(entry.rate, 3)} {row.unit}"
        lines.append(_line([*start, entry.name, *times, rate, f"{100 * entry.share:.0f} %", ratio, dropped]))
        start = [""] * 5
    lines += [f"{'':{sum(width + 2 for _, width, _ in _COLUMNS[:5])}}{name}: {why}" for name, why in row.absent.items()]
    return "\n".join(lines)


def format_summary(rows: Sequence[Row]) -> str:
    """Geometric means per group, and what "!" means if there is one; "" without rows."""
    lines = []
    names = {"pytorch": "as the best of PyTorch", "best": "as the best of everybody", "reference": "as the reference"}
    for group in summarise(rows):
        parts = [f"{group[f'ratio_{key}']:.2f}x {name}" for key, name in names.items() if group[f"ratio_{key}"]]
        failed = f", {group['failed']} failed" if group["failed"] else ""
        name, ratios = f"{group['group']} {group['dtype']}", ", ".join(parts) or "nothing to compare with"
        lines.append(f"{name:<18}  {ratios} ({group['rows']} rows{failed})")
    if any(entry.timing.disturbed for row in rows for entry in row.entries):
        lines.append("!: other processes took the core so often that disturbed samples count: better repeat")
    return "\n".join(["ours is so many times as fast, geometric mean over the rows:", *lines]) if lines else ""


def _number(value: float, digits: int) -> str:
    """With so many digits that count; without an exponent."""
    return f"{value:.{digits}g}" if 1e-3 <= value < 10**digits else f"{value:.0f}"


def _line(cells: Sequence[str]) -> str:
    parts = [f"{cell:{align}{width}}" for cell, (_, width, align) in zip(cells, _COLUMNS, strict=False)]
    return "  ".join(parts).rstrip()
