"""Dilation Pyramid Net: "Efficient High-Resolution High-Level-Semantic Representation Learning for Human Pose
Estimation", its module, its network (Table I) and one builder per variant."""

from typing import Any

from torch import Tensor, nn

from hrpose.errors import check, check_choice, check_count
from hrpose.models.blocks import Bottleneck, check_images, conv_bn, initialise


def dilations(scheme: str | int, n: int = 6) -> tuple[int, ...]:
    """Dilation of the 3x3 convolution of bottleneck 1..n of a module.

    Args:
        scheme: "pyramid": 2^(n-i), the paper's DPM; "reversed": 2^(i-1), the RDPM of Table V; an integer D >= 1: D
            everywhere, the stacked dilated convolution of Table III (D = 1 is the "normal" of Table II).
    Raises: InputError for another scheme.
    """
    if scheme == "pyramid":
        return tuple(2 ** (n - i) for i in range(1, n + 1))
    if scheme == "reversed":
        return tuple(2 ** (i - 1) for i in range(1, n + 1))
    valid = isinstance(scheme, int) and not isinstance(scheme, bool) and scheme >= 1
    check(valid, "DPN", f"dilation must be 'pyramid', 'reversed' or an integer >= 1, got {scheme!r}")
    return (scheme,) * n


class DilationPyramidModule(nn.Sequential):
    """Six residual bottlenecks 4C -> C -> 4C at one resolution, whose 3x3 convolutions are dilated.

        X_out = f_N^{d_N}( f_{N-1}^{d_{N-1}}( ... f_1^{d_1}(X_in) ) ),   d_i = 2^(N-i),   N = 6          [eq. 5]

    f_i is bottleneck i. With the "pyramid" scheme the receptive field is complete and 127 pixels wide (eq. 6). All
    schemes have the same parameters and cost. A tap further from its centre than the map is large always reads padding:
    on the 32x24 map of a 256x192 image that holds for all but the centre tap of d = 32, which follows from the paper's
    own sizes and is kept.

    Args:
        channels: C; input and output are (N, 4C, H, W).
        dilation: scheme of `dilations`.
    """

    def __init__(self, channels: int, dilation: str | int = "pyramid"):
        super().__init__(*(Bottleneck(4 * channels, channels, 4 * channels, dilation=d) for d in dilations(dilation)))


class DPN(nn.Module):
    """Dilation Pyramid Net of Table I: stem, `modules` dilation pyramid modules, up-sampling, heatmap head.

    Args:
        num_keypoints: K, heatmaps per image.
        modules: dilation pyramid modules in a row, the n of DPNn_C.
        width: C of the modules, 64 or 32; 64 has the stage conv2, 32 goes from conv1 straight to the reduction.
        dilation: "pyramid", "reversed" or an integer, see `dilations`.
        resolution: of the modules' maps: "medium" is 1/8 of the image, "high" 1/4 (Table IV).
        upsample: "conv1x1": 1x1 convolution, batch norm, x2, HRNet's unit, with which all printed parameter and FLOP
            figures come out; "plain": x2 alone, Table I to the letter.
        interpolation: of the x2, "bilinear" or "nearest". The paper does not say which, and both cost the same. HRNet's
            unit is nearest, but there 3x3 convolutions follow it; here only a 1x1 does, so every 2x2 pixels of a
            nearest heatmap are equal, and arg-max and quarter offset see a map of half the size.
        final_upsample: 2, or 1 to leave the maps at the modules' resolution; 1 needs resolution="high".
    Raises: InputError for a value outside these.
    """

    def __init__(
        self,
        num_keypoints: int = 17,
        *,
        modules: int,
        width: int,
        dilation: str | int = "pyramid",
        resolution: str = "medium",
        upsample: str = "conv1x1",
        interpolation: str = "bilinear",
        final_upsample: int = 2,
    ):
        super().__init__()
        check_count(num_keypoints, "DPN", "num_keypoints")
        check_count(modules, "DPN", "modules")
        check_choice(width, (64, 32), "DPN", "width")
        check_choice(resolution, ("medium", "high"), "DPN", "resolution")
        check_choice(upsample, ("conv1x1", "plain"), "DPN", "upsample")
        check_choice(interpolation, ("bilinear", "nearest"), "DPN", "interpolation")
        check_choice(final_upsample, (2, 1), "DPN", "final_upsample")
        check(
            final_upsample == 2 or resolution == "high",
            "DPN",
            "final_upsample must be 2 with resolution='medium', got 1: heatmaps of 1/8 of the image are too coarse",
        )
        # Every halving rounds up, so other sizes would yield maps that are larger than the image over their stride.
        self.size_multiple = 8 if resolution == "medium" else 4

        stride = 2 if resolution == "medium" else 1
        trunk = 4 * width
        self.conv0 = conv_bn(3, 64, 7, stride=2)
        self.pooling = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv1 = nn.Sequential(Bottleneck(64, 64, 256), *(Bottleneck(256, 64, 256) for _ in range(2)))
        if width == 64:
            self.conv2 = nn.Sequential(
                Bottleneck(256, 128, 512, stride=stride), *(Bottleneck(512, 128, 512) for _ in range(3))
            )
            self.reduce = conv_bn(512, trunk, 1)
        else:
            self.conv2 = nn.Identity()
            self.reduce = conv_bn(256, trunk, 1, stride=stride)
        self.dpm = nn.Sequential(*(DilationPyramidModule(width, dilation) for _ in range(modules)))
        resize = nn.Upsample(scale_factor=final_upsample, mode=interpolation)
        self.upsample = resize if upsample == "plain" else conv_bn(trunk, trunk, 1, relu=False).append(resize)
        self.heatmap = nn.Conv2d(trunk, num_keypoints, 1)
        initialise(self, self.heatmap)

    def forward(self, images: Tensor) -> Tensor:
        """Heatmaps of a batch of images.

        Args:
            images: (N, 3, H, W), normalised; H and W multiples of 8, at "high" resolution of 4.
        Returns: (N, K, H/4, W/4); at "high" resolution with final_upsample=2 (N, K, H/2, W/2).
        Raises: InputError for another shape.
        """
        check_images(images, self.size_multiple, "DPN")
        x = self.conv1(self.pooling(self.conv0(images)))
        x = self.dpm(self.reduce(self.conv2(x)))
        return self.heatmap(self.upsample(x))


def dpn1_32(num_keypoints: int = 17, **options: Any) -> DPN:
    return DPN(num_keypoints, modules=1, width=32, **options)


def dpn2_32(num_keypoints: int = 17, **options: Any) -> DPN:
    return DPN(num_keypoints, modules=2, width=32, **options)


def dpn3_32(num_keypoints: int = 17, **options: Any) -> DPN:
    return DPN(num_keypoints, modules=3, width=32, **options)


def dpn4_32(num_keypoints: int = 17, **options: Any) -> DPN:
    """The light network of Table I: 0.7 M parameters."""
    return DPN(num_keypoints, modules=4, width=32, **options)


def dpn1_64(num_keypoints: int = 17, **options: Any) -> DPN:
    return DPN(num_keypoints, modules=1, width=64, **options)


def dpn2_64(num_keypoints: int = 17, **options: Any) -> DPN:
    return DPN(num_keypoints, modules=2, width=64, **options)


def dpn3_64(num_keypoints: int = 17, **options: Any) -> DPN:
    return DPN(num_keypoints, modules=3, width=64, **options)


def dpn4_64(num_keypoints: int = 17, **options: Any) -> DPN:
    """The network of Table I: 3.3 M parameters."""
    return DPN(num_keypoints, modules=4, width=64, **options)
