"""Figures printed in the papers, and the same figures counted from our networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hrpose.cost import count_cost
from hrpose.models import create_model, list_models

COCO_AP = "AP on COCO val2017, SimpleBaseline's person boxes"
MPII_PCKH = "PCKh@0.5 on the MPII test set"


@dataclass(frozen=True)
class Published:
    """One row of a table in a paper, as printed.

    Attributes:
        model, options, num_keypoints: arguments of `create_model`.
        size: (width, height) of the input image.
        params_m: parameters in millions.
        gflops: multiply-adds in units of 2^30, which the papers call GFLOPs.
        score: in percent; `score_meaning` says of what.
    """

    model: str
    size: tuple[int, int]
    paper: str
    table: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_keypoints: int = 17
    params_m: float | None = None
    gflops: float | None = None
    score: float | None = None
    score_meaning: str | None = None

    @property
    def source(self) -> str:
        return f"{self.paper}, Table {self.table}"


def _coco(table: str, model: str, score: float | None, **printed: Any) -> Published:
    meaning = None if score is None else COCO_AP
    return Published(model, (192, 256), "DPN paper", table, score=score, score_meaning=meaning, **printed)


def _mpii(table: str, model: str, score: float, **printed: Any) -> Published:
    printed |= {"num_keypoints": 16, "score": score, "score_meaning": MPII_PCKH}
    return Published(model, (256, 256), "DPN paper", table, **printed)


# Table II prints 64.5 for the DPN1_64 of which Table IV prints 65.2; the other three agree.
PUBLISHED: tuple[Published, ...] = (
    _coco("I", "dpn4_32", None, params_m=0.7),
    _coco("I", "dpn4_64", None, params_m=3.3),
    _coco("II", "dpn1_64", 64.5),
    _coco("II", "dpn2_64", 68.0),
    _coco("II", "dpn3_64", 69.2),
    _coco("II", "dpn4_64", 69.9),
    _coco("II", "dpn1_64", 59.7, options={"dilation": 1}),
    _coco("II", "dpn2_64", 64.0, options={"dilation": 1}),
    _coco("II", "dpn3_64", 64.3, options={"dilation": 1}),
    _coco("II", "dpn4_64", 64.6, options={"dilation": 1}),
    _coco("III", "dpn1_32", 50.6),
    _coco("III", "dpn1_32", 40.1, options={"dilation": 1}),
    _coco("III", "dpn1_32", 49.3, options={"dilation": 2}),
    _coco("III", "dpn1_32", 48.7, options={"dilation": 4}),
    _coco("III", "dpn1_32", 43.9, options={"dilation": 6}),
    _coco("III", "dpn1_32", 38.5, options={"dilation": 8}),
    _coco("III", "dpn4_32", 62.0),
    _coco("III", "dpn4_32", 58.2, options={"dilation": 1}),
    _coco("III", "dpn4_32", 60.6, options={"dilation": 2}),
    _coco("III", "dpn4_32", 56.6, options={"dilation": 4}),
    _coco("III", "dpn4_32", 50.0, options={"dilation": 6}),
    _coco("III", "dpn4_32", 48.7, options={"dilation": 8}),
    _coco("IV", "dpn1_64", 65.2, gflops=2.1),
    _coco("IV", "dpn2_64", 68.0, gflops=2.4),
    _coco("IV", "dpn3_64", 69.2, gflops=2.7),
    _coco("IV", "dpn4_64", 69.9, gflops=3.0),
    _coco("IV", "dpn1_64", 65.5, gflops=6.0, options={"resolution": "high"}),
    _coco("IV", "dpn2_64", 68.7, gflops=7.2, options={"resolution": "high"}),
    _coco("IV", "dpn3_64", 70.3, gflops=8.4, options={"resolution": "high"}),
    _coco("IV", "dpn4_64", 71.1, gflops=9.6, options={"resolution": "high"}),
    _coco("V", "dpn1_32", 50.6),
    _coco("V", "dpn2_32", 56.9),
    _coco("V", "dpn3_32", 60.0),
    _coco("V", "dpn4_32", 62.0),
    _coco("V", "dpn1_32", 49.0, options={"dilation": "reversed"}),
    _coco("V", "dpn2_32", 56.6, options={"dilation": "reversed"}),
    _coco("V", "dpn3_32", 59.6, options={"dilation": "reversed"}),
    _coco("V", "dpn4_32", 61.6, options={"dilation": "reversed"}),
    _coco("VI", "dpn4_32", 62.0, params_m=0.7, gflops=1.1),
    _coco("VI", "dpn4_64", 69.9, params_m=3.3, gflops=3.0),
    _mpii("VII", "dpn4_32", 86.0, params_m=0.7, gflops=1.4),
    _mpii("VII", "dpn4_64", 88.6, params_m=3.3, gflops=4.0),
)


def table() -> list[dict[str, Any]]:
    """Counted and printed size and cost, one row per configuration.

    The configurations are those for which a paper prints parameters or FLOPs, and every listed model at its default
    options for 17 keypoints and a 192 x 256 image. Dilation schemes other than the default are left out: they cost the
    same.

    Returns: rows of model, options, input (width, height), num_keypoints, params, macs (exact integers), params_m
        (millions), gmacs (2^30), paper_params_m and paper_gmacs (None where not printed), source (None likewise).
    """
    rows: list[dict[str, Any]] = []
    for name in list_models():
        # One list of printed rows per configuration; the default one is there even if nothing is printed for it.
        configurations: list[tuple[tuple, list[Published]]] = [(({}, (192, 256), 17), [])]
        for p in PUBLISHED:
            if p.model != name or (p.params_m is None and p.gflops is None):
                continue
            key = (p.options, p.size, p.num_keypoints)
            same = next((printed for known, printed in configurations if known == key), None)
            if same is None:
                configurations.append((key, [p]))
            else:
                same.append(p)
        for (options, size, num_keypoints), printed in configurations:
            with torch.device("meta"):
                model = create_model(name, num_keypoints, **options)
            cost = count_cost(model, size)
            rows.append(
                {
                    "model": name,
                    "options": dict(options),
                    "input": size,
                    "num_keypoints": num_keypoints,
                    "params": cost.params,
                    "macs": cost.macs,
                    "params_m": cost.params / 1e6,
                    "gmacs": cost.gmacs(),
                    "paper_params_m": next((p.params_m for p in printed if p.params_m is not None), None),
                    "paper_gmacs": next((p.gflops for p in printed if p.gflops is not None), None),
                    "source": _sources(printed),
                }
            )
    return rows


def _sources(printed: Sequence[Published]) -> str | None:
    """ "<paper>, Table I, IV" for every paper that prints the configuration."""
    papers = dict.fromkeys(p.paper for p in printed)
    tables = {paper: ", ".join(p.table for p in printed if p.paper == paper) for paper in papers}
    return "; ".join(f"{paper}, Table {tables[paper]}" for paper in papers) or None


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `table` as text of aligned columns: M are millions, G units of 2^30; "-" where nothing is printed."""
    header = ("model", "options", "input", "K", "params", "M", "paper", "MACs", "G", "paper", "source, tables")
    lines = [header]
    for row in rows:
        lines.append(
            (
                row["model"],
                ", ".join(f"{k}={v}" for k, v in row["options"].items()) or "-",
                "x".join(map(str, row["input"])),
                str(row["num_keypoints"]),
                f"{row['params']:,}",
                f"{row['params_m']:.3f}",
                "-" if row["paper_params_m"] is None else f"{row['paper_params_m']:.1f}",
                f"{row['macs']:,}",
                f"{row['gmacs']:.3f}",
                "-" if row["paper_gmacs"] is None else f"{row['paper_gmacs']:.1f}",
                (row["source"] or "-").replace(", Table ", " "),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    align = "<<<>>>>>>><"
    return "\n".join(
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True)).rstrip() for line in lines
    )
