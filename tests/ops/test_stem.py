"""The fused stem against a loop over pixels and float64; its packing, threads, errors and registration."""

import sys
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hrpose.errors import InputError
from hrpose.ops import _ext, pack_stem, stem, stem_reference
from hrpose.ops.maps import kernel_takes

pytestmark = pytest.mark.usefixtures("fenced_workspace")

TOLERANCE = 1e-6  # relative to the largest value: float32 sums of at most 147 products
# (N, H, W), out, kernel, stride
SMALL = [
    ((1, 1, 1), 16, 7, 2),
    ((2, 5, 7), 48, 3, 2),  # a panel of half width
    ((1, 9, 8), 16, 7, 2),
    ((1, 6, 13), 32, 5, 1),
    ((3, 4, 3), 16, 1, 1),
    ((2, 11, 2), 16, 3, 3),
    ((1, 3, 4), 64, 3, 5),  # a stride beyond the image
]


def random_stem(rng, out, kernel):
    """Weight and bias of He's scale, float64."""
    weight = rng.normal(size=(out, 3, kernel, kernel)) * (2 / (3 * kernel * kernel)) ** 0.5
    return torch.from_numpy(weight), torch.from_numpy(rng.normal(size=out) * 0.2)


def random_images(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape)).float()


def naive(images, weight, bias, stride, pool):
    """The equation, pixel by pixel in float64."""
    x, weight = images.double().numpy(), weight.numpy()
    (n, _, h, w), reach = x.shape, weight.shape[2] // 2
    y = np.empty((n, len(weight), -(-h // stride), -(-w // stride)))
    for i, j in np.ndindex(y.shape[2:]):
        y[:, :, i, j] = bias.numpy()
        for ky, kx in np.ndindex(weight.shape[2:]):
            row, col = i * stride + ky - reach, j * stride + kx - reach
            if 0 <= row < h and 0 <= col < w:
                y[:, :, i, j] += x[:, :, row, col] @ weight[:, :, ky, kx].T
    y = np.maximum(y, 0)
    if not pool:
        return torch.from_numpy(y)
    out = np.empty((*y.shape[:2], -(-y.shape[2] // 2), -(-y.shape[3] // 2)))
    for i, j in np.ndindex(out.shape[2:]):
        out[:, :, i, j] = y[:, :, max(0, 2 * i - 1) : 2 * i + 2, max(0, 2 * j - 1) : 2 * j + 2].max((2, 3))
    return torch.from_numpy(out)


def exact(images, weight, bias, stride, pool):
    """The same by torch in float64."""
    y = F.relu(F.conv2d(images.double(), weight.double(), bias.double(), stride, weight.shape[2] // 2))
    return F.max_pool2d(y, 3, 2, 1) if pool else y


def relative_error(got, want):
    """To the largest value; ReLU may leave none."""
    assert got.shape == want.shape
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(0.1)) if want.numel() else 0.0


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("maps", "out", "kernel", "stride"), SMALL, ids=str)
def test_equals_the_loop(isa, rng, maps, out, kernel, stride, pool):
    weight, bias = random_stem(rng, out, kernel)
    images = random_images(rng, maps[0], 3, *maps[1:])
    want = naive(images, weight, bias, stride, pool)
    packed = pack_stem(weight.float(), bias.float(), stride=stride, pool=pool)
    got = stem(images, packed)
    assert relative_error(got, want) < TOLERANCE and got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(stem_reference(images, packed), want) < TOLERANCE
    precise = pack_stem(weight, bias, stride=stride, pool=pool)
    assert relative_error(stem(images.double(), precise), want) < 1e-14
    assert relative_error(stem_reference(images.double(), precise), want) < 1e-14


@pytest.mark.parametrize(("kernel", "stride", "pool"), [(7, 2, True), (3, 2, False), (7, 2, False)])
@pytest.mark.parametrize("size", [(64, 48), pytest.param((256, 192), marks=pytest.mark.slow)], ids=str)
def test_real_shapes(isa, rng, size, kernel, stride, pool):
    """DPN's and ResNet's stem, HRNet's first convolution."""
    weight, bias = random_stem(rng, 64, kernel)
    images, packed = random_images(rng, 2, 3, *size), pack_stem(weight.float(), bias.float(), stride=stride, pool=pool)
    assert relative_error(stem(images, packed), exact(images, weight, bias, stride, pool)) < TOLERANCE


@pytest.mark.parametrize("pool", [False, True])
def test_every_size(rng, pool):
    """Rows and columns of the convolution, odd or even, that meet in the last pixel of the pooling."""
    weight, bias = random_stem(rng, 16, 3)
    for stride in (1, 2):
        packed = pack_stem(weight.float(), bias.float(), stride=stride, pool=pool)
        for h, w in np.ndindex(9, 9):
            images = random_images(rng, 1, 3, h + 1, w + 1)
            assert relative_error(stem(images, packed), exact(images, weight, bias, stride, pool)) < TOLERANCE


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_bfloat16_is_no_worse_than_torch(isa, rng, kernel, pool):
    """Both round images and weights to 8 bits and sum in float32; where no kernel takes bf16 both are the reference."""
    for out, h, w in ((16, 1, 3), (48, 5, 7), (64, 18, 13)):
        weight, bias = (t.bfloat16() for t in random_stem(rng, out, kernel))
        images, packed = random_images(rng, 2, 3, h, w).bfloat16(), pack_stem(weight, bias, pool=pool)
        want = exact(images, weight, bias, 2, pool)
        got, reference = stem(images, packed), stem_reference(images, packed)
        errors = [float((y.double() - want).norm() / want.norm()) for y in (got, reference)]
        assert got.dtype == torch.bfloat16 and packed.bias.dtype == torch.float32
        assert errors[0] < 1.05 * errors[1] + 2**-9 / want.numel() ** 0.5 and errors[0] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_weights_survive_packing(isa, dtype, kernel):
    """One weight per output, of a tap and colour of its own, and whole numbers: every product is exact, so a misplaced
    weight shows."""
    weight, reach = torch.zeros(160, 3, kernel, kernel), kernel // 2
    weight.view(160, -1)[torch.arange(160), torch.arange(160) % (3 * kernel * kernel)] = 2
    images = (torch.arange(3 * 63) % 127).float().view(1, 3, 7, 9)
    around = F.pad(images, (reach, reach, reach, reach))
    want = torch.empty(1, 160, 7, 9)
    for o in range(160):
        colour, row, col = np.unravel_index(o % (3 * kernel * kernel), (3, kernel, kernel))
        want[:, o] = 2 * around[:, colour, row : row + 7, col : col + 9] + 1
    for pool in (False, True):
        packed = pack_stem(weight.to(dtype), torch.ones(160).to(dtype), stride=1, pool=pool)
        expected = F.max_pool2d(want, 3, 2, 1) if pool else want
        assert torch.equal(stem(images.to(dtype), packed), expected.to(dtype))


def test_the_kernel_runs(isa, rng):
    """It reads panels, which the reference does not: for each row of taps 3 k values, of bfloat16 filled up to 32."""
    if isa is None:
        pytest.skip(str(_ext.why_reference()))
    images = random_images(rng, 1, 3, 6, 5)
    for kernel in (1, 3, 5, 7):
        weight, bias = (t.float() for t in random_stem(rng, 32, kernel))
        packed = pack_stem(weight, bias)
        assert packed.panels.numel() == kernel * 3 * kernel * 32
        want = stem(images, packed)
        assert torch.equal(stem(images, packed._replace(weight=weight * torch.nan)), want) and not want.isnan().any()
        assert stem(images, packed._replace(panels=packed.panels * torch.nan)).isnan().all()
        assert pack_stem(weight.bfloat16(), bias.bfloat16()).panels.numel() == kernel * 32 * 32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_nan_and_infinity_stay_near(isa, rng, kernel, value):
    """In outputs whose taps see the pixel; in bfloat16 also in some to their left, whose weights are filled up with
    zeros. Never in another row or image."""
    weight, bias = (t.float() for t in random_stem(rng, 16, kernel))
    images, reach = random_images(rng, 2, 3, 13, 15), kernel // 2
    images[0, 1, 6, 7] = images[1, 2, 12, 14] = value  # the very last one too
    want = torch.zeros(2, 13, 15, dtype=torch.bool)
    want[0, 6 - reach : 7 + reach, 7 - reach : 8 + reach] = want[1, 12 - reach :, 14 - reach :] = True
    got = stem(images, pack_stem(weight, bias, stride=1))
    assert torch.equal(~got.isfinite().all(1), want)
    assert torch.equal(got.isnan(), exact(images, weight, bias, 1, False).isnan())
    if value != value:
        pooled = stem(images, pack_stem(weight, bias, stride=1, pool=True))
        assert torch.equal(pooled.isnan(), F.max_pool2d(got.isnan().float(), 3, 2, 1) > 0)
    bad = ~stem(images.bfloat16(), pack_stem(weight.bfloat16(), bias.bfloat16(), stride=1)).isfinite().all(1)
    assert (want <= bad).all()
    further = -(-(32 - 3 * kernel) // 3)  # columns that 32 values reach beyond the taps
    want[0, 6 - reach : 7 + reach, max(0, 7 - reach - further) : 8] = True
    want[1, 12 - reach :, 14 - reach - further :] = True
    assert (bad <= want).all()


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(isa, rng, monkeypatch, pool, dtype):
    """Fewer images than threads, as many, more; and more threads than rows."""
    weight, bias = (t.to(dtype) for t in random_stem(rng, 32, 7))
    packed = pack_stem(weight, bias, pool=pool)
    if not kernel_takes(weight):
        pytest.skip(f"no kernel takes {dtype} here")
    monkeypatch.setattr(sys.modules[stem.__module__], "PARALLEL_ABOVE", 0)
    for size in ((23, 18), (5, 6), (1, 9)):
        images = random_images(rng, 4, 3, *size).to(dtype)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        wants = torch.cat([stem(image[None], packed) for image in images])
        for n, threads in product(range(5), (1, 2, 3, 8)):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert torch.equal(stem(images[:n], packed), wants[:n])


@pytest.mark.parametrize("pool", [False, True])
def test_layouts_and_gradients(isa, rng, pool):
    """Images are read where they lie; what lies between their values is not."""
    weight, bias = random_stem(rng, 16, 3)
    images, packed = random_images(rng, 2, 3, 9, 7), pack_stem(weight.float(), bias.float(), pool=pool)
    want, before = stem(images, packed), images.clone()
    assert torch.equal(stem(images.contiguous(memory_format=torch.channels_last), packed), want)
    assert torch.equal(stem(images.transpose(2, 3).contiguous().transpose(2, 3), packed), want)
    for wide in (torch.full((4, 12, 20, 30), torch.nan), torch.full((4, 20, 30, 12), torch.nan).permute(0, 3, 1, 2)):
        part = wide[1:4:2, 2:11:3, 4:13, 5:19:2]
        part.copy_(images)
        assert torch.equal(stem(part, packed), want)
        part = wide[2:, 4:7, 3:12, 20:27]
        part.copy_(images)
        assert torch.equal(stem(part, packed), want)
    thrice = images[:1].expand(3, -1, -1, -1)
    assert torch.equal(stem(thrice, packed), stem(thrice.clone(), packed))
    grey = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(stem(grey, packed), stem(grey.contiguous(), packed))
    assert torch.equal(images, before) and stem(images[:0], packed).shape == (0, *want.shape[1:])
    leaf, precise = images.clone().requires_grad_(), images.double().requires_grad_()
    with torch.no_grad():
        assert torch.equal(stem(leaf, packed), want)
    (got,) = torch.autograd.grad(stem(leaf, packed).square().sum(), leaf)
    (grad,) = torch.autograd.grad(exact(precise, weight, bias, 2, pool).square().sum(), precise)
    assert relative_error(got, grad) < TOLERANCE and grad.any()


WEIGHT, BIAS = torch.zeros(32, 3, 7, 7), torch.zeros(32)
PACK_ERRORS = [
    ({"weight": WEIGHT[0]}, r"weight must be \(out, 3, k, k\) with k of \(1, 3, 5, 7\), got \(3, 7, 7\)"),
    ({"weight": WEIGHT[:, :1]}, r"got \(32, 1, 7, 7\)"),
    ({"weight": WEIGHT[..., :4, :4]}, r"got \(32, 3, 4, 4\)"),
    ({"weight": torch.zeros(32, 3, 9, 9)}, r"got \(32, 3, 9, 9\)"),
    ({"weight": WEIGHT[..., :5]}, r"got \(32, 3, 7, 5\)"),
    ({"weight": WEIGHT[:24]}, "out width must be a multiple of 16, got 24"),
    ({"weight": WEIGHT[:0]}, "out width must be a multiple of 16, got 0"),
    ({"weight": WEIGHT.int()}, "weight must be floating point, got torch.int32"),
    ({"bias": BIAS[:16]}, r"bias must be \(32,\) torch.float32 on cpu, got \(16,\) torch.float32 on cpu"),
    ({"bias": BIAS.half()}, r"bias must be \(32,\) torch.float32 on cpu, got \(32,\) torch.float16 on cpu"),
    ({"stride": 0}, "stride must be an integer >= 1, got 0"),
    ({"stride": True}, "stride must be an integer >= 1, got True"),
]


@pytest.mark.parametrize(("change", "message"), PACK_ERRORS, ids=[message[-40:] for _, message in PACK_ERRORS])
def test_packing_names_mistakes(change, message):
    with pytest.raises(InputError, match=f"^stem: .*{message}$"):
        pack_stem(**({"weight": WEIGHT, "bias": BIAS} | change))


IMAGES = torch.zeros(2, 3, 5, 6)
ERRORS = [
    (IMAGES[0], r"images must be \(N, 3, H, W\) with H, W >= 1, got \(3, 5, 6\)"),
    (IMAGES[:, :1], r"images must be \(N, 3, H, W\) with H, W >= 1, got \(2, 1, 5, 6\)"),
    (IMAGES[:, :, :0], r"got \(2, 3, 0, 6\)"),
    (IMAGES[..., :0], r"got \(2, 3, 5, 0\)"),
    (IMAGES.byte(), "images must be torch.float32 on cpu like the packed weights, got torch.uint8 on cpu"),
    (IMAGES.to("meta"), "images must be torch.float32 on cpu like the packed weights, got torch.float32 on meta"),
]


@pytest.mark.parametrize(("images", "message"), ERRORS, ids=[message[-40:] for _, message in ERRORS])
@pytest.mark.parametrize("function", [stem, stem_reference])
def test_mistakes_are_named(function, images, message):
    with pytest.raises(InputError, match=f"^stem: .*{message}"):
        function(images, pack_stem(WEIGHT, BIAS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_and_compile(rng, dtype, compiles_and_exports):
    weight, bias = (t.to(dtype) for t in random_stem(rng, 16, 3))
    images = random_images(rng, 2, 3, 9, 7).to(dtype)
    for pool in (False, True):
        torch.library.opcheck(torch.ops.hrpose.stem.default, (images, *pack_stem(weight, bias, pool=pool)))
    packed = pack_stem(weight, bias, pool=True)

    compiles_and_exports(lambda maps: stem(maps * 2, packed) + 1, images)


def test_other_devices_and_dtypes_take_the_reference(rng):
    weight, bias = (t.to("meta") for t in random_stem(rng, 16, 7))
    packed = pack_stem(weight, bias, pool=True)
    y = stem(torch.zeros(2, 3, 9, 6, dtype=torch.float64, device="meta"), packed)
    assert y.shape == (2, 16, 3, 2) and y.device.type == "meta" and y.dtype == torch.float64


def fuzz(rng, calls):
    """Random calls, some of them wrong, against float64; counts results. Anything but a right result or an InputError
    fails the test."""
    results = 0

    def maybe(value, wrong):
        return value if rng.random() < 0.98 else wrong

    for _ in range(calls):
        n, h, w = (int(v) for v in rng.integers(0 if rng.random() < 0.05 else 1, (4, 30, 30)))
        kernel, out, stride = int(rng.choice([1, 3, 5, 7])), 16 * int(rng.integers(1, 5)), int(rng.integers(1, 5))
        dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float64)[rng.integers(4)]
        weight, bias = (t.to(dtype) for t in random_stem(rng, maybe(out, 8), maybe(kernel, 4)))
        wide = torch.full((n, 3, h + 3, w + 2), torch.nan).to(maybe(dtype, torch.float16))
        wide = wide.contiguous(memory_format=torch.channels_last) if rng.random() < 0.5 else wide
        images = wide[:, : maybe(3, 2), 1 : h + 1, 2 : w + 2]
        images.copy_(torch.from_numpy(rng.normal(size=images.shape)))
        try:
            packed = pack_stem(weight, bias, stride=maybe(stride, 0), pool=bool(rng.integers(2)))
            y = stem(images, packed)
        except InputError:
            continue
        results += 1
        if dtype == torch.bfloat16 and stride > 1 and w <= stride and not kernel_takes(images):
            continue  # torch's own bfloat16 convolution is wrong where one column is left (2.13, on AMX)
        want = exact(images, weight, bias, stride, packed.pool)
        tolerance = {torch.float64: 1e-14, torch.bfloat16: 1e-2}.get(dtype, TOLERANCE)
        assert y.dtype == dtype and relative_error(y, want) < tolerance
    return results


def test_fuzz(isa, rng):
    assert fuzz(rng, 200) > 150


@pytest.mark.slow
def test_fuzz_long(isa, rng):
    assert fuzz(rng, 10_000) > 7500
