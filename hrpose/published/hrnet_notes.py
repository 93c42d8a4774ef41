"""Tables of "Deep High-Resolution Representation Learning for Human Pose Estimation", as its authors' notes print them:
1 (COCO val2017), 1 of its second part (Cityscapes) and 14 (ImageNet)."""

from typing import Any

from hrpose.published.notes import CPN, HOURGLASS, HRNETV2_W40, HRNETV2_W48, RESCALED, RESNET, TRUNCATED
from hrpose.published.row import CITYSCAPES_MIOU, COCO_AP, IMAGENET_TOP1, Published

_PAPER = "HRNet notes"
_SMALL, _LARGE = (192, 256), (288, 384)


def _coco(model: str, size: tuple[int, int], params_m: float, gflops: float, score: float, **more: Any) -> Published:
    return Published(
        model, size, _PAPER, "1", params_m=params_m, gflops=gflops, score=score, score_meaning=COCO_AP, **more
    )


def _baseline(depth: int, size: tuple[int, int], *printed: float, note: str | None = None) -> Published:
    return _coco(f"simple_baseline_r{depth}", size, *printed, counting="output_grid", note=note)


def _imagenet(model: str, params_m: float, gflops: float, top1: float, note: str | None = None) -> Published:
    return Published(
        model, (224, 224), _PAPER, "14", {}, None, params_m, gflops, "exact", top1, IMAGENET_TOP1, "% top-1 error", note
    )


def _cityscapes(model: str, params_m: float, gflops: float, miou: float, note: str | None = None) -> Published:
    return Published(
        model,
        (2048, 1024),
        _PAPER,
        "1 (Cityscapes)",
        {},
        None,
        params_m,
        gflops,
        "decimal",
        miou,
        CITYSCAPES_MIOU,
        "% mIoU",
        note,
    )


ROWS: tuple[Published, ...] = (
    _coco("hourglass8", _SMALL, 25.1, 14.3, 66.9, note=HOURGLASS),
    _coco("cpn_r50", _SMALL, 27.0, 6.2, 68.6, score_remark="without OHKM"),
    _coco("cpn_r50", _SMALL, 27.0, 6.2, 69.4),
    _coco("cpn_r50", _SMALL, 27.0, 6.2, 69.4, options={"merge": "upsample_first"}, note=CPN),
    _coco("cpn_r50", _SMALL, 27.0, 6.2, 69.4, options={"layout": "caffe"}, note=CPN),
    _baseline(50, _SMALL, 34.0, 8.9, 70.4, note=TRUNCATED),
    _baseline(101, _SMALL, 53.0, 12.4, 71.4),
    _baseline(152, _SMALL, 68.6, 15.7, 72.0, note=TRUNCATED),
    _coco("hrnet_w32", _SMALL, 28.5, 7.1, 73.4, score_remark="from scratch"),
    _coco("hrnet_w32", _SMALL, 28.5, 7.1, 74.4),
    _coco("hrnet_w48", _SMALL, 63.6, 14.6, 75.1),
    _baseline(152, _LARGE, 68.6, 35.6, 74.3, note=RESCALED),
    _coco("hrnet_w32", _LARGE, 28.5, 16.0, 75.8),
    _coco("hrnet_w48", _LARGE, 63.6, 32.9, 76.3),
    _imagenet("hrnet_w18_cls", 21.3, 3.99, 23.1),
    _imagenet("hrnet_w30_cls", 37.7, 7.55, 21.9),
    _imagenet("hrnet_w40_cls", 57.6, 11.8, 21.1),
    _imagenet("resnet50_cls", 25.6, 3.82, 23.3, note=RESNET),
    _imagenet("hrnet_w44_cls", 21.9, 3.9, 23.0),
    _imagenet("resnet101_cls", 44.6, 7.3, 21.6, note=RESNET),
    _imagenet("hrnet_w76_cls", 40.8, 7.3, 21.5),
    _imagenet("resnet152_cls", 60.2, 10.7, 21.2),
    _imagenet("hrnet_w96_cls", 57.5, 10.2, 21.0),
    _cityscapes("hrnetv2_w40_seg", 45.2, 493.2, 80.2, note=HRNETV2_W40),
    _cityscapes("hrnetv2_w48_seg", 65.9, 747.3, 81.1, note=HRNETV2_W48),
)
