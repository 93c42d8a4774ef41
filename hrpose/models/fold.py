"""Batch norm of a network in eval mode, folded into the convolutions before it."""

from itertools import pairwise

import torch
from torch import nn

from hrpose.models.blocks import BasicBlock, Bottleneck
from hrpose.models.hourglass import PreActivationBottleneck
from hrpose.models.hrnet import HRNetTrunk
from hrpose.models.resnet import ResNetTrunk

# Convolution and the batch norm that follows it, by the attributes of the class. In a Sequential they are neighbours.
_PAIRS: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    BasicBlock: (("conv1", "bn1"), ("conv2", "bn2")),
    Bottleneck: (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    PreActivationBottleneck: (("conv1", "bn2"), ("conv2", "bn3")),
    HRNetTrunk: (("conv1", "bn1"), ("conv2", "bn2")),
    ResNetTrunk: (("conv1", "bn1"),),
}


def folded(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution that does what `conv` and then `norm` do in eval mode; float64.

    weight' = weight s, bias' = (bias - mean) s + beta,  s = gamma / sqrt(var + eps), one value per output channel
    """
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    outputs = 1 if isinstance(conv, nn.ConvTranspose2d) else 0  # where the output channels are; no groups
    shape = [-1 if axis == outputs else 1 for axis in range(4)]
    bias = 0.0 if conv.bias is None else conv.bias.double()
    return conv.weight.double() * scale.view(shape), (bias - norm.running_mean.double()) * scale + norm.bias.double()


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> None:
    """Fold every batch norm of a network of this package that follows a convolution into it, in place; the batch norm
    becomes an Identity. Eval mode only: its running statistics are taken for constants."""
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            names = list(module._modules)
            pairs = list(pairwise(names))
        else:
            pairs = [pair for kind, pairs in _PAIRS.items() if isinstance(module, kind) for pair in pairs]
        for first, second in pairs:
            conv, norm = getattr(module, first), getattr(module, second)
            if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
                weight, bias = folded(conv, norm)
                conv.weight.copy_(weight)
                conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
                setattr(module, second, nn.Identity())
