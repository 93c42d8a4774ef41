"""RAM + GPR: "Learning Enhanced Resolution-wise Features for Human Pose Estimation", Resolution-wise Attention in every
exchange unit of HRNet and Gradual Pyramid Refinement on its four outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hrpose.errors import check, check_choice, check_count
from hrpose.models.blocks import Bottleneck, conv_bn, initialise
from hrpose.models.hrnet import LAST_OUTPUTS, HighResolutionModule, HRNetTrunk, branch_widths


class ResolutionWeights(nn.Module):
    """Weights of the M terms F_h = T_h^i(X_h) of one output i of an exchange unit.

        E_h = conv1x1_h( GAP(F_h) )                                                                 [eq. 1]
        W_h = omega_h softmax_h(E)_h + beta_h                                                       [eq. 2]

    Equation 2 as printed lacks the exponential in its denominator and sums over an index that does not occur; the text
    beside it says softmax, then an affine map. The mean over a map is the same before and after resampling (nearest or
    bilinear by an integer factor), so it is taken before. A fresh module has E = 0, omega = M, beta = 0, that is W = 1:
    HRNet's plain sum.

    Args:
        terms: M.
        channels: C of every term.
    """

    def __init__(self, terms: int, channels: int):
        super().__init__()
        # Group h is the 1x1 convolution of term h to one value.
        self.score = nn.Conv2d(terms * channels, terms, 1, groups=terms)
        self.omega = nn.Parameter(torch.empty(terms))
        self.beta = nn.Parameter(torch.empty(terms))
        self.reset()

    def reset(self) -> None:
        """Back to W = 1."""
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        nn.init.constant_(self.omega, len(self.omega))
        nn.init.zeros_(self.beta)

    def forward(self, terms: Sequence[Tensor]) -> Tensor:
        """M maps (N, C, H_h, W_h) -> (N, M)."""
        means = torch.cat([x.mean((2, 3), keepdim=True) for x in terms], dim=1)
        return self.omega * self.score(means).flatten(1).softmax(1) + self.beta


class ResolutionAttentionModule(HighResolutionModule):
    """HRNet's module with Resolution-wise Attention in its exchange unit.

        Y_i = ReLU( sum_h W_h^i resample( T_h^i(X_h) ) )                                            [eq. 3]

    The equation as printed sums over i, and has no ReLU; HRNet's is kept.
    """

    def __init__(self, widths: Sequence[int], outputs: int, *, bottleneck: bool = False):
        super().__init__(widths, outputs, bottleneck=bottleneck)
        self.attention = nn.ModuleList(ResolutionWeights(len(widths), c) for c in widths[:outputs])

    def weights(self, output: int, terms: Sequence[Tensor]) -> Tensor:
        return self.attention[output](terms)


class GradualPyramidRefinement(nn.Module):
    """Merges maps from low to high resolution, two at a time.

        X'_{k-1} = Int(X_k) + Deconv(X_k)                                                           [eq. 4]
        X_{k-1} <- refine( Concat(X'_{k-1}, X_{k-1}) ),   k = M .. 2                                [eq. 5]

    Deconv is a transposed 4x4 convolution of stride 2 with batch norm and ReLU that keeps the channels, Int
    interpolates by 2. The paper does not mention `refine`, but without it no kernel size gives its parameters and
    FLOPs. Here it is a 1x1 convolution that halves the channels and one bottleneck: of about a thousand combinations
    that round to all six printed figures, the one with the fewest layers that the paper does not mention.

    Args:
        widths: channels of the maps, from high to low resolution.
        interpolation: of Int, "bilinear" or "nearest".
    Attributes: channels: of the result.
    """

    def __init__(self, widths: Sequence[int], *, interpolation: str = "bilinear"):
        super().__init__()
        self.interpolate = nn.Upsample(scale_factor=2, mode=interpolation)
        self.deconvs, self.refines = nn.ModuleList(), nn.ModuleList()
        channels = widths[-1]
        for width in reversed(widths[:-1]):
            deconv = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False)
            self.deconvs.append(nn.Sequential(deconv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)))
            both = channels + width
            channels = both // 2
            self.refines.append(nn.Sequential(conv_bn(both, channels, 1), Bottleneck(channels, both // 8, channels)))
        self.channels = channels

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (N, widths[b], H / 2^b, W / 2^b) -> (N, channels, H, W)."""
        x = maps[-1]
        for deconv, refine, finer in zip(self.deconvs, self.refines, reversed(maps[:-1]), strict=True):
            x = refine(torch.cat([self.interpolate(x) + deconv(x), finer], dim=1))
        return x


class RamGpr(HRNetTrunk):
    """HRNet with Resolution-wise Attention in all eight exchange units and Gradual Pyramid Refinement as its head.

    A fresh network computes HRNet's features, and HRNet checkpoints load into its trunk.

    Args:
        num_keypoints: K, heatmaps per image.
        attention: False for plain sums, the ablation "without attention weights".
        refinement: False for HRNet's own head on the highest resolution, the ablation "directly rescaling and summing".
        interpolation: in the refinement, "bilinear" or "nearest"; the paper does not say which, they cost the same.
    Raises: InputError for a value outside these.
    """

    trunk_may_lack = (".attention.", *LAST_OUTPUTS)

    def __init__(
        self,
        num_keypoints: int = 17,
        *,
        width: int,
        attention: bool = True,
        refinement: bool = True,
        interpolation: str = "bilinear",
    ):
        for name, value in (("attention", attention), ("refinement", refinement)):
            check(isinstance(value, bool), "RamGpr", f"{name} must be True or False, got {value!r}")
        check_choice(interpolation, ("bilinear", "nearest"), "RamGpr", "interpolation")
        check_count(num_keypoints, "RamGpr", "num_keypoints")
        module = ResolutionAttentionModule if attention else HighResolutionModule
        super().__init__(width, outputs=4 if refinement else 1, module=module)
        self.refinement = None
        if refinement:
            self.refinement = GradualPyramidRefinement(branch_widths(width), interpolation=interpolation)
            self.heatmap = nn.Conv2d(self.refinement.channels, num_keypoints, 1)  # [eq. 6]
            initialise(self, self.heatmap)
        else:
            self.final_layer = nn.Conv2d(width, num_keypoints, 1)
            initialise(self, self.final_layer)
        for m in self.modules():
            if isinstance(m, ResolutionWeights):
                m.reset()

    def forward(self, images: Tensor) -> Tensor:
        """Heatmaps (N, K, H/4, W/4) of images (N, 3, H, W), H and W multiples of 32.

        Raises: InputError for another shape.
        """
        maps = self.features(images)
        if self.refinement is None:
            return self.final_layer(maps[0])
        return self.heatmap(self.refinement(maps))


def ram_gpr_w32(num_keypoints: int = 17, **options: Any) -> RamGpr:
    """ "Ours of W32" in the paper's Table 1: 31.4 M parameters."""
    return RamGpr(num_keypoints, width=32, **options)


def ram_gpr_w48(num_keypoints: int = 17, **options: Any) -> RamGpr:
    """ "Ours of W48" in the paper's Table 1: 70.0 M parameters."""
    return RamGpr(num_keypoints, width=48, **options)
