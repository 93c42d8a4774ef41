"""Table 1 and the ablations of "Learning Enhanced Resolution-wise Features for Human Pose Estimation".

Its SimpleBaseline rows count transposed convolutions over their output grid; its own come out with the exact count.
"""

from hrpose.published.notes import HOURGLASS, RESCALED, TRUNCATED
from hrpose.published.row import COCO_AP, Published

_PAPER = "RAM + GPR paper"
_SMALL, _LARGE = (192, 256), (288, 384)


def _val(model: str, size: tuple[int, int], params_m: float, gflops: float, score: float, **more: str) -> Published:
    return Published(
        model, size, _PAPER, "1", params_m=params_m, gflops=gflops, score=score, score_meaning=COCO_AP, **more
    )


def _test(model: str, score: float) -> Published:
    return Published(model, _LARGE, _PAPER, "1", score=score, score_meaning=COCO_AP, score_remark="test-dev")


def _ablation(score: float, option: str) -> Published:
    options = {option: False}
    return Published("ram_gpr_w32", _SMALL, _PAPER, "1 (section 4.4)", options, score=score, score_meaning=COCO_AP)


ROWS: tuple[Published, ...] = (
    _val("hourglass8", _SMALL, 25.1, 14.3, 66.9, note=HOURGLASS),
    _val("cpn_r50", _SMALL, 27.0, 6.2, 69.4),
    _val("simple_baseline_r152", _SMALL, 68.6, 15.7, 72.0, counting="output_grid", note=TRUNCATED),
    _val("hrnet_w32", _SMALL, 28.5, 7.1, 74.4),
    _val("hrnet_w48", _SMALL, 63.6, 14.6, 75.1),
    _val("ram_gpr_w32", _SMALL, 31.4, 7.7, 76.0),
    _val("ram_gpr_w48", _SMALL, 70.0, 15.8, 76.5),
    _val("simple_baseline_r152", _LARGE, 68.6, 35.6, 74.3, counting="output_grid", note=RESCALED),
    _val("hrnet_w32", _LARGE, 28.5, 16.0, 75.8),
    _val("hrnet_w48", _LARGE, 63.6, 32.9, 76.3),
    _val("ram_gpr_w32", _LARGE, 31.4, 17.2, 77.3),
    _val("ram_gpr_w48", _LARGE, 70.0, 35.6, 77.7),
    _test("simple_baseline_r152", 73.7),
    _test("hrnet_w32", 74.9),
    _test("hrnet_w48", 75.5),
    _test("ram_gpr_w32", 76.5),
    _test("ram_gpr_w48", 77.0),
    _ablation(75.7, "attention"),
    _ablation(75.2, "refinement"),
)
