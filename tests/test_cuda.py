"""What only a card can show: the kernels themselves, a thousand times, in graphs, on streams and devices."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from hrpose.bench.cuda_graph import captured
from hrpose.bench.networks import trained
from hrpose.data.appearance import MEAN, STD
from hrpose.errors import InputError
from hrpose.infer import Predictor, Protocol
from hrpose.models.fused import FusedBottlenecks
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
from hrpose.ops.bottlenecks import core_matrices_take, warpgroups
from hrpose.optimize import optimize
from hrpose.skeleton import COCO17

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

REPEATS = 1000
HALVES = (torch.bfloat16, torch.float16)
PYRAMID = (32, 16, 8, 4, 2, 1)
# Of the largest value: rounding of the result, and of float32 sums.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Call(NamedTuple):
    """An op's inputs on the CPU, the op on tensors of a device, and what has to come out, in float64."""

    inputs: list[Tensor]
    run: Callable[..., list[Tensor]]
    expected: Callable[[], list[Tensor]]
    dtype: torch.dtype

    def on(self, device: str = "cuda") -> list[Tensor]:
        return [x.to(device) for x in self.inputs]


def decode_call(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mirrored: bool = True, refine: str = "quarter"
) -> Call:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator).to(dtype) for _ in range(1 + mirrored)]
    if refine == "dark":  # exact in every type, since a Newton step magnifies rounding
        maps = [(8 * x.abs()).round() / 8 for x in maps]
    transforms = torch.randn(shape[0], 2, 3, generator=generator)
    pairs = [(0, 1)] if shape[1] > 1 else []

    def run(transforms, heatmaps, flipped=None, op=decode):
        return list(op(heatmaps, flipped, pairs, refine=refine, transforms=transforms))

    doubled = [x.double() for x in (transforms, *maps)]
    return Call([transforms, *maps], run, lambda: run(*doubled, op=decode_reference), torch.float32)


def crop_call(count: int, size: tuple[int, int], mode: str = "exact", **output) -> Call:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (97, 61, 3), generator=generator).to(torch.uint8)
    transforms = torch.eye(2, 3) + 0.3 * torch.randn(count, 2, 3, generator=generator)

    def run(image, transforms, op=crop):
        return [op(image, transforms, size, mode, MEAN, STD, **output)]

    dtype = output.get("dtype", torch.float32)
    return Call([image, transforms], run, lambda: run(image, transforms, crop_reference), dtype)


def ram_sum_call(
    shape: tuple[int, ...], factors: tuple[int, ...], dtype: torch.dtype = torch.float32, mode: str = "bilinear",
    layout: torch.memory_format = torch.channels_last,
) -> Call:  # fmt: skip
    """Forward and backward."""
    generator, (n, c, h, w) = torch.Generator().manual_seed(0), shape
    sides = [(h // f, w // f) for f in factors] + [(h, w)]
    # One sign per channel: where terms cancel, rounding would decide whether ReLU passes the gradient on.
    signs = torch.randn(c, 1, 1, generator=generator).sign()
    maps = [torch.rand(n, c, *side, generator=generator) + 0.5 for side in sides]
    maps = [(signs * x).to(dtype).contiguous(memory_format=layout) for x in maps]
    weights = torch.rand(n, len(factors), generator=generator) + 0.1

    def run(weights, grad, *inputs, op=ram_sum):
        leaves = [x.detach().requires_grad_() for x in (*inputs, weights)]
        with torch.enable_grad():
            out = op(leaves[:-1], leaves[-1], mode)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    doubled = [x.double() for x in (weights, maps[-1], *maps[:-1])]
    return Call([weights, maps[-1], *maps[:-1]], run, lambda: run(*doubled, op=ram_sum_reference), dtype)


class Chain(NamedTuple):
    """Bottlenecks on a device: maps, the op's weights, the same weights for the reference in the same dtype and in
    float64."""

    x: Tensor
    packed: tuple
    rows: tuple
    exact: tuple


def chain(
    widths: tuple[int, int, int], dilations: tuple[int, ...], stride: int, shape: tuple[int, int, int],
    dtype: torch.dtype, layout: str = "fragments", device: str = "cuda",
) -> Chain:  # fmt: skip
    (ins, mid, out), generator = widths, torch.Generator().manual_seed(0)
    if layout == "core_matrices" and not warpgroups(torch.empty(0, device=device)):
        pytest.skip("kernels for warpgroups are for compute capability 9.0, and in builds for 90a")

    def draw(*shape):  # He's scale: values neither grow nor vanish
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 100
        return (torch.randn(shape, generator=generator) * (2 / fan) ** 0.5).to(device, dtype)

    blocks = []
    for index in range(len(dilations)):
        before = out if index else ins
        project = not index and (ins != out or stride > 1)
        weights = (draw(mid, before), draw(mid), draw(mid, mid, 3, 3), draw(mid), draw(out, mid), draw(out))
        blocks.append(BottleneckWeights(*weights, draw(out, before) if project else None))
    n, h, w = shape
    x = torch.randn(n, ins, h, w, generator=generator).relu().to(device, dtype, memory_format=torch.channels_last)
    doubled = [BottleneckWeights(*(None if t is None else t.double() for t in block)) for block in blocks]
    packed, rows = (pack_bottlenecks(blocks, dilations, stride, name) for name in (layout, "rows"))
    return Chain(x, packed, rows, pack_bottlenecks(doubled, dilations, stride))


def bottlenecks_call(*arguments) -> Call:
    """`expected` is the reference in float64; without grad, as the op is for inference."""
    made = chain(*arguments)

    def run(x):
        packed = made.packed
        if x.device != packed.weights.device:
            packed = packed._replace(**{k: getattr(packed, k).to(x.device) for k in ("weights", "biases", "winograd")})
        with torch.no_grad():
            return [bottlenecks(x, packed)]

    return Call([made.x.cpu()], run, lambda: [bottlenecks_reference(made.x.double(), made.exact)], made.x.dtype)


SMALL = {  # odd sizes that take every kernel's every path once; the sanitizer runs these
    "decode": lambda: decode_call((2, 5, 9, 7)),
    "decode, 16 bytes at a time": lambda: decode_call((2, 5, 9, 8), torch.float16),
    "decode, a warp per map": lambda: decode_call((150, 17, 6, 5), torch.bfloat16, mirrored=False),
    "decode, DARK": lambda: decode_call((2, 5, 19, 27), refine="dark"),
    "decode, DARK, a warp per map": lambda: decode_call((150, 17, 12, 16), torch.float16, refine="dark"),
    "crop": lambda: crop_call(3, (13, 9)),
    "crop, 16 bytes at a time": lambda: crop_call(2, (16, 9), "opencv4"),
    "crop and its mirrored copy": lambda: crop_call(2, (16, 9), mirror=True),
    "crop in bfloat16": lambda: crop_call(
        2, (12, 7), mirror=True, dtype=torch.bfloat16, memory_format=torch.channels_last
    ),
    "ram_sum": lambda: ram_sum_call((2, 3, 12, 8), (1, 2, 4)),
    "ram_sum, nearest": lambda: ram_sum_call((3, 16, 6, 9), (3, 1), torch.bfloat16, "nearest"),
    "ram_sum, NCHW": lambda: ram_sum_call((2, 5, 8, 16), (1, 2, 1), torch.float16, layout=torch.contiguous_format),
    "bottlenecks C=32": lambda: bottlenecks_call((64, 32, 64), (9, 2, 1), 1, (2, 5, 9), torch.bfloat16),
    "bottlenecks C=64": lambda: bottlenecks_call((256, 64, 256), (8, 1), 1, (1, 7, 10), torch.bfloat16),
    "bottlenecks C=64, strided": lambda: bottlenecks_call((64, 64, 256), (1, 2), 2, (2, 9, 7), torch.float16),
    "bottlenecks C=128": lambda: bottlenecks_call((256, 128, 512), (1, 2), 2, (1, 9, 11), torch.bfloat16),
    "bottlenecks, one pixel": lambda: bottlenecks_call((32, 32, 32), (1,), 1, (1, 1, 1), torch.float16),
    "bottlenecks C=32, warpgroups": lambda: bottlenecks_call(
        (64, 32, 64), (9, 2, 1), 1, (2, 19, 9), torch.bfloat16, "core_matrices"
    ),
    "bottlenecks C=64, warpgroups": lambda: bottlenecks_call(
        (256, 64, 256), (8, 1), 1, (1, 7, 10), torch.float16, "core_matrices"
    ),
    "bottlenecks C=64, strided, warpgroups": lambda: bottlenecks_call(
        (64, 64, 256), (1, 2), 2, (2, 9, 7), torch.bfloat16, "core_matrices"
    ),
}
LARGE = {  # the sizes of networks
    "decode": lambda: decode_call((32, 17, 64, 48)),
    "decode, DARK": lambda: decode_call((32, 17, 64, 48), refine="dark"),
    "crop": lambda: crop_call(8, (192, 256)),
    "ram_sum": lambda: ram_sum_call((16, 32, 64, 48), (1, 2, 4, 8), torch.bfloat16),
    "bottlenecks C=32": lambda: bottlenecks_call((128, 32, 128), PYRAMID, 1, (64, 32, 24), torch.bfloat16),
    "bottlenecks C=64": lambda: bottlenecks_call((256, 64, 256), PYRAMID, 1, (1, 32, 24), torch.bfloat16),
    "bottlenecks C=64, N=32": lambda: bottlenecks_call((256, 64, 256), PYRAMID, 1, (32, 32, 24), torch.bfloat16),
    "bottlenecks C=128": lambda: bottlenecks_call((256, 128, 512), (1, 1, 1), 2, (8, 64, 48), torch.bfloat16),
    "bottlenecks C=32, N=64, warpgroups": lambda: bottlenecks_call(
        (128, 32, 128), PYRAMID, 1, (64, 32, 24), torch.bfloat16, "core_matrices"
    ),
    "bottlenecks C=64, N=1, warpgroups": lambda: bottlenecks_call(
        (256, 64, 256), PYRAMID, 1, (1, 32, 24), torch.bfloat16, "core_matrices"
    ),
    "bottlenecks C=64, N=32, warpgroups": lambda: bottlenecks_call(
        (256, 64, 256), PYRAMID, 1, (32, 32, 24), torch.bfloat16, "core_matrices"
    ),
}
EACH = {**{f"small {name}": call for name, call in SMALL.items()}, **LARGE}


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """cuDNN rounds to TF32 by default, which is not what kernels in float32 are compared with."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_the_kernels_run_here():
    """All else in this file, and the benchmarks, would be about PyTorch's own kernels."""
    probe = _ext.cuda_probe()
    assert probe["problem"] is None and [d["error"] for d in probe["devices"]] == [None] * torch.cuda.device_count()
    for index in range(torch.cuda.device_count()):
        assert _ext.why_reference(torch.zeros(1, device=f"cuda:{index}"), cuda=True) is None


@pytest.mark.parametrize("name", SMALL)
def test_each_call_is_a_kernel_of_ours(name):
    """Not the reference, to which ops turn where sizes, types or cards are not for a kernel."""
    call = SMALL[name]()
    inputs = call.on()
    call.run(*inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call.run(*inputs)
        torch.cuda.synchronize()
    names = [event.key for event in found.key_averages()]
    assert any("hrpose" in kernel and "_kernel" in kernel for kernel in names), names


@pytest.mark.parametrize("name", SMALL)
def test_once(name):
    """Every op on small odd shapes against float64: short enough for compute-sanitizer."""
    call = SMALL[name]()
    got, want = call.run(*call.on()), call.expected()
    limit = 0.05 if name.startswith("bottlenecks") else 8 * LIMITS[call.dtype]
    for a, b in zip(got, want, strict=True):
        b = b.double().cpu()
        assert a.is_cuda and a.shape == b.shape
        assert (a.double().cpu() - b).abs().max() <= limit * b.abs().max()


@pytest.mark.parametrize("layout", ["fragments", pytest.param("core_matrices", id="warpgroups")])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 7), (1, 32, 24), (3, 33, 25), (40, 32, 24)], ids=str)
@pytest.mark.parametrize(
    ("widths", "dilations", "stride"),
    [((128, 32, 128), PYRAMID, 1), ((256, 64, 256), PYRAMID, 1), ((64, 64, 256), (1, 1), 1), ((96, 32, 64), (1, 3), 2),
     ((128, 64, 256), (2, 1), 2), ((64, 128, 160), (4, 1), 1), ((256, 128, 512), (1, 1), 2)],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_bottlenecks_are_as_near_to_float64_as_plain_convolutions(widths, dilations, stride, size, dtype, layout):
    if layout == "core_matrices" and not core_matrices_take(dtype, *widths, widths[0] != widths[2] or stride > 1):
        pytest.skip("there are no kernels for warpgroups of these widths")
    made = chain(widths, dilations, stride, size, dtype, layout)
    exact = bottlenecks_reference(made.x.double(), made.exact)
    got, plain = bottlenecks(made.x, made.packed), bottlenecks_reference(made.x, made.rows)
    ours, theirs = (((y.double() - exact).norm() / exact.norm()).item() for y in (got, plain))
    assert ours <= 1.2 * theirs + 1e-4
    assert torch.equal(bottlenecks(made.x.contiguous(), made.packed), got)
    shifted = torch.cat((made.x.flatten()[:1], made.x.permute(0, 2, 3, 1).flatten()))[1:]  # not at 16 bytes
    n, c, h, w = made.x.shape
    assert torch.equal(bottlenecks(shifted.view(n, h, w, c).permute(0, 3, 1, 2), made.packed), got)


@pytest.mark.parametrize("name", EACH)
def test_repeats_are_equal_bit_for_bit(name):
    """A race would show as a moving result."""
    call = EACH[name]()
    inputs = call.on()
    first, moved = call.run(*inputs), torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(REPEATS):
        for a, b in zip(call.run(*inputs), first, strict=True):
            moved |= (a != b).any()
    assert not moved.item()


@pytest.mark.parametrize("name", EACH)
def test_graphs(name):
    """What a graph replays is the op, on what its inputs hold by then."""
    call = EACH[name]()
    inputs = call.on()
    want = call.run(*inputs)
    kept = [x.clone() for x in inputs]
    replay = captured(lambda: call.run(*inputs))
    for x in inputs:
        x.zero_()
    for out in replay():  # of zeros
        out.fill_(float("nan"))
    for x, values in zip(inputs, kept, strict=True):
        x.copy_(values)
    assert_equal(replay(), want)
    assert_equal(replay(), want)


@pytest.mark.parametrize("name", SMALL)
def test_streams(name):
    """On a side stream, behind work that delivers the inputs late; also from another thread."""
    call = SMALL[name]()
    inputs = call.on()
    want = call.run(*inputs)
    late, results = [x.roll(1, -1) for x in inputs], []  # valid ones, but others
    torch.cuda.synchronize()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
            for x, values in zip(late, inputs, strict=True):
                x.copy_(values)
            results.append(call.run(*late))
            torch.cuda.current_stream().synchronize()

    work()
    thread = threading.Thread(target=work)
    for x in late:
        x.copy_(x.roll(1, -1))
    torch.cuda.synchronize()
    thread.start()
    thread.join()
    assert len(results) == 2
    for got in results:
        assert_equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices")
@pytest.mark.parametrize("name", SMALL)
def test_the_tensors_device_counts_not_the_current_one(name):
    call = SMALL[name]()
    want = call.run(*call.on("cuda:0"))
    for device, current in (("cuda:0", 1), ("cuda:1", 0)):
        inputs = call.on(device)
        with torch.cuda.device(current):
            got = call.run(*inputs)
            assert torch.cuda.current_device() == current
        assert all(str(x.device) == device for x in got)
        assert_equal(got, want)


def test_mistakes_are_named_and_do_no_harm():
    image, transforms = crop_call(2, (8, 8)).on()
    with pytest.raises(InputError, match=r"transforms must be float32 or float64 on cuda:0, got torch.float32 on cpu"):
        crop(image, transforms.cpu(), (8, 8))
    transforms[1] = 0
    with pytest.raises(InputError, match=r"transforms\[1\] must be finite and invertible"):
        crop(image, transforms, (8, 8))
    maps = torch.zeros(1, 2, 4, 4, device="cuda")
    with pytest.raises(InputError, match=r"flipped must be torch.float32 on cuda:0 like heatmaps, got .* on cpu"):
        decode(maps, maps.cpu(), [])
    with pytest.raises(InputError, match=r"inputs\[1\] must be on cuda:0 like inputs\[0\], got cpu"):
        ram_sum([maps, maps.cpu()])
    made = chain((64, 32, 64), (1,), 1, (1, 4, 4), torch.bfloat16)
    for x in (made.x.cpu(), made.x.float()):
        with pytest.raises(InputError, match=r"x must be torch.bfloat16 on cuda:0 like the packed weights"):
            bottlenecks(x, made.packed)
    there = {k: getattr(made.packed, k).cpu() for k in ("weights", "biases", "winograd")}
    with pytest.raises(InputError, match="layout of weights on cpu must be 'panels', got 'fragments'"):
        bottlenecks(made.x.cpu(), made.packed._replace(**there))
    torch.cuda.synchronize()
    assert torch.equal(bottlenecks(made.x, made.packed), bottlenecks(made.x, made.packed))


def test_crops_that_cannot_be_are_nan_in_a_graph():
    image, transforms = crop_call(3, (12, 8)).on()
    replay = captured(lambda: crop(image, transforms, (12, 8)))
    want = crop(image, transforms, (12, 8))
    transforms[1] = 0
    got = replay()
    assert got[1].isnan().all() and torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("kernels", ["mma", pytest.param("wgmma", id="warpgroups")])
@pytest.mark.parametrize("name", ["dpn4_64", "dpn4_32", "hrnet_w32"])
@torch.no_grad()
def test_networks_are_as_near_to_float64_as_pytorch(monkeypatch, name, kernels):
    monkeypatch.setenv("HRPOSE_CUDA_BOTTLENECKS", kernels)
    if kernels == "wgmma" and not warpgroups(torch.empty(0, device="cuda")):
        pytest.skip("kernels for warpgroups are for compute capability 9.0, and in builds for 90a")
    model = trained(name).cuda()
    images = torch.randn(2, 3, 256, 192, generator=torch.Generator().manual_seed(1)).cuda()
    exact = copy.deepcopy(model).double()(images.double())
    plain = copy.deepcopy(model).bfloat16()(images.bfloat16())
    fast = optimize(model, torch.bfloat16)
    fused = [module for module in fast.modules() if isinstance(module, FusedBottlenecks)]
    layouts = {module.layout for module in fused}
    assert (
        layouts == {"fragments"} if kernels == "mma" else "core_matrices" in layouts <= {"fragments", "core_matrices"}
    )
    ours, theirs = (((y.double() - exact).norm() / exact.norm()).item() for y in (fast(images.bfloat16()), plain))
    assert ours <= 1.1 * theirs
    got = optimize(model)(images)  # float32
    assert (got.double() - exact).norm() <= 1e-4 * exact.norm()


@torch.no_grad()
def test_optimize_takes_float32_as_torch_multiplies_it_by_default(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    optimize(trained("hrnet_w32").cuda())  # it raises where its copy differs


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)


BOXES = [[10, 5, 60, 100], [50, 20, 90, 70], [0, 0, 160, 120], [30, 30, 25, 60]]


def test_predictor_on_both_devices(photo):
    """The same heatmaps but for rounding; where two peaks of a map nearly tie, that decides between them."""
    model = trained("dpn4_32")
    here, there = (Predictor(copy.deepcopy(model), device=device)(photo, BOXES) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there.scores, here.scores, rtol=0, atol=1e-3 * np.abs(here.scores).max())
    away = np.abs(there.keypoints - here.keypoints).max(2)
    assert away.shape == (len(BOXES), COCO17.num_joints) and (away < 0.01).mean() > 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predictor_with_graphs_and_without(photo, precision):
    """Batches are filled up, which may choose other algorithms of cuDNN: the same but for rounding."""
    model, protocol = trained("dpn4_64").cuda(), Protocol(precision=precision)
    with_graphs, without = (Predictor(model, protocol=protocol, graphs=graphs) for graphs in (True, False))
    for persons in (1, 2, 3, 4):
        got, want = with_graphs(photo, BOXES[:persons]), without(photo, BOXES[:persons])
        limit = {"fp32": 1e-3, "bf16": 0.1}[precision] * np.abs(want.scores).max()
        np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=limit)
    assert with_graphs.network.reason is None and len(with_graphs.network._captured) == 3  # of 2, 4 and 8 images


def test_eight_threads_share_graphs(photo):
    """Bitwise what one thread gets, also on streams of their own and while others capture."""
    model = trained("dpn4_32").cuda()
    cases = [BOXES[: 1 + i % 4] for i in range(8)]
    alone = Predictor(model)
    serial, shared, wrong = [alone(photo, some) for some in cases], Predictor(model), []

    def work(start: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream() if start % 2 else torch.cuda.default_stream()):
            for i in range(100):
                j = (i + start) % len(cases)
                got = shared(photo, cases[j])
                if not (
                    np.array_equal(got.keypoints, serial[j].keypoints) and np.array_equal(got.scores, serial[j].scores)
                ):
                    wrong.append((start, i))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and shared.network.reason is None


def test_graphs_are_freed_with_their_predictor(photo):
    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    model = trained("dpn4_32").cuda()
    Predictor(model, graphs=False)(photo, BOXES)  # what is allocated once
    before = reserved()
    for _ in range(3):
        predictor = Predictor(model)
        for persons in (1, 2, 4):
            predictor(photo, BOXES[:persons])
        held = reserved() - before
        del predictor
    assert reserved() - before <= held / 2


def test_predictor_in_bfloat16(photo):
    model = trained("dpn4_64").cuda()
    exact, fast = (Predictor(model, protocol=Protocol(precision=p))(photo, BOXES) for p in ("fp32", "bf16"))
    np.testing.assert_allclose(fast.scores, exact.scores, rtol=0, atol=0.1 * np.abs(exact.scores).max())
