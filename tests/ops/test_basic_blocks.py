"""The fused basic blocks against a loop over pixels and float64; their packing, threads, errors and registration."""

import sys
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hrpose.errors import InputError
from hrpose.ops import _ext, basic_blocks, basic_blocks_reference, pack_basic_blocks
from hrpose.ops.maps import kernel_takes

pytestmark = pytest.mark.usefixtures("fenced_workspace")
needs_native = pytest.mark.skipif(_ext.native() is None, reason=str(_ext.why_reference()))

# Relative to the largest value, by tile, for the few blocks here; the transforms of F(4 x 4, 3 x 3) lose a digit.
TOLERANCE = {0: 2e-6, 2: 2e-6, 4: 2e-5}
TILES = (0, 2, 4)
# (N, H, W), C, blocks
SMALL = [
    ((1, 1, 1), 16, 1),
    ((2, 5, 7), 16, 3),
    ((3, 8, 6), 48, 1),  # a panel of half width
    ((1, 9, 13), 32, 2),
    ((5, 3, 2), 16, 2),  # tiles and strips of several images
]
# HRNet-W32's branches at 256x192.
REAL = [((1, 64, 48), 32, 4), ((2, 32, 24), 64, 4), ((4, 16, 12), 128, 4), ((16, 8, 6), 256, 4)]


def random_convs(rng, channels, blocks):
    """Weights and biases of He's scale, so that values neither grow nor vanish; float64."""

    def draw(*shape):
        return torch.from_numpy(rng.normal(size=shape))

    scale = (1 / (9 * channels)) ** 0.5
    return [(draw(channels, channels, 3, 3) * scale, draw(channels) * 0.2) for _ in range(2 * blocks)]


def cast(convs, dtype=torch.float32):
    return [(weight.to(dtype), bias.to(dtype)) for weight, bias in convs]


def naive(x, convs):
    """The equation, pixel by pixel in float64; x (N, C, H, W)."""
    x = x.double().numpy()

    def convolved(maps, weight, bias):
        out = np.empty_like(maps)
        for i, j in np.ndindex(maps.shape[2:]):
            out[:, :, i, j] = bias
            for ky, kx in np.ndindex(3, 3):
                row, col = i + ky - 1, j + kx - 1
                if 0 <= row < maps.shape[2] and 0 <= col < maps.shape[3]:
                    out[:, :, i, j] += maps[:, :, row, col] @ weight[:, :, ky, kx].T
        return out

    pairs = [(weight.numpy(), bias.numpy()) for weight, bias in convs]
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        y = np.maximum(convolved(x, *first), 0)
        x = np.maximum(convolved(y, *second) + x, 0)
    return torch.from_numpy(x)


def exact(x, convs):
    """The same by torch's convolution in float64."""
    x = x.double()
    for (w1, b1), (w2, b2) in zip(convs[::2], convs[1::2], strict=True):
        x = F.relu(F.conv2d(F.relu(F.conv2d(x, w1, b1, padding=1)), w2, b2, padding=1) + x)
    return x


def relative_error(got, want):
    """To the largest value."""
    assert got.shape == want.shape
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(0.1)) if want.numel() else 0.0


@pytest.mark.parametrize(("maps", "channels", "blocks"), SMALL, ids=str)
def test_equals_the_loop(isa, rng, random_maps, maps, channels, blocks):
    convs, x = random_convs(rng, channels, blocks), random_maps(maps[0], channels, *maps[1:])
    want = naive(x, convs)
    for tile in TILES:
        packed = pack_basic_blocks(cast(convs), tile=tile)
        got = basic_blocks(x, packed)
        assert relative_error(got, want) < TOLERANCE[tile]
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(basic_blocks_reference(x, packed), want) < TOLERANCE[0]
    packed = pack_basic_blocks(convs)
    assert relative_error(basic_blocks(x.double(), packed), want) < 1e-13
    assert relative_error(basic_blocks_reference(x.double(), packed), want) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize(("maps", "channels", "blocks"), REAL, ids=str)
def test_real_shapes(isa, rng, random_maps, maps, channels, blocks):
    convs, x = random_convs(rng, channels, blocks), random_maps(maps[0], channels, *maps[1:])
    want = exact(x, convs)
    for tile in TILES:
        got = basic_blocks(x, pack_basic_blocks(cast(convs), tile=tile))
        assert relative_error(got, want) < TOLERANCE[tile] * (channels / 32) ** 0.5  # as errors of sums grow


# Groups of images share a map of at most 512 KB: 8 images of the first shape, 1 of the second, whose map is larger.
@needs_native
@pytest.mark.parametrize(("size", "batches"), [((32, 32), (8, 9, 21)), ((91, 91), (2, 3))], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_groups_of_images(rng, random_maps, monkeypatch, size, batches, tile):
    """However images are grouped and shared, each gets what it gets alone."""
    convs = random_convs(rng, 16, 2)
    packed, x = pack_basic_blocks(cast(convs), tile=tile), random_maps(max(batches), 16, *size)
    want = torch.cat([basic_blocks(image[None], packed) for image in x])
    assert relative_error(want, exact(x, convs)) < TOLERANCE[tile]
    monkeypatch.setattr(sys.modules[basic_blocks.__module__], "PARALLEL_ABOVE", 0)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for n in batches:
            assert torch.equal(basic_blocks(x[:n], packed), want[:n])


@pytest.mark.parametrize(("dtype", "tile"), [(torch.float32, tile) for tile in TILES] + [(torch.bfloat16, 0)], ids=str)
def test_threads_change_nothing(isa, rng, random_maps, monkeypatch, dtype, tile):
    """Fewer images than threads, as many, more, and some left over."""
    convs, maps = random_convs(rng, 32, 2), random_maps(7, 32, 9, 7).to(dtype)
    packed = pack_basic_blocks(cast(convs, dtype), tile=tile)
    if not kernel_takes(maps):
        pytest.skip(f"no kernel takes {dtype} here")
    wants = basic_blocks(maps, packed)
    monkeypatch.setattr(sys.modules[basic_blocks.__module__], "PARALLEL_ABOVE", 0)
    for n, threads in product(range(8), (1, 2, 3, 5)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(basic_blocks(maps[:n], packed), wants[:n])


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
def test_threads_on_fewer_cores(isa, rng, random_maps, monkeypatch, tile):
    """Many barriers, with more threads than cores to meet at them."""
    packed, x = pack_basic_blocks(cast(random_convs(rng, 32, 8)), tile=tile), random_maps(3, 32, 24, 18)
    want = basic_blocks(x, packed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for _ in range(20):
        assert torch.equal(basic_blocks(x, packed), want)


def test_the_kernel_runs(isa, rng, random_maps):
    """It reads panels, which the reference does not; and Winograd's way is taken where it is asked for."""
    if isa is None:
        pytest.skip(str(_ext.why_reference()))
    convs, x = cast(random_convs(rng, 32, 1)), random_maps(1, 32, 6, 5)
    for tile, factors in ((0, 9), (2, 16), (4, 36)):
        packed = pack_basic_blocks(convs, tile=tile)
        assert packed.panels.numel() == 2 * factors * 32 * 32
        want = basic_blocks(x, packed)
        assert torch.equal(basic_blocks(x, packed._replace(weights=packed.weights * torch.nan)), want)
        assert basic_blocks(x, packed._replace(panels=packed.panels * torch.nan)).isnan().all()
    assert pack_basic_blocks(convs).tile == 4 and pack_basic_blocks(cast(convs, torch.bfloat16)).tile == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_stays_near(isa, rng, random_maps, value):
    """By taps two pixels around it for a block; by Winograd's way in the tiles that read it, or read one of those. The
    other image sees nothing of it."""
    convs, x = cast(random_convs(rng, 16, 1)), random_maps(2, 16, 22, 18)
    clean = {tile: basic_blocks(x, pack_basic_blocks(convs, tile=tile)) for tile in TILES}
    x[1, 3, 10, 9] = value
    for tile in TILES:
        got = basic_blocks(x, pack_basic_blocks(convs, tile=tile))
        bad, reach = ~got.isfinite().all(1), 2 * max(1, tile)
        assert bad[1, 10, 9] and torch.equal(got[0], clean[tile][0])
        bad[1, 10 - reach : 11 + reach, 9 - reach : 10 + reach] = False
        assert not bad.any()
        if value != value:
            assert got[1, :, 8:13, 7:12].isnan().all()


def test_bfloat16_is_no_worse_than_torch(isa, rng, random_maps):
    """Both round maps and weights to 8 bits and sum in float32; where no kernel takes bf16 both are the reference."""
    for maps, channels, blocks in (((1, 1, 1), 16, 1), ((2, 5, 7), 48, 2), ((1, 13, 9), 32, 4), ((3, 9, 8), 64, 1)):
        convs = cast(random_convs(rng, channels, blocks), torch.bfloat16)
        packed, x = pack_basic_blocks(convs), random_maps(maps[0], channels, *maps[1:]).bfloat16()
        want = exact(x, cast(convs, torch.float64))
        got, reference = basic_blocks(x, packed), basic_blocks_reference(x, packed)
        errors = [float((y.double() - want).norm() / want.norm()) for y in (got, reference)]
        assert got.dtype == torch.bfloat16 and packed.biases.dtype == torch.float32
        assert errors[0] < 1.05 * errors[1] + 2**-9 / want.numel() ** 0.5 and errors[0] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [48, 64])
def test_weights_survive_packing(isa, dtype, channels):
    """A tap of its own per convolution, and whole numbers: every product is exact, so a misplaced weight shows; in
    F(2 x 2, 3 x 3) the halves are exact too."""
    taps = [(0, 2), (1, 0), (2, 1), (0, 1)]  # row, column
    convs, x = [], (torch.arange(2 * channels * 30) % 11).float().view(2, channels, 5, 6)
    want = y = x
    for index, (row, col) in enumerate(taps):
        weight = torch.zeros(channels, channels, 3, 3)
        weight[:, :, row, col] = (index % 2 + 1) * torch.eye(channels).roll(index + 1, 0)
        convs.append((weight.to(dtype), torch.full((channels,), float(index)).to(dtype)))
        shifted = F.pad(y, (1, 1, 1, 1))[:, :, row : row + 5, col : col + 6].roll(index + 1, 1)
        y = F.relu((index % 2 + 1) * shifted + index + (want if index % 2 else 0))
        want = y if index % 2 else want
    for tile in (0, 2) if dtype == torch.float32 else (0,):
        got = basic_blocks(x.to(dtype), pack_basic_blocks(convs, tile=tile))
        assert want.max() < 256 and torch.equal(got, want.to(dtype))


def test_layouts_and_gradients(isa, rng, random_maps):
    convs, x = random_convs(rng, 16, 2), random_maps(2, 16, 9, 7)
    packed = pack_basic_blocks(cast(convs))
    want, before = basic_blocks(x, packed), x.clone()
    assert torch.equal(basic_blocks(x.contiguous(), packed), want)
    wide = torch.full((2, 40, 9, 20), torch.nan)
    wide[:, 3:35:2, :, 5:12] = x
    assert torch.equal(basic_blocks(wide[:, 3:35:2, :, 5:12], packed), want)
    twice = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(basic_blocks(twice, packed), basic_blocks(twice.clone(), packed))
    assert torch.equal(x, before) and basic_blocks(x[:0], packed).shape == (0, 16, 9, 7)
    leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.no_grad():
        assert torch.equal(basic_blocks(leaf, packed), want)
    (got,) = torch.autograd.grad(basic_blocks(leaf, packed).square().sum(), leaf)
    (grad,) = torch.autograd.grad(exact(exact_leaf, convs).square().sum(), exact_leaf)
    assert relative_error(got, grad) < TOLERANCE[0] and grad.any()
    trained = pack_basic_blocks([(weight.requires_grad_(), bias) for weight, bias in cast(convs)])
    assert not any(t.requires_grad for t in trained[:3]) and torch.equal(basic_blocks(x, trained), want)


WEIGHT, BIAS = torch.zeros(16, 16, 3, 3), torch.zeros(16)
PAIR = (WEIGHT, BIAS)
PACK_ERRORS = [
    ({"convs": []}, "basic_blocks: convs must be two per block, got 0"),
    ({"convs": [PAIR] * 3}, "basic_blocks: convs must be two per block, got 3"),
    (
        {"convs": [PAIR, (torch.zeros(32, 32, 3, 3), torch.zeros(32))]},
        r"weight 1 must be \(C, C, 3, 3\) torch.float32, the same of all, got \(32, 32, 3, 3\) torch.float32",
    ),
    ({"convs": [PAIR, (WEIGHT.double(), BIAS.double())]}, r"weight 1 must be .*, got \(16, 16, 3, 3\) torch.float64"),
    ({"convs": [(WEIGHT[:, :, :1, :1], BIAS)] * 2}, r"weight 0 must be .*, got \(16, 16, 1, 1\) torch.float32"),
    ({"convs": [(torch.zeros(32, 16, 3, 3), torch.zeros(32))] * 2}, r"weight 0 must be .*, got \(32, 16, 3, 3\)"),
    ({"convs": [(torch.zeros(24, 24, 3, 3), torch.zeros(24))] * 2}, "out width must be a multiple of 16, got 24"),
    ({"convs": [PAIR, (WEIGHT, BIAS[:8])]}, r"bias must be \(16,\) torch.float32 on cpu, got \(8,\) torch.float32"),
    ({"convs": [PAIR] * 2, "tile": 1}, "tile must be 0 or 2 or 4, got 1"),
]


@pytest.mark.parametrize(("arguments", "message"), PACK_ERRORS, ids=[message[-40:] for _, message in PACK_ERRORS])
def test_packing_names_mistakes(arguments, message):
    with pytest.raises(InputError, match=message):
        pack_basic_blocks(**arguments)


MAPS = torch.zeros(2, 16, 5, 6)
ERRORS = [
    (MAPS[0], r"x must be \(N, 16, H, W\) with H, W >= 1, got \(16, 5, 6\)"),
    (MAPS[:, :8], r"x must be \(N, 16, H, W\) with H, W >= 1, got \(2, 8, 5, 6\)"),
    (MAPS[..., :0], r"got \(2, 16, 5, 0\)"),
    (MAPS.double(), "x must be torch.float32 on cpu like the packed weights, got torch.float64 on cpu"),
    (MAPS.to("meta"), "x must be torch.float32 on cpu like the packed weights, got torch.float32 on meta"),
]


@pytest.mark.parametrize(("x", "message"), ERRORS, ids=[message[:50] for _, message in ERRORS])
@pytest.mark.parametrize("function", [basic_blocks, basic_blocks_reference])
def test_mistakes_are_named(function, x, message):
    with pytest.raises(InputError, match=f"^basic_blocks: .*{message}"):
        function(x, pack_basic_blocks([PAIR, PAIR]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_and_compile(rng, random_maps, dtype, compiles_and_exports):
    packed = pack_basic_blocks(cast(random_convs(rng, 16, 2), dtype))
    x = random_maps(2, 16, 9, 7).to(dtype)
    torch.library.opcheck(torch.ops.hrpose.basic_blocks.default, (x, *packed))

    compiles_and_exports(lambda maps: basic_blocks(maps * 2, packed) + 1, x)


def test_other_devices_and_dtypes_take_the_reference(rng):
    convs = [(weight.to("meta"), bias.to("meta")) for weight, bias in random_convs(rng, 16, 1)]
    y = basic_blocks(torch.zeros(2, 16, 5, 4, dtype=torch.float64, device="meta"), pack_basic_blocks(convs))
    assert y.shape == (2, 16, 5, 4) and y.device.type == "meta" and y.dtype == torch.float64


def fuzz(rng, calls):
    """Random calls, some of them wrong, against float64; counts results. Anything but a right result or an InputError
    fails the test."""
    results = 0

    def maybe(value, wrong):
        return value if rng.random() < 0.98 else wrong

    for _ in range(calls):
        n, h, w = (int(v) for v in rng.integers(0 if rng.random() < 0.05 else 1, (4, 10, 10)))
        channels, blocks = maybe(int(rng.choice([16, 16, 32, 48])), 8), int(rng.integers(1, 4))
        dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float64)[rng.integers(4)]
        tile = [None, *TILES][rng.integers(4)] if dtype == torch.float32 else None
        convs = cast(random_convs(rng, channels, blocks), dtype)
        x = torch.from_numpy(rng.normal(size=(n, maybe(channels, 16), h, w))).to(maybe(dtype, torch.float16))
        x = x.contiguous(memory_format=torch.channels_last) if rng.random() < 0.5 else x.transpose(2, 3)
        try:
            packed = pack_basic_blocks(maybe(convs, convs[1:]), tile=maybe(tile, 3))
            y = basic_blocks(x, packed)
        except InputError:
            continue
        results += 1
        tolerance = {torch.float64: 1e-13, torch.bfloat16: 3e-2}.get(dtype, TOLERANCE[packed.tile])
        assert y.dtype == dtype and relative_error(y, exact(x, cast(convs, torch.float64))) < tolerance
    return results


def test_fuzz(isa, rng):
    assert fuzz(rng, 200) > 150


@pytest.mark.slow
def test_fuzz_long(isa, rng):
    assert fuzz(rng, 10_000) > 7500
