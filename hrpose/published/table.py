"""The table of all networks: counted and printed size and cost, as rows, as text and as markdown."""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn

from hrpose.cost import Cost, count_on_meta
from hrpose.models import create_model, is_pose_model, list_models
from hrpose.published import dpn_paper, hrnet_notes, ram_gpr_paper
from hrpose.published.row import Published, counted, rounds_to

PUBLISHED: tuple[Published, ...] = (*dpn_paper.ROWS, *ram_gpr_paper.ROWS, *hrnet_notes.ROWS)
_SIZES = {"_cls": (224, 224), "_seg": (2048, 1024), "v2p": (512, 512)}


def default_input(name: str) -> tuple[tuple[int, int], int | None]:
    """Input (width, height) and number of keypoints of a network's own row: those of its papers' tables."""
    if is_pose_model(name):
        return (192, 256), 17
    return next(size for part, size in _SIZES.items() if part in name), None


def table() -> list[dict[str, Any]]:
    """Counted and printed size and cost, one row per configuration.

    The configurations are those for which a paper prints parameters or FLOPs, and every listed model at its default
    options and `default_input`. Dilation schemes and ablations, for which no cost is printed, are left out.

    Returns: rows of model, options, input (width, height), num_keypoints, params, macs (exact integers),
        macs_deconv_output_grid, macs_training (with the heads that only training runs), params_m (millions), gmacs
        (2^30), paper_params_m and paper_gmacs (None where not printed), counting (how the paper counts) and
        gmacs_as_paper, reproduced (do our figures round to all printed ones; None where nothing is printed), note (why
        not), scores as printed, source (None if nothing is printed).
    """
    rows: list[dict[str, Any]] = []
    for name in list_models():
        configurations: list[tuple] = [({}, *default_input(name))]  # listed even if nothing is printed for it
        for p in PUBLISHED:
            key = (p.options, p.size, p.num_keypoints)
            if p.model == name and (p.params_m is not None or p.gflops is not None) and key not in configurations:
                configurations.append(key)
        for options, size, num_keypoints in configurations:
            key = (name, options, size, num_keypoints)
            rows.append(_row(*key, [p for p in PUBLISHED if (p.model, p.options, p.size, p.num_keypoints) == key]))
    return rows


def _row(
    name: str,
    options: Mapping[str, Any],
    size: tuple[int, int],
    num_keypoints: int | None,
    printed: Sequence[Published],
) -> dict[str, Any]:
    cost, training = _costs(name, tuple(options.items()), size, num_keypoints)
    params_m = next((p.params_m for p in printed if p.params_m is not None), None)
    gflops, counting = next(((p.gflops, p.counting) for p in printed if p.gflops is not None), (None, "exact"))
    as_paper = counted(cost, counting)
    agree = [rounds_to(cost.params / 1e6, params_m)] if params_m is not None else []
    agree += [rounds_to(as_paper, gflops)] if gflops is not None else []
    return {
        "model": name,
        "options": dict(options),
        "input": size,
        "num_keypoints": num_keypoints,
        "params": cost.params,
        "macs": cost.macs,
        "macs_deconv_output_grid": cost.macs_deconv_output_grid,
        "macs_training": training.macs,
        "params_m": cost.params / 1e6,
        "gmacs": cost.gmacs(),
        "paper_params_m": params_m,
        "paper_gmacs": gflops,
        "counting": counting,
        "gmacs_as_paper": as_paper,
        "reproduced": all(agree) if agree else None,
        "note": next((p.note for p in printed if p.note), None),
        "scores": [
            {"score": p.score, "of": p.score_meaning, "remark": p.score_remark, "source": p.source}
            for p in printed
            if p.score is not None
        ],
        "source": _sources(printed),
    }


@cache
def _costs(name: str, options: tuple, size: tuple[int, int], num_keypoints: int | None) -> tuple[Cost, Cost]:
    """In eval and in training mode."""
    model = _network(name, options, num_keypoints)
    cost = count_on_meta(model.eval(), size)
    heads = getattr(model, "intermediate_supervision", False)
    return cost, count_on_meta(model.train(), size) if heads else cost


@lru_cache(maxsize=1)  # rows of one network and several sizes follow one another
def _network(name: str, options: tuple, num_keypoints: int | None) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_keypoints, **dict(options))


def _sources(printed: Sequence[Published]) -> str | None:
    """ "<paper>, Table I, IV" for every paper that prints the configuration."""
    tables: dict[str, list[str]] = {}
    for p in printed:
        listed = tables.setdefault(p.paper, [])
        if p.table not in listed:
            listed.append(p.table)
    return "; ".join(f"{paper}, Table {', '.join(listed)}" for paper, listed in tables.items()) or None


def _options(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in row["options"].items())


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `table` as text of aligned columns: M are millions, G billions (2^30, or as COUNTINGS says) as the
    paper counts them; "-" where nothing is printed, "*" where our figure does not round to the printed one."""
    lines = [("model", "options", "input", "K", "params", "M", "paper", "MACs", "G", "paper", "source, tables")]
    for row in rows:
        lines.append(
            (
                row["model"],
                _options(row) or "-",
                "x".join(map(str, row["input"])),
                str(row["num_keypoints"] or "-"),
                f"{row['params']:,}",
                f"{row['params_m']:.3f}",
                _number(row["paper_params_m"], row["params_m"]),
                f"{row['macs']:,}",
                f"{row['gmacs_as_paper']:.3f}",
                _number(row["paper_gmacs"], row["gmacs_as_paper"]),
                (row["source"] or "-").replace(", Table ", " "),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    align = "<<<>>>>>>><"
    text = [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True)).rstrip() for line in lines
    ]
    return "\n".join([*text, *(["", *(f"* {note}" for note in _notes(rows))] if _notes(rows) else [])])


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `table` as the README shows them."""
    lines = [
        "| network | input | K | parameters | paper | MACs | as the paper counts | paper | AP, PCKh (paper) | source |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = dict.fromkeys(" ".join(filter(None, (str(s["score"]), s["remark"]))) for s in row["scores"])
        cells = (
            " ".join([row["model"], *(f"{k}={v}" for k, v in row["options"].items())]),
            "x".join(map(str, row["input"])),
            str(row["num_keypoints"] or "-"),
            f"{row['params']:,}",
            _number(row["paper_params_m"], row["params_m"], " M"),
            f"{row['macs']:,}",
            f"{row['gmacs_as_paper']:.3f}",
            _number(row["paper_gmacs"], row["gmacs_as_paper"]),
            ", ".join(scores) or "-",
            (row["source"] or "-").replace(", Table ", " "),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(rows))])


def _number(printed: float | None, counted: float, unit: str = "") -> str:
    """A printed figure, with "*" if ours does not round to it."""
    return "-" if printed is None else f"{printed}{unit}{'' if rounds_to(counted, printed) else '*'}"


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """ "*" explained: a line per reason, naming the networks it is about."""
    models: dict[str, list[str]] = {}
    for row in rows:
        if row["reproduced"] is False:
            listed = models.setdefault(row["note"], [])
            if row["model"] not in listed:
                listed.append(row["model"])
    return [f"{', '.join(names)}: {note}" for note, names in models.items()]
