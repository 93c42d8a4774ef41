"""Tables of "Efficient High-Resolution High-Level-Semantic Representation Learning for Human Pose Estimation"."""

from typing import Any

from hrpose.published.notes import HOURGLASS, RESCALED, TRUNCATED
from hrpose.published.row import COCO_AP, MPII_PCKH, Published


def _coco(table: str, model: str, score: float | None, **printed: Any) -> Published:
    meaning = None if score is None else COCO_AP
    return Published(model, (192, 256), "DPN paper", table, score=score, score_meaning=meaning, **printed)


def _mpii(table: str, model: str, score: float, **printed: Any) -> Published:
    printed |= {"num_keypoints": 16, "score": score, "score_meaning": MPII_PCKH}
    return Published(model, (256, 256), "DPN paper", table, **printed)


# Table II prints 64.5 for the DPN1_64 of which Table IV prints 65.2; the other three agree.
ROWS: tuple[Published, ...] = (
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
    _coco("VI", "dpn2_hrnet_w32", 75.0, params_m=29.5, gflops=7.8),
    _coco("VI", "hourglass8", 66.9, params_m=25.1, gflops=14.3, note=HOURGLASS),
    _coco("VI", "hourglass8", 66.9, params_m=25.1, gflops=14.3, options={"refine": "bottom"}, note=HOURGLASS),
    _coco("VI", "hourglass8", 66.9, params_m=25.1, gflops=14.3, options={"refine": "none"}, note=HOURGLASS),
    _coco("VI", "cpn_r50", 69.4, params_m=27.0, gflops=6.2),
    _coco("VI", "simple_baseline_r50", 70.4, params_m=34.0, gflops=8.9, counting="output_grid", note=TRUNCATED),
    _coco("VI", "hrnet_w32", 74.4, params_m=28.5, gflops=7.1),
    _coco("VI", "hrnet_w48", 75.1, params_m=63.6, gflops=14.6),
    _mpii("VII", "simple_baseline_r152", 91.5, params_m=68.6, gflops=20.9, counting="output_grid", note=RESCALED),
    _mpii("VII", "dpn4_32", 86.0, params_m=0.7, gflops=1.4),
    _mpii("VII", "dpn4_64", 88.6, params_m=3.3, gflops=4.0),
)
