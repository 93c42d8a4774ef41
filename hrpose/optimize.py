"""The inference form of a network: the same heatmaps, sooner."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hrpose.errors import check
from hrpose.models.blocks import BasicBlock, Bottleneck
from hrpose.models.dpn import DPN
from hrpose.models.dpn_hrnet import DPNHRNet
from hrpose.models.fold import fold_batch_norms
from hrpose.models.fused import Fused, FusedBasicBlocks, FusedBottlenecks, FusedConv, FusedStem
from hrpose.models.hrnet import HRNetTrunk
from hrpose.models.resnet import ResNetTrunk
from hrpose.ops import _ext
from hrpose.ops.bottlenecks import default_layout
from hrpose.ops.maps import kernel_takes
from hrpose.ops.panels import MULTIPLE

# Of the output's norm: folding and other orders of summation round differently; a wrong layer is off by most of it.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}

_LINE = 64  # bytes: a cache line

# Attributes that a network runs one after the other and nothing else sees. In a Sequential its children are that.
_RUNS: dict[type[nn.Module], tuple[tuple[str, ...], ...]] = {
    DPN: (("conv0", "pooling"),),
    HRNetTrunk: (("conv1", "bn1", "relu"), ("conv2", "bn2", "relu")),
    ResNetTrunk: (("conv1", "bn1", "relu", "maxpool"),),
}


@torch.no_grad()
def optimize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a network for inference alone: batch norm folded into the convolutions, these packed for the fused ops
    where there are kernels for them, neighbouring linear layers made one, weights in channels_last.

    The copy is run beside the original on a random image before it is returned. It can be exported and compiled like
    the original; its state dict is another, and its device and dtype are settled. Packed weights take up to five times
    the memory of the original ones (Winograd's form of 3x3 convolutions).

    Args:
        model: made by ``create_model``, in eval mode, float32 or bfloat16 (or another floating type), on any device.
        dtype: of the copy, by default the model's. ``optimize(model, torch.bfloat16)`` of a float32 model folds before
            it rounds, and is closer to it than ``optimize(model.bfloat16())``.
    Returns: a module with the same call: images (N, 3, H, W) in its dtype -> heatmaps (N, K, H/4, W/4), or whatever
        else the network emits.
        A network that is optimized already is returned as it is.
    Raises: InputError for a model in training mode, and for another dtype of one that is optimized already.
    """
    check(not model.training, "optimize", "model must be in eval mode (model.eval()), got one in training mode")
    if (settled := inference_dtype(model)) is not None:
        rule = f"must be {settled}, in which this model was optimized, or None"
        check(dtype in (None, settled), "optimize", f"dtype {rule}, got {dtype}")
        return model
    fast = copy.deepcopy(model).requires_grad_(False)
    parameter = next(fast.parameters())
    dtype = parameter.dtype if dtype is None else dtype
    fused = kernel_takes(parameter.new_empty(0, dtype=dtype))
    if fused or parameter.is_cuda:
        _reduce_early(fast, dtype)
        _fuse_chains(fast, dtype)
    fold_batch_norms(fast)
    _merge_heads(fast)
    for module in fast.modules():
        if not isinstance(module, Fused):  # those have settled what they round, and biases are not among it
            module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)
    if fused:
        _fuse_runs(fast)
        _fuse_convs(fast)
        _gather_weights(fast)
    for module in fast.eval().modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=torch.channels_last)
    _compare(model, fast, dtype)
    fast.inference_dtype = dtype
    return fast


def inference_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of a network that `optimize` made, None for another one."""
    return getattr(model, "inference_dtype", None)


def _reduce_early(model: nn.Module, dtype: torch.dtype) -> None:
    """Where DPN's reduction has the stride, let the last bottleneck before it compute only the pixels that it reads.

    A 1x1 convolution of stride s reads every s-th pixel; a 3x3 of stride s gives these and no others. The bottleneck
    becomes a chain of its own, because only the first of a chain may have a stride.
    """
    if not isinstance(model, DPN) or model.reduce[0].stride == (1, 1):
        return
    *blocks, last = model.conv1
    if all(_fusable(block, index == 0, dtype) for index, block in enumerate((*blocks, last))):
        last.conv2.stride, model.reduce[0].stride = model.reduce[0].stride, (1, 1)
        model.conv1 = nn.Sequential(*(FusedBottlenecks.from_blocks(chain, dtype) for chain in (blocks, [last])))


def _fuse_chains(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every Sequential of bottlenecks or of basic blocks, and every Sequential of such, by the kernel; basic
    blocks have one on the CPU alone."""
    for name, child in module.named_children():
        bottlenecks, basic = _chain(child, Bottleneck), _chain(child, BasicBlock)
        if bottlenecks and all(_fusable(block, index == 0, dtype) for index, block in enumerate(bottlenecks)):
            setattr(module, name, FusedBottlenecks.from_blocks(bottlenecks, dtype))
        elif (
            basic
            and kernel_takes(basic[0].conv1.weight.new_empty(0, dtype=dtype))
            and basic[0].conv1.in_channels % MULTIPLE == 0
        ):
            setattr(module, name, FusedBasicBlocks.from_blocks(basic, dtype))
        else:
            _fuse_chains(child, dtype)


def _chain(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """The blocks of a Sequential that holds nothing else, [] for another module."""
    if isinstance(module, kind):
        return [module]
    if not isinstance(module, nn.Sequential):
        return []
    parts = [_chain(child, kind) for child in module]
    return [block for part in parts for block in part] if all(parts) else []


def _fusable(block: Bottleneck, first: bool, dtype: torch.dtype) -> bool:
    """Does a kernel take it? Only the first of a chain may change width or size, with the stride in its 3x3."""
    widths = (block.conv1.in_channels, block.conv1.out_channels, block.conv3.out_channels)
    plain = block.conv1.stride == (1, 1) and (first or block.downsample is None)
    project = block.downsample is not None
    kernel = default_layout(block.conv1.weight.new_empty(0, dtype=dtype), *widths, project) != "rows"
    return plain and kernel and all(width % MULTIPLE == 0 for width in widths)


def _merge_heads(model: nn.Module) -> None:
    """Of DPN's head, 1x1 convolution, up-sampling, 1x1 convolution, make one convolution before the up-sampling.

    Both convolutions and the up-sampling, whose weights have the sum 1, are linear, and a 1x1 convolution may change
    places with a resampling: W2 (U (W1 x + b1)) + b2 = U (W2 W1 x + W2 b1 + b2).
    """
    if not isinstance(model, DPN | DPNHRNet):
        return
    upsample, head = model.upsample, model.heatmap
    first, resize = (None, upsample) if isinstance(upsample, nn.Upsample) else (upsample[0], upsample[-1])
    merged = copy.deepcopy(head)
    if first is not None:
        w1, w2 = first.weight.double()[:, :, 0, 0], head.weight.double()[:, :, 0, 0]
        merged = nn.Conv2d(first.in_channels, head.out_channels, 1).to(head.weight).requires_grad_(False)
        merged.weight.copy_((w2 @ w1)[:, :, None, None])
        merged.bias.copy_(w2 @ first.bias.double() + head.bias.double())
    model.upsample, model.heatmap = nn.Sequential(merged, resize), nn.Identity()


def _fuse_runs(model: nn.Module) -> None:
    """Fuse convolutions with what runs after them: batch norms that are folded by now, ReLU, max-pooling."""
    for kind, runs in _RUNS.items():
        if isinstance(model, kind):
            fused = [_fused_run(_flat(getattr(model, name) for name in names)) for names in runs]
            if all(len(layers) == 1 for layers in fused):
                for names, (layer,) in zip(runs, fused, strict=True):
                    for name in names[1:]:
                        setattr(model, name, nn.Identity())
                    setattr(model, names[0], layer)
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            layers = _fused_run(module)
            module._modules.clear()
            module.extend(layers)


def _fused_run(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers among modules that run one after the other, identities left out, convolutions with what follows."""
    rest = [module for module in modules if not isinstance(module, nn.Identity)]
    layers = []
    while rest:
        layer, *rest = rest
        relu = bool(rest) and isinstance(rest[0], nn.ReLU)
        if relu and FusedStem.takes(layer):
            pool = len(rest) > 1 and _is_stem_pooling(rest[1])
            layers.append(FusedStem.from_conv(layer, pool))
            rest = rest[1 + pool :]
        elif FusedConv.takes(layer):
            layers.append(FusedConv.from_conv(layer, relu))
            rest = rest[relu:]
        else:
            layers.append(layer)
    return layers


def _flat(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules with the layers of a Sequential in its place."""
    return [m for module in modules for m in (module if isinstance(module, nn.Sequential) else [module])]


def _is_stem_pooling(module: nn.Module) -> bool:
    sizes = tuple(getattr(module, name, None) for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode"))
    return isinstance(module, nn.MaxPool2d) and sizes == (3, 2, 1, 1, False)


def _fuse_convs(module: nn.Module) -> None:
    """Replace the convolutions that are left by packed ones."""
    for name, child in module.named_children():
        if FusedConv.takes(child):
            setattr(module, name, FusedConv.from_conv(child, relu=False))
        else:
            _fuse_convs(child)


def _gather_weights(model: nn.Module) -> None:
    """Lay the packed weights side by side on huge pages, in the order of the modules."""
    owners = [(module, name) for module in model.modules() if isinstance(module, Fused) for name in module.packed]
    tensors = [getattr(module, name) for module, name in owners]
    sizes = [-(-tensor.nbytes // _LINE) * _LINE for tensor in tensors]
    for (module, name), tensor, room in zip(owners, tensors, _ext.huge(sum(sizes)).split(sizes), strict=True):
        place = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        setattr(module, name, place.copy_(tensor))


def _compare(model: nn.Module, fast: nn.Module, dtype: torch.dtype) -> None:
    """Raise unless both give the same on a small image; a difference is a mistake of ours."""
    parameter = next(model.parameters())
    side = 2 * getattr(model, "size_multiple", 32)
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    want = _tensors(model(noise.to(parameter.dtype)))
    error = _error(_tensors(fast(noise.to(dtype))), want)
    allowed = max(_tolerance(kind, parameter.device) for kind in (dtype, parameter.dtype))
    if error > allowed and dtype != parameter.dtype:  # a network that multiplies rounding errors does so in any form
        allowed = 2 * _error(_tensors(copy.deepcopy(model).to(dtype)(noise.to(dtype))), want)
    if error > allowed:
        raise RuntimeError(f"optimize: the inference form differs from the model by {error:.1e} of its output")


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """On CUDA cuDNN multiplies float32 as TF32, unless told otherwise: with as many bits as float16 has."""
    return _TOLERANCE[torch.float16 if dtype == torch.float32 and device.type == "cuda" else dtype]


def _error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest difference of two outputs, relative to the norm of the second; 0 where that is not finite."""
    errors = [
        (g.double() - w.double()).norm() / w.double().norm().clamp_min(1e-30) for g, w in zip(got, want, strict=True)
    ]
    broken = [not bool(w.isfinite().all()) for w in want]
    return max(0.0 if bad else float(error.nan_to_num(torch.inf)) for error, bad in zip(errors, broken, strict=True))


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
