"""The ops on CUDA from end to end: Python, bindings, launchers and kernels, with an emulated card."""

import contextlib
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from hrpose.errors import InputError
from hrpose.ops import (
    BottleneckWeights,
    _ext,
    bottlenecks,
    bottlenecks_reference,
    crop,
    crop_reference,
    decode,
    decode_reference,
    pack_bottlenecks,
    ram_sum,
    ram_sum_reference,
)

pytestmark = pytest.mark.slow  # pybind11 alone compiles for ten seconds

# The rest of what bindings.cpp refers to; nobody calls it here.
REST = """
#include "cpu/kernels.h"
#include "cuda/kernels.h"
namespace hrpose {
const Kernels &active() { throw 0; }
bool supported(int, const char **) { throw 0; }
bool set_isa(const char *) { throw 0; }
namespace cuda {
const char *probe_host(int *, int *, int *devices) {
  *devices = 1;
  return nullptr;
}
const char *probe_device(int, char *, int *, int *, int *) { throw 0; }
} // namespace cuda
} // namespace hrpose
"""


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA. What is made of it is one too."""

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)


@pytest.fixture(scope="module")
def native(compiler, tmp_path_factory):
    """hrpose._C of the bindings and the emulated kernels."""
    pybind11 = pytest.importorskip("pybind11")
    folder, sources = tmp_path_factory.mktemp("native"), Path(__file__).resolve().parents[2] / "csrc"
    (folder / "rest.cpp").write_text(REST)
    flags = [f"-I{sources}", "-I" + sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    flags += ["-DHRPOSE_WITH_CUDA", '-DHRPOSE_CUDA_ARCHS="80;90a"']
    kernels = [path for path in sorted((sources / "cuda").glob("*.cu")) if path.stem != "probe"]
    units, library = [*kernels, sources / "bindings.cpp", folder / "rest.cpp"], folder / "_C.so"
    subprocess.run([*compiler, *flags, *map(str, units), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def card(native, monkeypatch):
    """Tensors of OnCuda are on the emulated card."""
    monkeypatch.setattr(_ext, "kernels", lambda: native)
    monkeypatch.setattr(_ext, "_native", native)
    monkeypatch.setattr(_ext, "_cuda_reasons", {None: None})
    monkeypatch.setattr(_ext, "current_stream", lambda tensor: contextlib.nullcontext(0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def on_card(*tensors):
    return [None if t is None else t.as_subclass(OnCuda) for t in tensors]


def plain(result):
    return [t.as_subclass(torch.Tensor) for t in result]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decode(card, rng, dtype):
    heatmaps, flipped = (torch.from_numpy(rng.normal(size=(2, 5, 9, 8))).to(dtype) for _ in range(2))
    transforms, perm = torch.from_numpy(rng.normal(size=(2, 2, 3))).float(), [0, 2, 1, 3, 4]
    for mirrored, affine in ((None, None), (flipped, None), (flipped, transforms)):
        maps, other, matrices = on_card(heatmaps, mirrored, affine)
        run = sys.modules[decode.__module__]._decode
        got = plain(run(maps, other, perm, True, True, matrices))
        for a, b in zip(got, decode_reference(heatmaps, mirrored, [(1, 2)], transforms=affine), strict=True):
            assert torch.equal(a, b)
        got = plain(run(maps, other, perm, True, False, matrices, 11))
        want = decode_reference(heatmaps, mirrored, [(1, 2)], refine="dark", transforms=affine)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "opencv4"])
def test_crop(card, rng, mode):
    image = torch.from_numpy(rng.integers(0, 256, (20, 30, 3))).to(torch.uint8)
    transforms = torch.tensor([[[1.3, 0.2, -2], [-0.2, 1.1, 3]], [[0.5, 0, 1], [0, 0.7, 2]]])
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    scale, bias = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    run = sys.modules[crop.__module__]._crop
    (got,) = plain([run(*on_card(image, transforms), 13, 8, mode == "opencv4", scale, bias)])
    assert torch.equal(got, crop_reference(image, transforms, (13, 8), mode, mean, std))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in (torch.contiguous_format, torch.channels_last):
            output = (True, dtype, layout == torch.channels_last)
            (got,) = plain([run(*on_card(image, transforms), 12, 8, mode == "opencv4", scale, bias, *output)])
            want = crop_reference(image, transforms, (12, 8), mode, mean, std, True, dtype, layout)
            assert torch.equal(got, want) and got.stride() == want.stride()
    transforms[1] = 0
    with pytest.raises(InputError, match=r"transforms\[1\] must be finite and invertible"):
        run(*on_card(image, transforms), 13, 8, mode == "opencv4", scale, bias)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("factors", [(1, 2, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_ram_sum(card, rng, layout, factors, mode):
    inputs = [torch.from_numpy(rng.normal(size=(2, 8, 8 // f, 4 // f))).float() for f in factors]
    inputs = [x.contiguous(memory_format=layout).requires_grad_() for x in inputs]
    weights = torch.from_numpy(rng.normal(size=(2, len(factors)))).float().requires_grad_()
    grad = torch.from_numpy(rng.normal(size=(2, 8, 8, 4))).float()
    module, bilinear = sys.modules[ram_sum.__module__], mode == "bilinear"
    for scales in (None, weights):
        want = ram_sum_reference(inputs, scales, mode)
        leaves = [*inputs, *([] if scales is None else [scales])]
        maps, factor = on_card(*[x.detach() for x in inputs]), on_card(None if scales is None else scales.detach())[0]
        out = module._fwd_any(maps, factor, list(factors), bilinear)
        torch.testing.assert_close(plain([out])[0], want, rtol=1e-6, atol=1e-6)
        back = [] if scales is None else maps
        grads = module._bwd_any(*on_card(grad, want.detach()), back, factor, list(factors), bilinear)
        for a, b in zip(plain(grads), torch.autograd.grad(want, leaves, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernels", "widths", "stride"),
    [("mma", (64, 32, 64), 1), ("mma", (64, 64, 256), 1), ("mma", (64, 128, 256), 2), ("mma", (64, 48, 64), 1),
     ("wgmma", (64, 32, 64), 1), ("wgmma", (64, 64, 128), 2), ("wgmma", (64, 128, 256), 1)],
    ids=str,
)  # fmt: skip
def test_bottlenecks(card, rng, monkeypatch, dtype, kernels, widths, stride):
    """In the layout that the card gets: fragments or core matrices for the kernels, rows of a width that has none for
    the reference."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("HRPOSE_CUDA_BOTTLENECKS", kernels)
    (ins, mid, out), module, blocks = widths, sys.modules[bottlenecks.__module__], []

    def draw(*shape):
        return (torch.from_numpy(rng.normal(size=shape)) * (1 / shape[-1]) ** 0.5).to(dtype)

    for index in range(2):
        first = index == 0
        w2 = draw(mid, mid, 9 * mid)[:, :, :9].reshape(mid, mid, 3, 3)
        projection = draw(out, ins) if first and (ins != out or stride > 1) else None
        weights = (draw(mid, ins if first else out), draw(mid), w2, draw(mid), 0.3 * draw(out, mid), draw(out))
        blocks.append(BottleneckWeights(*weights, projection))
    x = draw(2, ins, 9, 7).relu()
    layout = module.default_layout(on_card(x)[0], ins, mid, out, blocks[0].projection is not None)
    wgmma = kernels == "wgmma" and mid < 128
    assert layout == ("rows" if mid == 48 else "core_matrices" if wgmma else "fragments")
    packed = pack_bottlenecks(blocks, (3, 1), stride, layout)
    views = [x, torch.cat((x.flatten(), x.flatten()[:1]))[1:].view_as(x), torch.cat((x, x), 1)[:, :ins]]
    for maps in views:  # dense, not at a multiple of 16 bytes, with other channels between
        arguments = on_card(maps, *packed[:3])
        (got,) = plain([module._bottlenecks_cuda(*arguments, *packed[3:])])
        want = bottlenecks_reference(maps, packed)
        assert got.is_contiguous(memory_format=torch.channels_last) and got.shape == want.shape
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
