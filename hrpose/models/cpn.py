"""CPN: "Cascaded Pyramid Network for Multi-Person Pose Estimation" (Chen et al., CVPR 2018), on ResNet-50."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrpose.errors import check_choice, check_count
from hrpose.models.blocks import Bottleneck, conv_bn, initialise
from hrpose.models.resnet import CHANNELS, ResNetTrunk

_WIDTH = 256
# Standard deviation of a target, sqrt(pi sigma^2 / (H W)), for sigma 2 on 64x48 and for sigma 3 on 96x72. The batch
# norms behind the heatmaps start there: their weight sets the size of the maps, and Adam moves it by its learning rate
# per step. From weight 1 a task of coloured discs was still at a mean squared error of 0.62 after 60 steps, from the
# deviation of its targets at 0.0003.
_TARGET_STD = 0.06


class CPN(ResNetTrunk):
    """A feature pyramid with a heatmap head per level (GlobalNet), then all levels together (RefineNet).

        P_5 = lateral(C_5),   P_l = lateral(C_l) + merge(P_{l+1}),   global_l = head(P_l),        l = 4, 3, 2
        refined = conv3x3( bottleneck( concat_l up( bottleneck^{l-2}(P_l) )))

    The refined maps are meant to be trained with online hard keypoint mining (`hrpose.train.loss.heatmap_ohkm`), the
    global ones with the mean squared error.

    What the paper leaves open follows the authors' TensorFlow code: ReLU in the laterals but not in the merge, a
    projection in the last bottleneck only, and batch norm in place of a bias, after the heatmaps' convolutions too.
    Readings: batch norm in the merge as well, where that code has a bias (27.011 or 27.010 M parameters, printed 27.0);
    bilinear up-sampling with half-pixel centres, where TensorFlow 1 aligned the top left corners.

    Cost at 192 x 256 in G (2^30) multiply-adds; HRNet's notes print 6.20. The heads of the global maps run in training
    only, as the refined maps do not depend on them.

        layout       merge             inference   with the global heads
        torchvision  conv_first            6.152                   6.549
        torchvision  upsample_first        6.336                   6.734
        caffe        conv_first            5.941                   6.339
        caffe        upsample_first        6.125                   6.523

    Args:
        num_keypoints: K, heatmaps per image.
        layout: of the ResNet: "torchvision" has the strides in the 3x3 convolutions, "caffe" in the first 1x1, as
            Caffe's ImageNet weights need.
        merge: "conv_first": 1x1 convolution, then x2; "upsample_first": the other way round, as in the authors' code.
            Both are the same function, for bilinear weights sum to 1, but batch norm sees other statistics in training.
    Raises: InputError for a value outside these.
    """

    intermediate_supervision = True  # a tuple of heatmaps in training mode, the final ones last

    def __init__(self, num_keypoints: int = 17, *, layout: str = "torchvision", merge: str = "conv_first"):
        check_count(num_keypoints, "CPN", "num_keypoints")
        check_choice(layout, ("torchvision", "caffe"), "CPN", "layout")
        check_choice(merge, ("conv_first", "upsample_first"), "CPN", "merge")
        super().__init__(50, stride_in="1x1" if layout == "caffe" else "3x3")
        self.conv_first = merge == "conv_first"
        # Lists go from coarse to fine: C5, C4, C3, C2.
        self.laterals = nn.ModuleList(conv_bn(channels, _WIDTH, 1) for channels in reversed(CHANNELS))
        self.merges = nn.ModuleList(conv_bn(_WIDTH, _WIDTH, 1, relu=False) for _ in range(3))
        self.global_heads = nn.ModuleList(
            nn.Sequential(conv_bn(_WIDTH, _WIDTH, 1), conv_bn(_WIDTH, num_keypoints, 3, relu=False)) for _ in range(4)
        )
        self.refine = nn.ModuleList(
            nn.Sequential(*(Bottleneck(_WIDTH, _WIDTH // 2, _WIDTH) for _ in range(blocks))) for blocks in (3, 2, 1, 0)
        )
        self.fuse = Bottleneck(4 * _WIDTH, _WIDTH // 2, _WIDTH)
        self.final_layer = conv_bn(_WIDTH, num_keypoints, 3, relu=False)
        heads = [*(head[1] for head in self.global_heads), self.final_layer]
        initialise(self, *(conv for conv, _ in heads))
        for _, norm in heads:
            nn.init.constant_(norm.weight, _TARGET_STD)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Heatmaps of a batch of images.

        Args:
            images: (N, 3, H, W), normalised; H and W multiples of 32.
        Returns: the refined maps (N, K, H/4, W/4); in training mode a tuple of five such: the global ones from coarse
            to fine, up-sampled to that size, then the refined ones.
        Raises: InputError for another shape.
        """
        maps = self.features(images)
        size = maps[0].shape[2:]
        levels = [self.laterals[0](maps[3])]
        for merge, lateral, x in zip(self.merges, self.laterals[1:], maps[2::-1], strict=True):
            y = levels[-1]
            y = _resized(merge(y), x.shape[2:]) if self.conv_first else merge(_resized(y, x.shape[2:]))
            levels.append(lateral(x) + y)
        refined = [_resized(blocks(x), size) for blocks, x in zip(self.refine, levels, strict=True)]
        heatmaps = self.final_layer(self.fuse(torch.cat(refined, dim=1)))
        if not self.training:
            return heatmaps
        return (*(_resized(head(x), size) for head, x in zip(self.global_heads, levels, strict=True)), heatmaps)


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear up-sampling of (N, C, H, W) to `size`, with half-pixel centres."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear")


def cpn_r50(num_keypoints: int = 17, **options: Any) -> CPN:
    """The network of the paper: 27.0 M parameters."""
    return CPN(num_keypoints, **options)
