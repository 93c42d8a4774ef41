"""What rows of convolutions have in common: the same layers as a PyTorch module and as a call of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hrpose.bench.case import DTYPES, PYTORCH, REFERENCE, Case, Settings
from hrpose.bench.cuda_graph import enter_ours
from hrpose.bench.engines import COMPILE, compiled
from hrpose.cost import count_cost
from hrpose.models.fold import fold_batch_norms

# Of the largest value: rounding differs by 1e-6 in float32 (Winograd's larger tile: 5e-6), by a percent in bfloat16.
LIMITS = {"fp32": 2e-5, "bf16": 0.05}


@torch.no_grad()
def layers_case(
    layers: nn.Module,
    pack: Callable[[nn.Module, torch.dtype], Callable[[Tensor], Tensor]],
    x: Tensor,
    dtype: str,
    settings: Settings,
) -> Case:
    """Layers against `torch.compile` with frozen weights and channels_last; on CUDA against eager channels_last too.

    Args:
        layers: in eval mode, float32.
        pack:   given layers with their batch norms folded, on the right device, and a dtype, returns our call.
        x:      (N, C, H, W) float32.
    """
    folded = copy.deepcopy(layers)
    fold_batch_norms(folded)
    macs = count_cost(_Widened(folded, x.shape[1]), (x.shape[3], x.shape[2])).macs
    folded, x = folded.to(settings.device), x.to(settings.device)
    exact = copy.deepcopy(folded).double()
    case = Case(torch.cat([exact(image.double()) for image in x.split(1)]), LIMITS[dtype], flops=2 * len(x) * macs)
    ours = pack(folded, DTYPES[dtype])
    x = x.to(DTYPES[dtype])
    in_channels_last = x.to(memory_format=torch.channels_last)
    enter_ours(case, "hrpose", lambda: ours(in_channels_last), settings.device)
    plain = folded.to(DTYPES[dtype])
    fitted = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    fast = compiled(fitted, settings.device, [in_channels_last])
    case.invite(COMPILE, PYTORCH, lambda: lambda: fast(in_channels_last))
    if settings.device.type == "cuda":
        case.enter("eager, channels_last", PYTORCH, lambda: fitted(in_channels_last))
    case.enter("eager", REFERENCE, lambda: plain(x))
    return case


class _Widened(nn.Module):
    """The layers as `count_cost` wants a network: it takes images."""

    def __init__(self, layers: nn.Module, channels: int):
        super().__init__()
        self.layers, self.channels = layers, channels

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.new_empty(len(images), self.channels, *images.shape[2:]))
