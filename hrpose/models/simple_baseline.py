"""SimpleBaseline: "Simple Baselines for Human Pose Estimation and Tracking" (Xiao, Wu, Wei, ECCV 2018), with one
builder per depth. Module names are those of the official checkpoints."""

from typing import Any

from torch import Tensor, nn

from hrpose.errors import check_choice, check_count
from hrpose.models.blocks import initialise
from hrpose.models.resnet import CHANNELS, ResNetTrunk


class SimpleBaseline(ResNetTrunk):
    """ResNet, three transposed convolutions of stride 2 with batch norm and ReLU, and a 1x1 convolution.

    The printed FLOPs charge a transposed convolution for its output grid, four times what it computes: 8.99 G (2^30)
    for ResNet-50 and a 192 x 256 image, of which 5.05 are true (`macs_deconv_output_grid` and `macs` of `hrpose.cost`).
    The official code draws the weights after the trunk from N(0, 0.001) and starts the trunk from ImageNet weights;
    here a network that is trained from scratch starts as `blocks.initialise` says.

    Args:
        num_keypoints: K, heatmaps per image.
        depth: of the ResNet: 50, 101 or 152.
        deconv_channels: of each transposed convolution.
        deconv_kernel: 2, 3 or 4; each gives exactly twice the size.
    Raises: InputError for a value outside these.
    """

    def __init__(self, num_keypoints: int = 17, *, depth: int, deconv_channels: int = 256, deconv_kernel: int = 4):
        super().__init__(depth)
        check_count(num_keypoints, "SimpleBaseline", "num_keypoints")
        check_count(deconv_channels, "SimpleBaseline", "deconv_channels")
        check_choice(deconv_kernel, (2, 3, 4), "SimpleBaseline", "deconv_kernel")
        # (size - 1) * 2 - 2 * padding + kernel + output_padding = 2 * size
        padding, output_padding = (deconv_kernel - 1) // 2, deconv_kernel % 2
        layers: list[nn.Module] = []
        for before in (CHANNELS[-1], deconv_channels, deconv_channels):
            deconv = nn.ConvTranspose2d(before, deconv_channels, deconv_kernel, 2, padding, output_padding, bias=False)
            layers += [deconv, nn.BatchNorm2d(deconv_channels), nn.ReLU(inplace=True)]
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(deconv_channels, num_keypoints, 1)
        initialise(self, self.final_layer)

    def forward(self, images: Tensor) -> Tensor:
        """Heatmaps (N, K, H/4, W/4) of images (N, 3, H, W), H and W multiples of 32.

        Raises: InputError for another shape.
        """
        return self.final_layer(self.deconv_layers(self.features(images)[-1]))


def simple_baseline_r50(num_keypoints: int = 17, **options: Any) -> SimpleBaseline:
    """34.0 M parameters."""
    return SimpleBaseline(num_keypoints, depth=50, **options)


def simple_baseline_r101(num_keypoints: int = 17, **options: Any) -> SimpleBaseline:
    """53.0 M parameters."""
    return SimpleBaseline(num_keypoints, depth=101, **options)


def simple_baseline_r152(num_keypoints: int = 17, **options: Any) -> SimpleBaseline:
    """68.6 M parameters."""
    return SimpleBaseline(num_keypoints, depth=152, **options)
