"""The convolution against a loop over pixels and float64; its packing, threads, errors and registration."""

import sys
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hrpose.errors import InputError
from hrpose.ops import _ext, conv, conv_reference, pack_conv
from hrpose.ops.conv import winograd_tile
from hrpose.ops.maps import kernel_takes

pytestmark = pytest.mark.usefixtures("fenced_workspace")

# Relative to the largest value, by tile: float32 sums of up to 576 products; the transforms of F(4 x 4, 3 x 3) lose a
# digit.
TOLERANCE = {0: 1.5e-6, 2: 1.5e-6, 4: 1.5e-5}
# (N, H, W), (in, out), kernel, stride
SMALL = [
    ((1, 1, 1), (16, 16), 1, 1),
    ((1, 1, 1), (16, 16), 3, 1),
    ((2, 5, 7), (16, 48), 3, 1),  # a panel of half width; tiles cut off on both sides
    ((3, 4, 6), (48, 80), 1, 2),
    ((1, 8, 9), (32, 16), 3, 2),
    ((2, 7, 5), (16, 32), 3, 3),
    ((1, 2, 3), (16, 16), 3, 5),  # a stride beyond the map
    ((3, 2, 13), (32, 16), 3, 1),  # tiles and strips of several images
]
# The networks' own: DPN's reduction and head, HRNet's transitions and exchange units, SimpleBaseline's head.
REAL = [
    ((1, 32, 24), (512, 256), 1, 1),
    ((1, 32, 24), (256, 32), 1, 1),
    ((1, 64, 48), (64, 64), 3, 2),
    ((1, 64, 48), (256, 32), 3, 1),
    ((2, 16, 12), (128, 256), 3, 2),
    ((1, 8, 6), (256, 256), 3, 1),
    ((16, 32, 24), (96, 96), 3, 1),
]


def random_conv(rng, ins, outs, kernel):
    """Weight and bias of He's scale, float64."""
    weight = rng.normal(size=(outs, ins, kernel, kernel)) * (2 / (ins * kernel * kernel)) ** 0.5
    return torch.from_numpy(weight), torch.from_numpy(rng.normal(size=outs) * 0.2)


def naive(x, weight, bias, stride):
    """The equation, pixel by pixel in float64, without what follows; x (N, C, H, W)."""
    x, weight = x.double().numpy(), weight.numpy()
    (n, _, h, w), reach = x.shape, weight.shape[2] // 2
    out = np.empty((n, len(weight), -(-h // stride), -(-w // stride)))
    for i, j in np.ndindex(out.shape[2:]):
        out[:, :, i, j] = bias.numpy()
        for ky, kx in np.ndindex(weight.shape[2:]):
            row, col = i * stride + ky - reach, j * stride + kx - reach
            if 0 <= row < h and 0 <= col < w:
                out[:, :, i, j] += x[:, :, row, col] @ weight[:, :, ky, kx].T
    return torch.from_numpy(out)


def tiles(kernel, stride):
    """What `pack_conv` takes."""
    return (0, 2, 4) if kernel == 3 and stride == 1 else (0,)


def relative_error(got, want):
    """To the largest value; ReLU may leave none."""
    assert got.shape == want.shape
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(0.1)) if want.numel() else 0.0


@pytest.mark.parametrize(("maps", "widths", "kernel", "stride"), SMALL, ids=str)
def test_equals_the_loop(isa, rng, random_maps, maps, widths, kernel, stride):
    weight, bias = random_conv(rng, *widths, kernel)
    x = random_maps(maps[0], widths[0], *maps[1:])
    linear = naive(x, weight, bias, stride)
    residual = random_maps(*linear.shape)
    for added, relu, tile in product((None, residual), (False, True), tiles(kernel, stride)):
        want = linear if added is None else linear + added
        want = want.clamp_min(0) if relu else want
        packed = pack_conv(weight.float(), bias.float(), stride=stride, relu=relu, tile=tile)
        assert relative_error(conv(x, packed, added), want) < TOLERANCE[tile]
        assert relative_error(conv_reference(x, packed, added), want) < TOLERANCE[0]
        if tile == 0:
            exact, more = pack_conv(weight, bias, stride=stride, relu=relu), None if added is None else added.double()
            assert relative_error(conv(x.double(), exact, more), want) < 1e-14


def check_real(rng, random_maps, maps, widths, kernel, stride):
    weight, bias = random_conv(rng, *widths, kernel)
    x = random_maps(maps[0], widths[0], *maps[1:])
    want = F.relu(F.conv2d(x.double(), weight, bias, stride, kernel // 2))
    for tile in tiles(kernel, stride):
        got = conv(x, pack_conv(weight.float(), bias.float(), stride=stride, relu=True, tile=tile))
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(got, want) < TOLERANCE[tile] * max(1, widths[0] / 64) ** 0.5  # as errors of sums grow


@pytest.mark.parametrize(("maps", "widths", "kernel", "stride"), REAL[2:3] + REAL[5:6], ids=str)
def test_real_shapes(isa, rng, random_maps, maps, widths, kernel, stride):
    check_real(rng, random_maps, maps, widths, kernel, stride)


@pytest.mark.slow
@pytest.mark.parametrize(("maps", "widths", "kernel", "stride"), REAL, ids=str)
def test_all_real_shapes(isa, rng, random_maps, maps, widths, kernel, stride):
    check_real(rng, random_maps, maps, widths, kernel, stride)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_bfloat16_is_no_worse_than_torch(isa, rng, random_maps, kernel, stride):
    """Both round maps and weights to 8 bits and sum in float32; where no kernel takes bf16 both are the reference."""
    for (n, h, w), ins, outs in (((1, 1, 3), 16, 16), ((2, 5, 7), 16, 48), ((1, 13, 9), 64, 96), ((2, 16, 12), 32, 32)):
        weight, bias = (t.bfloat16() for t in random_conv(rng, ins, outs, kernel))
        x = random_maps(n, ins, h, w).bfloat16()
        packed = pack_conv(weight, bias, stride=stride, relu=True)
        assert packed.bias.dtype == torch.float32 and packed.tile == 0
        linear = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2)
        for residual in (None, random_maps(*linear.shape).bfloat16()):
            want = F.relu(linear if residual is None else linear + residual)
            got, reference = conv(x, packed, residual), conv_reference(x, packed, residual)
            errors = [float((y.double() - want).norm() / want.norm()) for y in (got, reference)]
            assert got.dtype == torch.bfloat16 and got.shape == want.shape
            assert errors[0] < 1.05 * errors[1] + 2**-9 / want.numel() ** 0.5 and errors[0] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ins", "outs"), [(16, 48), (48, 16), (64, 64)])
def test_weights_survive_packing(isa, dtype, ins, outs):
    """One weight per output, of a tap of its own, and whole numbers: every product is exact, so a misplaced weight
    shows; in F(2 x 2, 3 x 3) the halves are exact too."""
    weight = torch.zeros(outs, ins, 3, 3)
    for o in range(outs):
        weight[o, o * 5 % ins, o % 3, o // 3 % 3] = o % 3 + 1
    x = (torch.arange(2 * ins * 35) % 11).float().view(2, ins, 5, 7)
    bias = torch.arange(outs).float() - 8
    want = torch.zeros(2, outs, 5, 7)
    for o in range(outs):
        around = F.pad(x[:, o * 5 % ins], (1, 1, 1, 1))
        want[:, o] = (o % 3 + 1) * around[:, o % 3 : o % 3 + 5, o // 3 % 3 : o // 3 % 3 + 7] + bias[o]
    for tile in (0, 2) if dtype == torch.float32 else (0,):
        packed = pack_conv(weight.to(dtype), bias.to(dtype), tile=tile)
        assert torch.equal(conv(x.to(dtype), packed), want.to(dtype))


def test_the_kernel_runs(isa, rng, random_maps):
    """It reads panels, which the reference does not; and Winograd's way is taken where it is asked for."""
    if isa is None:
        pytest.skip(str(_ext.why_reference()))
    weight, bias = (t.float() for t in random_conv(rng, 32, 16, 3))
    x = random_maps(1, 32, 6, 5)
    for tile, factors in ((0, 9), (2, 16), (4, 36)):
        packed = pack_conv(weight, bias, tile=tile)
        assert packed.panels.numel() == factors * 32 * 16
        want = conv(x, packed)
        assert torch.equal(conv(x, packed._replace(weight=weight * torch.nan)), want) and not want.isnan().any()
        assert conv(x, packed._replace(panels=packed.panels * torch.nan)).isnan().all()


def test_tiles():
    """Large ones where their weights fit a cache, none where a product per tap is cheaper than reading them."""
    sizes = [(16, 16), (96, 96), (97, 96), (256, 256), (257, 256)]
    assert [winograd_tile(*size) for size in sizes] == [4, 4, 2, 2, 0]
    weight, bias = torch.zeros(16, 32, 3, 3), torch.zeros(16)
    assert pack_conv(weight, bias).tile == 4
    for packed in (pack_conv(weight, bias, stride=2), pack_conv(weight[:, :, :1, :1], bias)):
        assert packed.tile == 0
    assert pack_conv(weight.double(), bias.double()).tile == pack_conv(weight.bfloat16(), bias.bfloat16()).tile == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_near(isa, rng, random_maps, value):
    """By taps in the 3x3 around, as NaN or infinity; by Winograd's way in the tiles that read the pixel."""
    weight, bias = (t.float() for t in random_conv(rng, 16, 32, 3))
    x = random_maps(2, 16, 11, 10)
    x[1, 3, 6, 4] = value
    want = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    hit = torch.zeros(2, 11, 10, dtype=torch.bool)
    hit[1, 5:8, 3:6] = True
    for tile in (0, 2, 4):
        got = conv(x, pack_conv(weight, bias, relu=True, tile=tile))
        bad, near = ~got.isfinite().all(1), hit
        if isa is not None and tile:
            rows, cols = ((torch.arange(size) // tile * tile) for size in (11, 10))
            near = torch.zeros_like(hit)
            near[1] = ((rows - 1 <= 6) & (6 <= rows + tile))[:, None] & ((cols - 1 <= 4) & (4 <= cols + tile))
        else:
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert (hit <= bad).all() and (bad <= near).all()
        rest = ~near[:, None].expand_as(got)
        assert relative_error(got[rest], want[rest]) < TOLERANCE[tile]


@pytest.mark.parametrize(("dtype", "kernel", "stride", "tile"), [
    (torch.float32, 1, 1, 0), (torch.float32, 3, 2, 0), (torch.float32, 3, 1, 2), (torch.float32, 3, 1, 4),
    (torch.bfloat16, 3, 1, 0),
], ids=str)  # fmt: skip
def test_threads_change_nothing(isa, rng, random_maps, monkeypatch, dtype, kernel, stride, tile):
    """Strips and chunks are cut otherwise; every pixel is computed in the same order. Nor do other images matter."""
    weight, bias = (t.to(dtype) for t in random_conv(rng, 32, 64, kernel))
    packed, maps = pack_conv(weight, bias, stride=stride, tile=tile), random_maps(5, 32, 17, 14).to(dtype)
    if not kernel_takes(maps):
        pytest.skip(f"no kernel takes {dtype} here")
    wants = torch.cat([conv(image[None], packed) for image in maps])
    monkeypatch.setattr(sys.modules[conv.__module__], "PARALLEL_ABOVE", 0)
    for n, threads in product((1, 2, 5), (1, 2, 3, 8)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(conv(maps[:n], packed), wants[:n])


def test_layouts_and_empty_batches(isa, rng, random_maps):
    weight, bias = (t.float() for t in random_conv(rng, 16, 32, 3))
    packed, x, residual = pack_conv(weight, bias), random_maps(2, 16, 9, 7), random_maps(2, 32, 9, 7)
    want, before = conv(x, packed, residual), (x.clone(), residual.clone())
    assert torch.equal(conv(x.contiguous(), packed, residual.contiguous()), want)
    wide = torch.full((2, 40, 9, 20), torch.nan)
    wide[:, 3:35:2, :, 5:12] = x
    assert torch.equal(conv(wide[:, 3:35:2, :, 5:12], packed, residual.flip(3).flip(3)), want)
    twice = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(conv(twice, packed), conv(twice.clone(), packed))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert conv(x[:0], packed, residual[:0]).shape == (0, 32, 9, 7)
    parameter = pack_conv(weight.requires_grad_(), bias.requires_grad_())
    assert not any(t.requires_grad for t in parameter[:3]) and torch.equal(conv(x, parameter, residual), want)


@pytest.mark.parametrize("tile", [0, 4])
def test_gradients(isa, rng, random_maps, tile):
    weight, bias = random_conv(rng, 16, 16, 3)
    packed = pack_conv(weight.float(), bias.float(), relu=True, tile=tile)
    inputs = [random_maps(2, 16, 5, 4).requires_grad_() for _ in range(2)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = F.relu(F.conv2d(exact[0], weight, bias, padding=1) + exact[1])
    for got, grad in zip(
        torch.autograd.grad(conv(inputs[0], packed, inputs[1]).square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), exact),
        strict=True,
    ):
        assert relative_error(got, grad) < TOLERANCE[tile] and grad.any()
    (got,) = torch.autograd.grad(conv(inputs[0].detach(), packed, inputs[1]).sum(), inputs[1])
    assert torch.equal(got, (want > 0).float())
    with torch.no_grad():
        assert not conv(*inputs[:1], packed, inputs[1]).requires_grad


WEIGHT, BIAS = torch.zeros(32, 16, 3, 3), torch.zeros(32)
PACK_ERRORS = [
    ({"weight": WEIGHT[0]}, r"weight must be \(out, in, k, k\) with k 1 or 3, got \(16, 3, 3\)"),
    ({"weight": WEIGHT[..., :1]}, r"with k 1 or 3, got \(32, 16, 3, 1\)"),
    ({"weight": torch.zeros(32, 16, 5, 5)}, r"with k 1 or 3, got \(32, 16, 5, 5\)"),
    ({"weight": WEIGHT[:17]}, "out width must be a multiple of 16, got 17"),
    ({"weight": WEIGHT[:, :0]}, "in width must be a multiple of 16, got 0"),
    ({"weight": WEIGHT.int()}, "weight must be floating point, got torch.int32"),
    ({"bias": BIAS[:16]}, r"bias must be \(32,\) torch.float32 on cpu, got \(16,\) torch.float32 on cpu"),
    ({"bias": BIAS.double()}, r"bias must be \(32,\) torch.float32 on cpu, got \(32,\) torch.float64 on cpu"),
    ({"bias": BIAS.to("meta")}, r"bias must be .* on cpu, got \(32,\) torch.float32 on meta"),
    ({"stride": 0}, "stride must be an integer >= 1, got 0"),
    ({"stride": 1.0}, "stride must be an integer >= 1, got 1.0"),
    ({"tile": 3}, "tile must be 0 or 2 or 4, got 3"),
    ({"tile": 2, "stride": 2}, "tile must be 0, got 2"),
    ({"tile": 4, "weight": WEIGHT[:, :, :1, :1]}, "tile must be 0, got 4"),
    ({"tile": 2, "weight": WEIGHT.bfloat16(), "bias": BIAS.bfloat16()}, "tile must be 0, got 2"),
]


@pytest.mark.parametrize(("change", "message"), PACK_ERRORS, ids=[message[:40] for _, message in PACK_ERRORS])
def test_packing_names_mistakes(change, message):
    with pytest.raises(InputError, match=f"^conv: .*{message}$"):
        pack_conv(**({"weight": WEIGHT, "bias": BIAS} | change))


MAPS = torch.zeros(2, 16, 5, 6)
ERRORS = [
    (MAPS[0], None, r"x must be \(N, 16, H, W\) with H, W >= 1, got \(16, 5, 6\)"),
    (MAPS[:, :8], None, r"x must be \(N, 16, H, W\) with H, W >= 1, got \(2, 8, 5, 6\)"),
    (MAPS[:, :, :0], None, r"got \(2, 16, 0, 6\)"),
    (MAPS.double(), None, "x must be torch.float32 on cpu like the packed weights, got torch.float64 on cpu"),
    (MAPS.to("meta"), None, "x must be torch.float32 on cpu like the packed weights, got torch.float32 on meta"),
    (MAPS, torch.zeros(2, 32, 5, 6), r"residual must be \(2, 32, 3, 3\), got \(2, 32, 5, 6\)"),
    (MAPS, torch.zeros(1, 32, 3, 3), r"residual must be \(2, 32, 3, 3\), got \(1, 32, 3, 3\)"),
    (MAPS, torch.zeros(2, 32, 3, 3).half(), "residual must be torch.float32 on cpu .*, got torch.float16 on cpu"),
]


@pytest.mark.parametrize(("x", "residual", "message"), ERRORS, ids=[message[:50] for *_, message in ERRORS])
@pytest.mark.parametrize("function", [conv, conv_reference])
def test_mistakes_are_named(function, x, residual, message):
    with pytest.raises(InputError, match=f"^conv: .*{message}"):
        function(x, pack_conv(WEIGHT, BIAS, stride=2), residual)


def test_what_is_no_dense_tensor_is_named(rng):
    weight, bias = (t.float() for t in random_conv(rng, 16, 32, 3))
    packed = pack_conv(weight, bias)
    for x in (torch.zeros(1, 16, 3, 3).to_sparse(), "maps"):
        with pytest.raises(InputError, match=r"^conv: x must be a (dense )?tensor"):
            conv(x, packed)
    array = rng.normal(size=(1, 16, 3, 3)).astype("float32")
    assert torch.equal(conv(array, packed), conv(torch.from_numpy(array), packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_and_compile(rng, random_maps, dtype, compiles_and_exports):
    weight, bias = (t.to(dtype) for t in random_conv(rng, 16, 32, 3))
    packed, x = pack_conv(weight, bias, stride=2, relu=True), random_maps(2, 16, 9, 7).to(dtype)
    residual = random_maps(2, 32, 5, 4).to(dtype)
    for added in (None, residual):
        torch.library.opcheck(torch.ops.hrpose.conv.default, (x, *packed[:3], added, *packed[3:]))

    compiles_and_exports(lambda maps: conv(maps * 2, packed) + 1, x)


def test_other_devices_and_dtypes_take_the_reference(rng):
    weight, bias = (t.to("meta") for t in random_conv(rng, 16, 32, 3))
    y = conv(torch.zeros(2, 16, 5, 4, dtype=torch.float64, device="meta"), pack_conv(weight, bias, stride=2))
    assert y.shape == (2, 32, 3, 2) and y.device.type == "meta" and y.dtype == torch.float64
    weight, bias = (t.half() for t in random_conv(rng, 16, 16, 1))
    assert conv(torch.zeros(1, 16, 2, 2).half(), pack_conv(weight, bias)).dtype == torch.float16


def fuzz(rng, calls):
    """Random calls, some of them wrong, against float64; counts results. Anything but a right result or an InputError
    fails the test."""
    results = 0

    def maybe(value, wrong):
        return value if rng.random() < 0.98 else wrong

    def laid_out(maps):
        kind = rng.integers(5)
        if kind == 0:
            return maps.contiguous(memory_format=torch.channels_last)
        if kind == 1:
            return maps.transpose(2, 3).contiguous().transpose(2, 3)
        return maps[:1].expand_as(maps) if kind == 2 else maps

    for _ in range(calls):
        n, h, w = (int(v) for v in rng.integers(0 if rng.random() < 0.05 else 1, (4, 12, 12)))
        ins, outs = (16 * int(v) for v in rng.integers(1, 5, 2))
        kernel, stride = (1, 3)[rng.integers(2)], int(rng.choice([1, 1, 2, 3]))
        dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float64)[rng.integers(4)]
        tile = [None, 0, 2, 4][rng.integers(4)] if dtype == torch.float32 and kernel == 3 and stride == 1 else None
        weight, bias = (t.to(dtype) for t in random_conv(rng, ins, outs, maybe(kernel, 2)))
        x = laid_out(torch.from_numpy(rng.normal(size=(n, maybe(ins, 8), h, w))).to(maybe(dtype, torch.float16)))
        shape = (n, outs, maybe(-(-h // stride), 99), -(-w // stride))
        residual = laid_out(torch.from_numpy(rng.normal(size=shape)).to(dtype)) if rng.random() < 0.5 else None
        try:
            packed = pack_conv(weight, bias, stride=maybe(stride, 0), relu=bool(rng.integers(2)), tile=maybe(tile, 5))
            y = conv(x, packed, residual)
        except InputError:
            continue
        results += 1
        if dtype == torch.bfloat16 and stride > 1 and w <= stride and not kernel_takes(x):
            continue  # torch's own bfloat16 convolution is wrong where one column is left (2.13, on AMX)
        want = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2)
        want = want if residual is None else want + residual
        want = F.relu(want) if packed.relu else want
        tolerance = {torch.float64: 1e-14, torch.bfloat16: 1e-2}.get(dtype, TOLERANCE[packed.tile])
        assert y.dtype == dtype and relative_error(y, want) < tolerance
    return results


def test_fuzz(isa, rng):
    assert fuzz(rng, 200) > 150


@pytest.mark.slow
def test_fuzz_long(isa, rng):
    assert fuzz(rng, 10_000) > 7500
