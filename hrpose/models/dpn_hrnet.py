"""DPN2_hrnet: two dilation pyramid modules behind HRNet-W32 (Table VI of the DPN paper)."""

from typing import Any

from torch import Tensor, nn

from hrpose.errors import check_choice, check_count
from hrpose.models.blocks import conv_bn, initialise
from hrpose.models.dpn import DilationPyramidModule
from hrpose.models.hrnet import HRNetTrunk


class DPNHRNet(HRNetTrunk):
    """HRNet's trunk, its down-sampling unit (3x3, stride 2), dilation pyramid modules at 1/8 of the image, DPN's tail.

    The paper says no more than "two more DPM modules stacked to the end"; modules with C = 64 on this map are the one
    placement that gives its 29.5 M parameters and 7.8 GFLOPs.

    Args:
        num_keypoints: K, heatmaps per image.
        width: W of the trunk.
        modules: dilation pyramid modules in a row.
        dilation: their scheme, see `dpn.dilations`.
        interpolation: of the x2 before the head, "bilinear" or "nearest", see `dpn.DPN`.
    Raises: InputError for a value outside these.
    """

    def __init__(
        self,
        num_keypoints: int = 17,
        *,
        width: int,
        modules: int,
        dilation: str | int = "pyramid",
        interpolation: str = "bilinear",
    ):
        super().__init__(width, outputs=1)
        check_count(num_keypoints, "DPNHRNet", "num_keypoints")
        check_count(modules, "DPNHRNet", "modules")
        check_choice(interpolation, ("bilinear", "nearest"), "DPNHRNet", "interpolation")
        self.reduce = conv_bn(width, 256, 3, stride=2)
        self.dpm = nn.Sequential(*(DilationPyramidModule(64, dilation) for _ in range(modules)))
        resize = nn.Upsample(scale_factor=2, mode=interpolation)
        self.upsample = conv_bn(256, 256, 1, relu=False).append(resize)
        self.heatmap = nn.Conv2d(256, num_keypoints, 1)
        initialise(self, self.heatmap)

    def forward(self, images: Tensor) -> Tensor:
        """Heatmaps (N, K, H/4, W/4) of images (N, 3, H, W), H and W multiples of 32.

        Raises: InputError for another shape.
        """
        return self.heatmap(self.upsample(self.dpm(self.reduce(self.features(images)[0]))))


def dpn2_hrnet_w32(num_keypoints: int = 17, **options: Any) -> DPNHRNet:
    """The network of Table VI: 29.5 M parameters."""
    return DPNHRNet(num_keypoints, width=32, modules=2, **options)
