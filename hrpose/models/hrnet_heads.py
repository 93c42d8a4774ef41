"""HRNet for other tasks: image classification (HRNet-Wx-C), semantic segmentation (HRNetV2) and the feature pyramid of
detectors (HRNetV2p). Module names are those of the official classification and segmentation checkpoints."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrpose.errors import check_count
from hrpose.models.blocks import Bottleneck, initialise
from hrpose.models.hrnet import HRNetTrunk, branch_widths


class HRNetClassifier(HRNetTrunk):
    """HRNet-Wx-C: the network whose ImageNet weights start the others.

    Each of the four maps goes through a bottleneck to 128, 256, 512, 1024 channels; then, from high to low resolution,
    a 3x3 convolution of stride 2 takes the sum so far to the next one. 1x1 to 2048, global average, linear.

    Args:
        num_classes: logits per image.
    """

    def __init__(self, *, width: int, bottleneck: bool, num_classes: int = 1000):
        super().__init__(width, outputs=4, bottleneck=bottleneck)
        check_count(num_classes, "HRNetClassifier", "num_classes")
        mids = (32, 64, 128, 256)
        self.incre_modules = nn.ModuleList(
            nn.Sequential(Bottleneck(c, mid, 4 * mid)) for c, mid in zip(branch_widths(width), mids, strict=True)
        )
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4 * mid, 8 * mid, 3, 2, 1), nn.BatchNorm2d(8 * mid), nn.ReLU(inplace=True))
            for mid in mids[:-1]
        )
        self.final_layer = nn.Sequential(nn.Conv2d(1024, 2048, 1), nn.BatchNorm2d(2048), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(2048, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W), H and W multiples of 32; InputError for another shape."""
        maps = [widen(x) for widen, x in zip(self.incre_modules, self.features(images), strict=True)]
        y = maps[0]
        for down, x in zip(self.downsamp_modules, maps[1:], strict=True):
            y = x + down(y)
        return self.classifier(self.final_layer(y).mean((2, 3)))


def concatenated(maps: Sequence[Tensor]) -> Tensor:
    """All branches at the highest resolution: (N, 15 W, H, W), bilinear (HRNetV2)."""
    size = maps[0].shape[2:]
    return torch.cat([maps[0], *(F.interpolate(x, size, mode="bilinear") for x in maps[1:])], dim=1)


class HRNetSegmenter(HRNetTrunk):
    """HRNetV2: the branches concatenated, 1x1 to as many channels, 1x1 to the classes.

    Args:
        num_classes: logits per pixel; 19 are those of Cityscapes.
    """

    def __init__(self, *, width: int, num_classes: int = 19):
        super().__init__(width, outputs=4)
        check_count(num_classes, "HRNetSegmenter", "num_classes")
        channels = sum(branch_widths(width))
        self.last_layer = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, num_classes, 1),
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes, H/4, W/4) of images (N, 3, H, W), H and W multiples of 32; InputError for another
        shape."""
        return self.last_layer(concatenated(self.features(images)))


class HRNetPyramid(HRNetTrunk):
    """HRNetV2p: the concatenated branches, 1x1 to `channels`, averaged down to `levels` resolutions, a 3x3 on each.

    Args:
        channels: of every level.
        levels: level l is 1 / 2^(l+2) of the image, l = 0, 1, ...
    """

    def __init__(self, *, width: int, channels: int = 256, levels: int = 5):
        super().__init__(width, outputs=4)
        check_count(channels, "HRNetPyramid", "channels")
        check_count(levels, "HRNetPyramid", "levels")
        self.size_multiple = max(32, 2 ** (levels + 1))
        self.reduction_conv = nn.Conv2d(sum(branch_widths(width)), channels, 1)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(levels))
        initialise(self)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps (N, channels, H / 2^(l+2), W / 2^(l+2)) of images (N, 3, H, W), H and W multiples of 32 and of
        2^(levels+1); InputError for another shape."""
        x = self.reduction_conv(concatenated(self.features(images)))
        return tuple(conv(F.avg_pool2d(x, 2**level)) for level, conv in enumerate(self.fpn_convs))


def hrnet_w18_cls(**options: Any) -> HRNetClassifier:
    return HRNetClassifier(width=18, bottleneck=False, **options)


def hrnet_w30_cls(**options: Any) -> HRNetClassifier:
    return HRNetClassifier(width=30, bottleneck=False, **options)


def hrnet_w32_cls(**options: Any) -> HRNetClassifier:
    return HRNetClassifier(width=32, bottleneck=False, **options)


def hrnet_w40_cls(**options: Any) -> HRNetClassifier:
    return HRNetClassifier(width=40, bottleneck=False, **options)


def hrnet_w48_cls(**options: Any) -> HRNetClassifier:
    return HRNetClassifier(width=48, bottleneck=False, **options)


def hrnet_w44_cls(**options: Any) -> HRNetClassifier:
    return HRNetClassifier(width=44, bottleneck=True, **options)


def hrnet_w76_cls(**options: Any) -> HRNetClassifier:
    return HRNetClassifier(width=76, bottleneck=True, **options)


def hrnet_w96_cls(**options: Any) -> HRNetClassifier:
    return HRNetClassifier(width=96, bottleneck=True, **options)


def hrnetv2_w40_seg(**options: Any) -> HRNetSegmenter:
    return HRNetSegmenter(width=40, **options)


def hrnetv2_w48_seg(**options: Any) -> HRNetSegmenter:
    return HRNetSegmenter(width=48, **options)


def hrnetv2p_w18(**options: Any) -> HRNetPyramid:
    return HRNetPyramid(width=18, **options)


def hrnetv2p_w32(**options: Any) -> HRNetPyramid:
    return HRNetPyramid(width=32, **options)


def hrnetv2p_w40(**options: Any) -> HRNetPyramid:
    return HRNetPyramid(width=40, **options)


def hrnetv2p_w48(**options: Any) -> HRNetPyramid:
    return HRNetPyramid(width=48, **options)
