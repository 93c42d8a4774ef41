"""One row of a table in a paper, as printed, and whether our count of the same figure rounds to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hrpose.cost import Cost

COCO_AP = "AP on COCO val2017, SimpleBaseline's person boxes"
MPII_PCKH = "PCKh@0.5 on the MPII test set"
IMAGENET_TOP1 = "top-1 error on the ImageNet validation set"
CITYSCAPES_MIOU = "mean IoU on Cityscapes val"

# How the tables count their "GFLOPs": always multiply-adds, never twice that.
COUNTINGS = {
    "exact": "multiply-adds / 2^30",
    "output_grid": "multiply-adds / 2^30, transposed convolutions over their output grid",
    "decimal": "multiply-adds / 10^9",
}


@dataclass(frozen=True)
class Published:
    """One row of a table in a paper, as printed.

    Attributes:
        model, options, num_keypoints: arguments of `create_model`.
        size: (width, height) of the input image.
        params_m: parameters in millions.
        gflops: in the unit of `counting`, one of COUNTINGS.
        score: in percent; `score_meaning` says of what, `score_remark` what sets it apart from the table's others.
        note: why a figure does not come out, None if all do.
    """

    model: str
    size: tuple[int, int]
    paper: str
    table: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_keypoints: int | None = 17
    params_m: float | None = None
    gflops: float | None = None
    counting: str = "exact"
    score: float | None = None
    score_meaning: str | None = None
    score_remark: str | None = None
    note: str | None = None

    @property
    def source(self) -> str:
        return f"{self.paper}, Table {self.table}"


def counted(cost: Cost, counting: str) -> float:
    """GFLOPs of a network as a table with this counting would print them, unrounded."""
    if counting == "decimal":
        return cost.gmacs(10**9)
    return cost.gmacs(deconv=counting)


def rounds_to(value: float, printed: float) -> bool:
    """Does `value`, rounded to the decimals of `printed`, give it?"""
    decimals = len(str(printed).partition(".")[2])
    return round(value, decimals) == printed
