"""A row that can be asked for, before anything of it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hrpose.bench.case import Case, Settings


@dataclass(frozen=True)
class Plan:
    """group: what it shares a mean with: the op, "models" or "pipeline". op: the name of the op or network.
    quick: is it among the few that `hrpose bench` runs unless told otherwise?"""

    group: str
    op: str
    shape: str
    dtype: str
    build: Callable[[Settings], Case]
    quick: bool = False
