"""All rows, and which of them a command line means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from hrpose.bench import basic_blocks, bottlenecks, conv, crop, decode, networks, pipeline, ram_sum, stem
from hrpose.bench.case import DTYPES
from hrpose.bench.plan import Plan
from hrpose.errors import InputError, check_choice, check_count
from hrpose.models import list_models

OPS = {
    "decode": decode,
    "crop": crop,
    "ram_sum": ram_sum,
    "bottlenecks": bottlenecks,
    "basic_blocks": basic_blocks,
    "conv": conv,
    "stem": stem,
}
GROUPS = {
    "ops": tuple(OPS),
    "models": tuple(list_models()),
    "all": (*OPS, *list_models(), "pipeline"),
}


def select(
    names: Sequence[str] = (),
    batches: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
) -> list[Plan]:
    """The rows of these names: groups ("ops", "models", "all"), ops, networks, "pipeline". None: the quick ones.

    Args:
        batches: persons or images, in place of each row's own.
        dtypes:  "fp32", "bf16"; by default both. Rows without arithmetic of their choice count as fp32.
        shapes:  texts, one of which the shape of a row contains; by default any shape.
    Raises: InputError for an unknown name, batch or dtype, or if no row is left.
    """
    for n in batches or ():
        check_count(n, "bench", "batch")
    for dtype in dtypes or ():
        check_choice(dtype, tuple(DTYPES), "bench", "dtype")
    for name in names:
        _check_name(name)
    wanted = [op for name in names or ("all",) for op in GROUPS.get(name, (name,))]
    plans = [plan for plan in every_plan(batches, dtypes) if plan.op in wanted and (names or plan.quick)]
    if not plans:
        raise InputError(f"bench: dtype must be one that {', '.join(names)} has rows in, got {', '.join(dtypes or ())}")
    kept = [plan for plan in plans if shapes is None or any(text in plan.shape for text in shapes)]
    if not kept:
        known = "; ".join(dict.fromkeys(plan.shape for plan in plans))
        raise InputError(f"bench: --only must be part of a shape ({known}), got {', '.join(shapes)}")
    return kept


def every_plan(batches: Sequence[int] | None = None, dtypes: Sequence[str] | None = None) -> list[Plan]:
    """In the order in which they are run and printed."""
    dtypes = tuple(dtypes or DTYPES)
    sources = (*OPS.values(), networks, pipeline)
    return [plan for source in sources for plan in source.plans(batches, dtypes)]


def left_out(plans: Sequence[Plan]) -> str:
    """One sentence on the rows that are not among these; "" if none is missing."""
    kept = {(plan.op, plan.shape, plan.dtype) for plan in plans}
    missing: dict[str, int] = {}
    for plan in every_plan():
        if (plan.op, plan.shape, plan.dtype) not in kept:
            missing[plan.group] = missing.get(plan.group, 0) + 1
    counts = ", ".join(f"{count} of {group}" for group, count in missing.items())
    return f"left out: {sum(missing.values())} rows ({counts})" if missing else ""


def _check_name(name: str) -> None:
    valid = (*GROUPS, *GROUPS["all"])
    if name not in valid:
        close = difflib.get_close_matches(name, valid, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"bench: ROWS must be among {', '.join(valid)}, got {name!r}{hint}")
