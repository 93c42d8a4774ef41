"""`hrpose ablate`: a paper's ablation on one's own data: every variant, several seeds, the printed figures beside."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hrpose.cli import train
from hrpose.cli.arguments import check_output_folder
from hrpose.errors import check
from hrpose.files import write_atomically
from hrpose.published import PUBLISHED
from hrpose.ranks import is_first
from hrpose.train.fit import LAST, Diverged
from hrpose.train.log import read_log

# What each table compares: the paper, its table, the networks whose rows it takes.
ABLATIONS = {
    "II": ("DPN paper", "II", "DPM against plain bottlenecks, one to four modules"),
    "III": ("DPN paper", "III", "one dilation D for all six blocks against the pyramid"),
    "V": ("DPN paper", "V", "the pyramid against the reversed one, one to four modules"),
    "ram_gpr": ("RAM + GPR paper", "1", "RAM + GPR without its attention, without its refinement, and HRNet"),
}
_COMPARED = ("ram_gpr_w32", "hrnet_w32")  # of the RAM + GPR paper's table
_FIGURES = ("AP", "PCK@0.2", "PCKh@0.5")  # the last on MPII alone


@dataclass(frozen=True)
class Variant:
    """A network of an ablation and its printed AP on COCO val2017, in percent."""

    model: str
    options: tuple[tuple[str, Any], ...]
    printed: float

    @property
    def label(self) -> str:
        return " ".join([self.model, *(f"{name}={str(value).lower()}" for name, value in self.options)])

    @property
    def folder(self) -> str:
        return self.label.replace(" ", "-").replace("=", "-")


def add_parser(commands: Any) -> None:
    about = "; ".join(f"{name}: {what}" for name, (_, _, what) in ABLATIONS.items())
    parser = commands.add_parser(
        "ablate",
        help="train the variants of a paper's ablation, each with several seeds, and compare",
        description="Trains every variant of the tables with several seeds, as `hrpose train` would, and writes "
        "table.md and table.json after each run. A run that is there goes on or is taken as it is, so the same command "
        f"again continues. Tables: {about}.",
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=", ".join(ABLATIONS))
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help='variants to take: "dpn1_32", "dpn1_32 dilation=4", or several at once, "dpn1_32*"; a wrong one lists all',
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each variant, seeds 0.. (default 3)")
    train.add_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check(options.seeds > 0, "--seeds", f"must be > 0, got {options.seeds}")
    check(options.model is None, "--model", "is that of each variant; --only chooses among them")
    check(options.val is not None, "--val", "must be given: without validation there is nothing to compare")
    variants, out = variants_of(options.tables, options.only), Path(options.out)
    check_output_folder(out, "--out")
    for seed in range(options.seeds):  # outermost, so that a table of all variants is there early
        for variant in variants:
            _train(variant, seed, out, options)
            if is_first():
                _write_tables(variants, options.seeds, out)
    if is_first():
        print((out / "table.md").read_text(), end="")


def variants_of(tables: Iterable[str], only: list[str]) -> list[Variant]:
    """The networks of the tables, each once, those whose label a pattern of `only` matches if it is not empty."""
    variants: dict[str, Variant] = {}
    for name in tables:
        check(name in ABLATIONS, "TABLE", f"must be one of {', '.join(ABLATIONS)}, got {name!r}")
        paper, table, _ = ABLATIONS[name]
        for row in PUBLISHED:
            of_table = row.paper == paper and row.table.split(" ")[0] == table and row.size == (192, 256)
            if of_table and row.score is not None and (paper == "DPN paper" or row.model in _COMPARED):
                variant = Variant(row.model, tuple(row.options.items()), row.score)
                variants.setdefault(variant.label, variant)
    wanted = [label for label in variants if not only or any(fnmatchcase(label, pattern) for pattern in only)]
    unknown = [pattern for pattern in only if not any(fnmatchcase(label, pattern) for label in variants)]
    check(not unknown, "--only", f"must be among the variants of the tables ({', '.join(variants)}), got {unknown}")
    return [variants[label] for label in wanted]


def _train(variant: Variant, seed: int, out: Path, options: argparse.Namespace) -> None:
    folder = out / variant.folder / f"seed{seed}"
    if is_first():
        print(f"{variant.label}, seed {seed}:", flush=True)
    flags = vars(options) | {"model": variant.model, "out": str(folder), "resume": (folder / LAST).is_file()}
    flags["option"] = [*(f"{name}={str(value).lower()}" for name, value in variant.options), *options.option]
    flags["set"] = [*options.set, f"seed={seed}"]
    try:
        train.run(argparse.Namespace(**flags))
    except Diverged as error:  # a result too
        if is_first():
            print(f"{variant.label}, seed {seed}: {error}", flush=True)


def results_of(variants: list[Variant], seeds: int, out: Path) -> list[dict[str, Any]]:
    """For each variant its last epoch's scores by seed (percent; None: not there yet), their mean and their standard
    deviation, and the printed AP. The last epoch, not the best: nothing is chosen on the validation set."""
    rows = []
    for variant in variants:
        runs = [_last_epoch(out / variant.folder / f"seed{seed}") for seed in range(seeds)]
        row: dict[str, Any] = {"variant": variant.label, "paper AP": variant.printed}
        row["epochs"] = [run.get("epoch", -1) + 1 for run in runs]
        for figure in _FIGURES:
            found = [None if run.get(figure) is None else 100 * run[figure] for run in runs]
            there = [value for value in found if value is not None]
            row[figure] = {
                "runs": found,
                "mean": statistics.fmean(there) if there else None,
                "sd": statistics.stdev(there) if len(there) > 1 else None,
            }
        rows.append(row)
    return rows


def _last_epoch(folder: Path) -> dict[str, Any]:
    epochs = [entry for entry in read_log(folder / "log.jsonl") if entry.get("kind") == "epoch"]
    return epochs[-1] if epochs else {}


def _write_tables(variants: list[Variant], seeds: int, out: Path) -> None:
    rows = results_of(variants, seeds, out)
    write_atomically(out / "table.json", json.dumps(rows, indent=1).encode())
    write_atomically(out / "table.md", markdown(rows).encode())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: mean and standard deviation over the runs, in percent."""
    names = [name for name in _FIGURES if any(row[name]["mean"] is not None for row in rows)]
    head = "".join(f"| {title} " for title in ("variant", "runs", "epochs", *names, "paper: AP on COCO val2017"))
    head, lines = f"{head}|\n{'|---' * (len(names) + 4)}|\n", []
    for row in rows:
        done = [epochs for epochs in row["epochs"] if epochs]
        epochs = "-" if not done else str(done[0]) if len(set(done)) == 1 else f"{min(done)} to {max(done)}"
        figures = [_figure(row[name]) for name in names]
        lines.append(f"| {' | '.join([row['variant'], str(len(done)), epochs, *figures, str(row['paper AP'])])} |\n")
    return head + "".join(lines)


def _figure(figure: dict[str, Any]) -> str:
    if figure["mean"] is None:
        return "-"
    return f"{figure['mean']:.1f}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.1f}")
