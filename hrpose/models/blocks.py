"""Building blocks shared by the networks, and their initialisation."""

import torch.nn.functional as F
from torch import Tensor, nn

from hrpose.errors import InputError


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution without bias, batch norm and, if `relu`, ReLU; the padding keeps the size at stride 1."""
    padding = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False)
    layers = [conv, nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def check_images(images: Tensor, multiple: int, where: str) -> None:
    """Raise InputError unless `images` is (N, 3, H, W) with H and W multiples of `multiple`: every halving rounds up,
    so other sizes would yield maps that are larger than the image over their stride."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % multiple or images.shape[3] % multiple:
        raise InputError(
            f"{where}: images must be (N, 3, H, W) with H and W multiples of {multiple}, got {tuple(images.shape)}"
        )


class DilatedConv2d(nn.Conv2d):
    """3x3 convolution without bias, padded by its dilation.

    At stride 1 and a dilation of at least the height and the width of the map, all taps but the centre read padding
    alone. Then the centre alone is multiplied: the same values and gradients for a ninth of the work (the other taps'
    gradients are zero).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1):
        super().__init__(in_channels, out_channels, 3, stride, dilation, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 1 and self.dilation[0] >= max(x.shape[2], x.shape[3]):
            return F.conv2d(x, self.weight[:, :, 1:2, 1:2], self.bias)
        return super().forward(x)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, added to its input, then ReLU: HRNet's branches.

    Module names are those of HRNet's checkpoints.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> the same."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + x, inplace=True)


class Bottleneck(nn.Module):
    """Residual bottleneck: 1x1 -> 3x3 (stride, dilation) -> 1x1, added to the shortcut, then ReLU.

    `stride_in` says which convolution has the stride: "3x3", as in torchvision, SimpleBaseline and HRNet, or "1x1", the
    first one, as in the original ResNet and its Caffe weights.
    The shortcut is the identity, or a strided 1x1 convolution with batch norm where the width or the size changes.
    Module names are those of torchvision's and HRNet's checkpoints.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        stride_in: str = "3x3",
    ):
        super().__init__()
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_channels)
        self.conv2 = DilatedConv2d(mid_channels, mid_channels, stride=second, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(mid_channels)
        self.conv3 = nn.Conv2d(mid_channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = conv_bn(in_channels, out_channels, 1, stride=stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + shortcut, inplace=True)


def initialise(model: nn.Module, *heads: nn.Conv2d) -> None:
    """Set the starting weights of a network that is trained from scratch.

    Convolutions: normal with He's fan-out variance, so that gradients keep their size on the way down; batch norm:
    weight 1, bias 0; every other bias 0; `heads`, the layers that emit heatmaps: N(0, 0.001), as in the official code
    of SimpleBaseline and HRNet, because targets are zero almost everywhere and a head of He's size starts far off.
    The last batch norm of a residual block: weight 0, so that the block starts as its shortcut. A deep stack of fresh
    blocks at weight 1 multiplies rounding errors (an untrained dpn4_64 in bf16 is off by most of its output), and found
    fewer discs of a synthetic task after 40 steps of Adam in four of four runs: 0.72 to 0.86 against 0.91 to 0.96.
    """
    if next(model.parameters()).is_meta:
        return  # no numbers to draw, and drawing none is slow
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
        elif isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
    for head in heads:
        nn.init.normal_(head.weight, std=0.001)
