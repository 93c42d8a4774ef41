"""Parameters and multiply-accumulates of a network, counted without computing anything."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrpose.errors import check

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DECONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one call of one layer, for one image."""

    name: str
    macs: int
    macs_deconv_output_grid: int


@dataclass(frozen=True)
class Cost:
    """Size of a network and its arithmetic for one image.

    Attributes:
        params: all learnable values, frozen ones included.
        macs: multiply-accumulates of convolutions, transposed convolutions and linear layers; taps that fall in padding
            count, biases, batch norm, activations, pooling and up-sampling do not.
        macs_deconv_output_grid: the same with transposed convolutions charged weights x output pixels, as the summary
            function of the official HRNet code does (4 times too many at stride 2).
        layers: the terms of both sums, in the order of execution.
    """

    params: int
    macs: int
    macs_deconv_output_grid: int
    layers: tuple[LayerCost, ...]

    def gmacs(self, unit: int | float = 2**30, deconv: str = "exact") -> float:
        """Multiply-accumulates in `unit` (2^30 is what the pose papers call GFLOPs; or 1e9).

        Args:
            deconv: "exact" or "output_grid", see the attributes.
        Raises: InputError for another unit or count.
        """
        check(unit in (2**30, 10**9), "gmacs", f"unit must be 2**30 or 10**9, got {unit!r}")
        check(deconv in ("exact", "output_grid"), "gmacs", f"deconv must be 'exact' or 'output_grid', got {deconv!r}")
        return (self.macs if deconv == "exact" else self.macs_deconv_output_grid) / unit


def count_cost(model: nn.Module, size: tuple[int, int], *, training: bool = False) -> Cost:
    """Count the parameters and multiply-accumulates of `model` for one RGB image.

    A copy of the model without storage runs on the meta device: nothing is computed or allocated, and the model, which
    may live on any device and be in use by another thread, is only read. Counted are layers that are modules, once per
    call.

    Args:
        model: takes images (N, 3, H, W).
        size: (width, height) of the image in pixels.
        training: count what runs in training mode, that is with the heads of intermediate supervision.
    Raises: InputError for a size that is not two positive integers, or that the model refuses.
    """
    valid = len(size) == 2 and all(isinstance(side, int) and side >= 1 for side in size)
    check(valid, "count_cost", f"size must be two integers >= 1, got {size!r}")
    tensors = [*model.parameters(), *model.buffers()]
    # deepcopy takes what it finds in the memo for the copy, so no weight is ever duplicated.
    memo = {id(t): t if t.is_meta else _without_storage(t) for t in tensors}
    copied = copy.deepcopy(model, memo).train(training)
    for module in copied.modules():
        module._forward_hooks.clear()  # the user's hooks, copied too, are about the real model
    return count_on_meta(copied, size)


def count_on_meta(model: nn.Module, size: tuple[int, int]) -> Cost:
    """``count_cost`` of a network on the meta device that nobody else uses, in the mode it is in, without copying it:
    copying takes longer than counting. What is hung on its layers meanwhile is taken off again."""
    layers: list[LayerCost] = []
    norms, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = _same  # costs nothing, keeps the shape, and on meta tensors would take most of the time
            norms.append(module)
        if isinstance(module, (*_CONVOLUTIONS, *_DECONVOLUTIONS, nn.Linear)):
            hooks.append(module.register_forward_hook(_recorder(name, layers)))
    tensors = (*model.parameters(), *model.buffers())
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    width, height = size
    with torch.no_grad():
        model(torch.empty(1, 3, height, width, dtype=dtype, device="meta"))
    for norm in norms:
        del norm.forward
    for hook in hooks:
        hook.remove()
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(layer.macs for layer in layers),
        macs_deconv_output_grid=sum(layer.macs_deconv_output_grid for layer in layers),
        layers=tuple(layers),
    )


def _same(x: Tensor) -> Tensor:
    return x


def _without_storage(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _recorder(name: str, layers: list[LayerCost]):
    """Hook that appends the cost of the layer it is called for.

    Every weight of a convolution meets every output pixel once, of a transposed convolution every input pixel, of a
    linear layer every row.
    """

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weights = module.weight.numel()
        if isinstance(module, nn.Linear):
            exact = output_grid = weights * (output.numel() // module.out_features)
        else:
            rank = module.weight.ndim - 2
            output_grid = weights * output.shape[-rank:].numel()
            exact = weights * args[0].shape[-rank:].numel() if isinstance(module, _DECONVOLUTIONS) else output_grid
        layers.append(LayerCost(name, exact, output_grid))

    return record
