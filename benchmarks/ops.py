"""The ops against what one would use without them; `python benchmarks/ops.py [--threads N] [--only OP]` prints a table.

OpenCV's row needs `pip install 'opencv-python-headless<5'`. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import platform

import numpy as np
import torch
from timing import Timing, measure
from torch import nn

from hrpose import COCO17, create_model, geometry, ops
from hrpose.models.dpn import DilationPyramidModule
from hrpose.models.fold import fold_batch_norms
from hrpose.models.fused import FusedBottlenecks
from hrpose.ops import _ext

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORDER = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]  # COCO-17's joints in a mirror


def decode_numpy(heatmaps: np.ndarray, flipped: np.ndarray, transforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HRNet's test-time steps without its loops over persons and joints."""
    n, k, h, w = heatmaps.shape
    mirrored = flipped[:, ORDER, :, ::-1]
    merged = np.empty_like(heatmaps)
    merged[..., 1:], merged[..., 0] = mirrored[..., :-1], mirrored[..., 0]
    merged += heatmaps
    merged *= 0.5
    maps = merged.reshape(n * k, -1)
    index, rows = maps.argmax(1), np.arange(n * k)
    score = maps[rows, index]
    x, y = index % w * (score > 0), index // w * (score > 0)
    inside = (x > 1) & (x < w - 1) & (y > 1) & (y < h - 1)
    at = np.where(inside, y * w + x, w + 1)
    dx = np.sign(maps[rows, at + 1] - maps[rows, at - 1]) * 0.25 * inside
    dy = np.sign(maps[rows, at + w] - maps[rows, at - w]) * 0.25 * inside
    points = np.stack([x + dx, y + dy, np.ones(n * k)], 1).reshape(n, k, 3)
    return points @ transforms.transpose(0, 2, 1), score.reshape(n, k)


def bench_decode(n: int) -> dict[str, Timing]:
    generator = torch.Generator().manual_seed(n)
    heatmaps, flipped = torch.rand(2, n, 17, 64, 48, generator=generator)
    boxes = torch.rand(n, 4, generator=generator) * 200 + 10
    transforms = geometry.heatmap_to_image(geometry.crop_transforms(boxes, (192, 256)), 4)

    def native() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.decode(heatmaps, flipped, COCO17.flip_pairs, transforms=transforms)

    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.decode_reference(heatmaps, flipped, COCO17.flip_pairs, transforms=transforms)

    arrays = heatmaps.numpy(), flipped.numpy(), transforms.numpy()
    for other in (reference(), decode_numpy(*arrays)):
        for found, expected in zip(native(), other, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-3)
    functions = {"hrpose": native, "numpy": lambda: decode_numpy(*arrays), "reference": reference}
    # What reading the same maps takes where nothing is fetched ahead: about the bandwidth that is to be had.
    return measure({**functions, "torch.sum of both": lambda: (heatmaps.sum(), flipped.sum())})


def bench_crop(n: int, height: int, width: int, mode: str) -> dict[str, Timing]:
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, height // 16, width // 16))).float()
    image = (
        torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
        .permute(1, 2, 0)
        .byte()
        .contiguous()
    )
    boxes = np.stack(
        [
            rng.uniform(0, width / 2, n),
            rng.uniform(0, height / 4, n),
            np.full(n, 0.2 * width),
            np.full(n, 0.6 * height),
        ],
        1,
    )
    transforms = geometry.crop_transforms(boxes, (192, 256))

    def native() -> torch.Tensor:
        return ops.crop(image, transforms, (192, 256), mode, MEAN, STD)

    def reference() -> torch.Tensor:
        return ops.crop_reference(image, transforms, (192, 256), mode, MEAN, STD)

    np.testing.assert_allclose(native(), reference(), atol=1e-5)
    functions = {"hrpose": native, "reference": reference}
    try:
        import cv2
    except ImportError:
        return measure(functions)
    cv2.setNumThreads(torch.get_num_threads())
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def opencv() -> torch.Tensor:
        crops = [cv2.warpAffine(image.numpy(), matrix, (192, 256)) for matrix in transforms.numpy()]
        return torch.stack([(torch.from_numpy(c).permute(2, 0, 1).float().div_(255) - mean) / std for c in crops])

    return measure({**functions, f"cv2 {cv2.__version__} + torch": opencv})


def bench_bottlenecks(blocks: nn.Sequential, n: int, height: int, width: int, dtype: torch.dtype) -> dict[str, Timing]:
    """Against the best of PyTorch: compiled with frozen weights, batch norm folded, channels_last."""
    torch.manual_seed(0)
    for module in blocks.modules():
        if isinstance(module, nn.BatchNorm2d):  # initialise() leaves the last one of each block at zero
            nn.init.uniform_(module.weight, 0.5, 1.0)
    folded = copy.deepcopy(blocks.eval())
    fold_batch_norms(folded)
    x = torch.randn(n, blocks[0].conv1.in_channels, height, width).to(dtype, memory_format=torch.channels_last)
    exact = copy.deepcopy(blocks).double()(x[:1].double())
    torch._dynamo.reset()  # each case compiles for its own shape
    compiled = torch.compile(folded.to(dtype, memory_format=torch.channels_last))
    fused = FusedBottlenecks.from_blocks(blocks, dtype)
    errors = [float((f(x)[:1] - exact).norm() / exact.norm()) for f in (fused, compiled)]
    assert errors[0] < (3e-6 if dtype == torch.float32 else 1.1 * errors[1]), errors
    return measure({"hrpose": lambda: fused(x), "torch.compile": lambda: compiled(x)})


def bench_ram_sum(n: int, interpolation: str, form: torch.memory_format, train: bool) -> dict[str, Timing]:
    """The first output of a four-branch exchange unit of width 32, forward, or forward and backward."""
    generator = torch.Generator().manual_seed(n)
    inputs = [torch.randn(n, 32, 64 // f, 48 // f, generator=generator).to(memory_format=form) for f in (1, 2, 4, 8)]
    weights = torch.rand(n, 4, generator=generator)
    grad = torch.randn(n, 32, 64, 48, generator=generator).to(memory_format=form)
    leaves = [t.requires_grad_(train) for t in (*inputs, weights)]

    def composite(inputs: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        total = None
        for h, x in enumerate(inputs):
            x = x if h == 0 else torch.nn.functional.interpolate(x, (64, 48), mode=interpolation)
            x = x * weights[:, h, None, None, None]
            total = x if total is None else total + x
        return total.relu()

    torch._dynamo.reset()
    compiled = torch.compile(composite)

    def run(op):
        def call() -> object:
            with torch.set_grad_enabled(train):
                out = op(inputs, weights)
                return torch.autograd.grad(out, leaves, grad) if train else out

        return call

    functions = {
        "hrpose": run(lambda inputs, weights: ops.ram_sum(inputs, weights, interpolation)),
        "torch.compile": run(compiled),
        "eager": run(composite),
    }
    for name in ("torch.compile", "eager"):
        for found, expected in zip(functions["hrpose"](), functions[name](), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    # Eager PyTorch apart: its temporaries empty the caches, and in turn that would slow down whoever comes next.
    eager = functions.pop("eager")
    return measure(functions) | measure({"eager": eager})


def show(title: str, timings: dict[str, Timing]) -> None:
    ours = timings["hrpose"].median
    for name, t in timings.items():
        ratio = f"{t.median / ours:6.2f}x" if name != "hrpose" else "       "
        print(f"| {title:<28} | {name:<20} | {t.median:9.4f} | {t.p10:9.4f} | {t.p90:9.4f} | {ratio} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="decode, crop, bottlenecks or ram_sum")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch._inductor.config.freezing = True
    machine = platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {_ext.isa()}, {torch.get_num_threads()} threads")
    print(f"| {'op':<28} | {'with':<20} | median ms | p10       | p90       | slower  |\n|---|---|---|---|---|---|")
    for n in (1, 16, 64, 256) if args.only in ("", "decode") else ():
        show(f"decode, flip, {n}x17x64x48", bench_decode(n))
    for mode in ("exact", "opencv4") if args.only in ("", "crop") else ():
        for n, height, width in ((1, 480, 640), (8, 480, 640), (1, 1080, 1920), (8, 1080, 1920)):
            show(f"crop {mode} {n} of {width}x{height}", bench_crop(n, height, width, mode))
    if args.only in ("", "bottlenecks"):
        net = create_model("dpn1_64")
        chains = [(f"DPM C{c}", DilationPyramidModule(c), *size) for c in (64, 32) for size in ((32, 24), (64, 48))]
        chains += [("DPN conv1", net.conv1, 64, 48), ("DPN conv2", net.conv2, 64, 48)]
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            for name, blocks, height, width in chains:
                for n in (1, 16):
                    title = f"{name} {n}x{height}x{width} {short}"
                    show(title, bench_bottlenecks(blocks, n, height, width, dtype))
    for n in (1, 16) if args.only in ("", "ram_sum") else ():
        for interpolation in ("nearest", "bilinear"):
            for form, layout in ((torch.channels_last, "NHWC"), (torch.contiguous_format, "NCHW")):
                for train in (False, True):
                    title = f"ram_sum {n} {interpolation} {layout}{' + grad' * train}"
                    show(title, bench_ram_sum(n, interpolation, form, train))


if __name__ == "__main__":
    main()
