"""Stacked Hourglass: "Stacked Hourglass Networks for Human Pose Estimation" (Newell, Yang, Deng, ECCV 2016), its
residual module, its hourglass, the stack and one builder per number of hourglasses."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hrpose.errors import check_choice, check_count
from hrpose.models.blocks import check_images, initialise

_CHANNELS = 256
_DEPTH = 4


class PreActivationBottleneck(nn.Module):
    """Residual bottleneck of the original Torch7 code: batch norm and ReLU come before each convolution.

        y = x + conv1x1( relu( bn( conv3x3( relu( bn( conv1x1( relu( bn(x) ))))))))      widths C -> C'/2 -> C'/2 -> C'

    Where the width changes, x passes a 1x1 convolution. All convolutions have a bias, as there: a batch norm takes out
    again what those before it add, but they are part of the printed size.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        mid_channels = out_channels // 2
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1)
        self.bn2 = nn.BatchNorm2d(mid_channels)
        self.conv2 = nn.Conv2d(mid_channels, mid_channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(mid_channels)
        self.conv3 = nn.Conv2d(mid_channels, out_channels, 1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        return self.conv3(F.relu(self.bn3(y), inplace=True)) + self.shortcut(x)


class HourglassModule(nn.Module):
    """One hourglass, by recursion: down to 1/2^depth of the size and up again, with a skip branch at every size.

        hg_d(x) = res(x) + up2( res( hg_{d-1}( res( maxpool2(x) ))))        hg_0 = `bottom` residual bottlenecks

    Args:
        depth:  halvings.
        bottom: residual bottlenecks at the smallest size.
    """

    def __init__(self, depth: int, bottom: int):
        super().__init__()
        self.skip, self.down, self.up = (PreActivationBottleneck(_CHANNELS, _CHANNELS) for _ in range(3))
        if depth > 1:
            self.inner: nn.Module = HourglassModule(depth - 1, bottom)
        else:
            self.inner = nn.Sequential(*(PreActivationBottleneck(_CHANNELS, _CHANNELS) for _ in range(bottom)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 256, H, W) -> the same; H and W multiples of 2^depth."""
        y = self.up(self.inner(self.down(F.max_pool2d(x, 2))))
        return self.skip(x) + F.interpolate(y, scale_factor=2.0, mode="nearest")


class Hourglass(nn.Module):
    """Stem to 1/4 of the image, then `stacks` hourglasses with a heatmap head each. All but the last hand on

        x_{i+1} = x_i + conv1x1(features_i) + conv1x1(heatmaps_i).

    Args:
        num_keypoints: K, heatmaps per image.
        stacks: hourglasses in a row.
        refine: where a residual bottleneck stands besides those of the hourglass: "after" it, as in the original code;
            at the "bottom", as a second one at the smallest size; "none". For 8 stacks, 17 keypoints and a 192 x 256
            image these give 25.438 M parameters and 19.178 G multiply-adds (2^30), 25.438 M and 14.322 G, 23.722 M and
            14.303 G; HRNet's table prints 25.1 M and 14.3 G, which none of them is.
    Raises: InputError for a value outside these.
    """

    intermediate_supervision = True  # a tuple of heatmaps in training mode, the final ones last
    size_multiple = 4 * 2**_DEPTH  # every map can be halved _DEPTH times without a remainder

    def __init__(self, num_keypoints: int = 17, *, stacks: int, refine: str = "after"):
        super().__init__()
        check_count(num_keypoints, "Hourglass", "num_keypoints")
        check_count(stacks, "Hourglass", "stacks")
        check_choice(refine, ("after", "bottom", "none"), "Hourglass", "refine")

        c = _CHANNELS
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            PreActivationBottleneck(64, 128),
            nn.MaxPool2d(2),
            PreActivationBottleneck(128, 128),
            PreActivationBottleneck(128, c),
        )
        bottom, after = 2 if refine == "bottom" else 1, 1 if refine == "after" else 0
        self.hourglasses = nn.ModuleList(HourglassModule(_DEPTH, bottom) for _ in range(stacks))
        self.features = nn.ModuleList(
            nn.Sequential(
                *(PreActivationBottleneck(c, c) for _ in range(after)),
                nn.Conv2d(c, c, 1),
                nn.BatchNorm2d(c),
                nn.ReLU(inplace=True),
            )
            for _ in range(stacks)
        )
        self.heatmaps = nn.ModuleList(nn.Conv2d(c, num_keypoints, 1) for _ in range(stacks))
        self.merge_features = nn.ModuleList(nn.Conv2d(c, c, 1) for _ in range(stacks - 1))
        self.merge_heatmaps = nn.ModuleList(nn.Conv2d(num_keypoints, c, 1) for _ in range(stacks - 1))
        initialise(self, *self.heatmaps)
        # Fresh blocks pass their input on, as elsewhere, but here it is the last convolution that is zero: behind a
        # batch norm of weight 0 the ReLU would let neither values nor gradients through, and the block would stay dead.
        # An untrained hourglass8 in mixed bf16 is off by 44 % of its output with He's weights, by 4 % with these, and
        # after 60 steps on 16 persons the sum of its losses was 0.0092 with the former, 0.0068 with the latter.
        for module in self.modules():
            if isinstance(module, PreActivationBottleneck):
                nn.init.zeros_(module.conv3.weight)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Heatmaps of a batch of images.

        Args:
            images: (N, 3, H, W), normalised; H and W multiples of 64.
        Returns: (N, K, H/4, W/4) of the last stack; in training mode a tuple of those of every stack, in their order.
        Raises: InputError for another shape.
        """
        check_images(images, self.size_multiple, "Hourglass")
        x = self.stem(images)
        outputs = []
        for i, hourglass in enumerate(self.hourglasses):
            y = self.features[i](hourglass(x))
            outputs.append(self.heatmaps[i](y))
            if i < len(self.merge_features):
                x = x + self.merge_features[i](y) + self.merge_heatmaps[i](outputs[i])
        return tuple(outputs) if self.training else outputs[-1]


def hourglass1(num_keypoints: int = 17, **options: Any) -> Hourglass:
    return Hourglass(num_keypoints, stacks=1, **options)


def hourglass2(num_keypoints: int = 17, **options: Any) -> Hourglass:
    return Hourglass(num_keypoints, stacks=2, **options)


def hourglass4(num_keypoints: int = 17, **options: Any) -> Hourglass:
    return Hourglass(num_keypoints, stacks=4, **options)


def hourglass8(num_keypoints: int = 17, **options: Any) -> Hourglass:
    """The network of the paper: 25.4 M parameters."""
    return Hourglass(num_keypoints, stacks=8, **options)
