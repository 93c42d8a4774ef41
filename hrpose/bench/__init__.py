"""Speed, measured: every op, every network and the whole way, each against everybody else who can do it.

`hrpose bench` prints the rows; `benchmarks/RESULTS.md` of the repository keeps the accepted ones.
"""

from hrpose.bench.case import Case, Settings, WrongResult
from hrpose.bench.catalogue import select
from hrpose.bench.peaks import Peaks
from hrpose.bench.row import Entry, Row
from hrpose.bench.run import run
from hrpose.bench.timing import Timing, measure

__all__ = ["Case", "Entry", "Peaks", "Row", "Settings", "Timing", "WrongResult", "measure", "run", "select"]
