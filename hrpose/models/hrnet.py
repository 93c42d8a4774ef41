"""HRNet: "Deep High-Resolution Representation Learning for Human Pose Estimation", its exchange unit, its trunk and the
pose network, with one builder per width. Module names are those of the official checkpoints."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hrpose.errors import check_count
from hrpose.models.blocks import BasicBlock, Bottleneck, check_images, conv_bn, initialise
from hrpose.ops import ram_sum

MODULES_PER_STAGE = (1, 4, 3)  # of stages 2, 3, 4
BLOCKS_PER_BRANCH = 4
LAST_OUTPUTS = ("stage4.2.fuse_layers.1.", "stage4.2.fuse_layers.2.", "stage4.2.fuse_layers.3.")


def branch_widths(width: int, branches: int = 4) -> tuple[int, ...]:
    """Channels of the branches, from high to low resolution: W, 2W, 4W, 8W."""
    return tuple(width * 2**i for i in range(branches))


class HighResolutionModule(nn.Module):
    """Parallel branches of four residual blocks each, then the exchange unit.

        Y_i = ReLU( sum_h resample( T_h^i(X_h) ) ),   h over all branches

    T_h^i brings branch h to the channels of branch i: upwards (h > i) a 1x1 convolution with batch norm at the
    resolution of h, which nearest up-sampling by 2^(h-i) follows; downwards (h < i) i-h 3x3 convolutions of stride 2
    with batch norm, all but the last keeping their channels and followed by ReLU; the identity for h = i.

    Args:
        widths: channels of the branches, from high to low resolution, each half the size of the one before it.
        outputs: how many branches the exchange unit computes, from the first on.
        bottleneck: of bottlenecks a quarter as wide instead of basic blocks.
    """

    def __init__(self, widths: Sequence[int], outputs: int, *, bottleneck: bool = False):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                *(Bottleneck(c, c // 4, c) if bottleneck else BasicBlock(c) for _ in range(BLOCKS_PER_BRANCH))
            )
            for c in widths
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_transform(widths, h, i) for h in range(len(widths))) for i in range(outputs)
        )

    def weights(self, output: int, terms: Sequence[Tensor]) -> Tensor | None:
        """Weights (N, M) of the M terms T_h^i(X_h) of output i, None for plain sums."""
        return None

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, widths[b], H / 2^b, W / 2^b) -> the same for the first `outputs` branches."""
        maps = [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]
        result = []
        for i, row in enumerate(self.fuse_layers):
            terms = [transform(x) for transform, x in zip(row, maps, strict=True)]
            result.append(ram_sum(terms, self.weights(i, terms)))
        return result


def _transform(widths: Sequence[int], source: int, target: int) -> nn.Module:
    """T_h^i without the resampling, h = source, i = target."""
    if source == target:
        return nn.Identity()
    if source > target:
        return conv_bn(widths[source], widths[target], 1, relu=False)
    steps = [conv_bn(widths[source], widths[source], 3, stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, conv_bn(widths[source], widths[target], 3, stride=2, relu=False))


class HRNetTrunk(nn.Module):
    """Stem, layer1 and the three multi-resolution stages.

    Args:
        width: W, channels of the branch of the highest resolution, 1/4 of the image.
        outputs: branches that leave the last exchange unit, 1 (pose) or 4.
        bottleneck: bottlenecks instead of basic blocks in the branches (HRNet-W44/W76/W96-C).
        module: class of the parallel branches with their exchange unit.
    """

    # For load_weights: what a checkpoint with another head shares with this network. The last exchange unit of a pose
    # network has one output, that of the others four.
    trunk = ("conv1.", "bn1.", "conv2.", "bn2.", "layer1.", "transition", "stage")
    trunk_may_lack: tuple[str, ...] = LAST_OUTPUTS
    trunk_may_drop: tuple[str, ...] = LAST_OUTPUTS
    size_multiple = 32

    def __init__(
        self,
        width: int,
        outputs: int,
        *,
        bottleneck: bool = False,
        module: type[HighResolutionModule] = HighResolutionModule,
    ):
        super().__init__()
        check_count(width, "HRNet", "width")
        widths = branch_widths(width)
        self.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Bottleneck(64, 64, 256), *(Bottleneck(256, 64, 256) for _ in range(3)))

        def stage(number: int) -> nn.Sequential:
            modules = MODULES_PER_STAGE[number - 2]
            last = outputs if number == 4 else number
            counts = [number] * (modules - 1) + [last]
            return nn.Sequential(*(module(widths[:number], count, bottleneck=bottleneck) for count in counts))

        self.transition1 = _transition([256], widths[:2])
        self.stage2 = stage(2)
        self.transition2 = _transition(widths[:2], widths[:3])
        self.stage3 = stage(3)
        self.transition3 = _transition(widths[:3], widths)
        self.stage4 = stage(4)
        self.where = type(self).__name__

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) -> maps (N, 2^b W, H / 2^(b+2), W / 2^(b+2)) of the branches b that leave the trunk."""
        check_images(images, self.size_multiple, self.where)
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        maps = [self.layer1(x)]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            # The new branch starts from the one of the lowest resolution; the others go on with their own map.
            sources = [*maps, maps[-1]]
            maps = stage([layer(x) for layer, x in zip(transition, sources, strict=True)])
        return maps


def _transition(widths: Sequence[int], new_widths: Sequence[int]) -> nn.ModuleList:
    """3x3 convolutions where a branch changes its width, and one of stride 2 that opens the new branch."""
    layers: list[nn.Module] = [
        nn.Identity() if old == new else conv_bn(old, new, 3) for old, new in zip(widths, new_widths, strict=False)
    ]
    return nn.ModuleList([*layers, nn.Sequential(conv_bn(widths[-1], new_widths[-1], 3, stride=2))])


class HRNet(HRNetTrunk):
    """The pose network: a 1x1 convolution on the highest resolution. 1754 state-dict entries, those of the official
    checkpoints.

    The official code draws every weight from N(0, 0.001) and starts from ImageNet weights; here a network that is
    trained from scratch starts as `blocks.initialise` says.
    """

    def __init__(self, num_keypoints: int = 17, *, width: int):
        super().__init__(width, outputs=1)
        check_count(num_keypoints, "HRNet", "num_keypoints")
        self.final_layer = nn.Conv2d(width, num_keypoints, 1)
        initialise(self, self.final_layer)

    def forward(self, images: Tensor) -> Tensor:
        """Heatmaps (N, K, H/4, W/4) of images (N, 3, H, W), H and W multiples of 32.

        Raises: InputError for another shape.
        """
        return self.final_layer(self.features(images)[0])


def hrnet_w18(num_keypoints: int = 17, **options: Any) -> HRNet:
    return HRNet(num_keypoints, width=18, **options)


def hrnet_w30(num_keypoints: int = 17, **options: Any) -> HRNet:
    return HRNet(num_keypoints, width=30, **options)


def hrnet_w32(num_keypoints: int = 17, **options: Any) -> HRNet:
    """The small network of the paper: 28.5 M parameters."""
    return HRNet(num_keypoints, width=32, **options)


def hrnet_w40(num_keypoints: int = 17, **options: Any) -> HRNet:
    return HRNet(num_keypoints, width=40, **options)


def hrnet_w48(num_keypoints: int = 17, **options: Any) -> HRNet:
    """The big network of the paper: 63.6 M parameters."""
    return HRNet(num_keypoints, width=48, **options)
