"""csrc/cuda/bottlenecks.h and bottlenecks_wgmma.h, emulated, against float64 with the roundings of the kernels, and
against the reference."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hrpose.ops import BottleneckWeights, bottlenecks_reference, pack_bottlenecks
from hrpose.ops.bottlenecks import core_matrices_take

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SHIM = """
using namespace hrpose::cuda;
extern "C" const char *chain(const void *x, void *out, const void *weights, const float *biases,
                             const int64_t *dilations, void *workspace, int64_t n, int64_t h, int64_t w, int64_t in,
                             int64_t mid, int64_t out_channels, int64_t blocks, int64_t stride, int64_t project,
                             int64_t multiprocessors, int64_t shared_bytes) {
  const BottlenecksArgs args = {x, out, weights, biases, dilations, workspace, n, h, w, in, mid, out_channels, blocks,
                                stride, project != 0, false, Type::bfloat16};
  const Card card = {int(multiprocessors), int(shared_bytes)};
  const Layout<WIDTH> layout{args};
  return FITS ? RUN : "does not fit";
}
"""
# What runs a chain: kernels for warps with operands of both sizes, and of one; kernels for warpgroups.
MMA, SMALL_ONLY, WGMMA = (
    ("run_bottlenecks<TYPE, WIDTH>(args, card, nullptr)", "layout.fits(card)"),
    ("run_chain<TYPE, WIDTH, 1>(layout, card, nullptr)", "layout.fits(card)"),
    ("run_bottlenecks_wgmma<TYPE, WIDTH>(args, card, nullptr)", "wgmma_fits(layout, card)"),
)
LAYOUTS = {MMA: "fragments", SMALL_ONLY: "fragments", WGMMA: "core_matrices"}
TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Half"}
PYRAMID = (32, 16, 8, 4, 2, 1)
H100, SMALL = 227 << 10, 99 << 10  # bytes of shared memory: with 99 KB the weights of C = 64 pass through the ring
POSTS = 4096  # values around what is written, more than a row of the planted bugs' maps
# Rounding to 8 or 11 bits; now and then the order of a float32 sum decides which way, and six blocks carry it on.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def header(wgmma, edits=()):
    """The text of bottlenecks.h, perhaps followed by that of bottlenecks_wgmma.h; `edits` are of the last one."""
    *before, text = [(CUDA / name).read_text() for name in ["bottlenecks.h"] + ["bottlenecks_wgmma.h"] * wgmma]
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} places to edit: {old}"
        text = text.replace(old, new)
    return "".join([*before, text]).replace("#pragma once", "").replace('#include "bottlenecks.h"', "")


def random_blocks(rng, dtype, in_channels, mid, out, count, project):
    """He's scale, so that values neither grow nor vanish."""

    def draw(*shape):
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 100
        return torch.from_numpy(rng.normal(size=shape) * (2 / fan) ** 0.5).to(dtype)

    blocks = []
    for index in range(count):
        ins = out if index else in_channels
        tensors = [draw(mid, ins), draw(mid), draw(mid, mid, 3, 3), draw(mid), 0.5 * draw(out, mid), draw(out)]
        blocks.append(BottleneckWeights(*tensors, draw(out, ins) if project and not index else None))
    return blocks


@pytest.fixture(scope="module")
def kernels(emulate):
    """kernels(dtype, mid, edits, design) compiles the kernels of one type and width."""

    def kernels(dtype, mid, edits=(), design=MMA):
        call, fits = design
        shim = SHIM.replace("RUN", call).replace("FITS", fits).replace("TYPE", TYPES[dtype]).replace("WIDTH", str(mid))
        function = f"{call.split('<')[0]}<{TYPES[dtype]}, {mid}>"
        define = f"template const char *{function}(const BottlenecksArgs &, const Card &, Stream);"
        define = f"\nnamespace hrpose::cuda {{\n{define}\n}}\n" if design != SMALL_ONLY else ""
        return emulate(header(wgmma=design == WGMMA, edits=edits) + define, shim)

    return kernels


@pytest.fixture
def run(fenced):
    """run(kernels, x, packed, ...): (N, in, H, W) -> (N, out, H', W').

    NaNs lie around what is read, and in the workspace and the output; what lies around these two stays as it was.
    """

    def run(kernels, x, packed, multiprocessors=132, shared_bytes=H100):
        n, _, h, w = x.shape
        mid, out, stride, blocks = packed.mid_channels, packed.out_channels, packed.stride, len(packed.dilations)
        rows, columns = -(-h // stride), -(-w // stride)
        result = torch.full((2 * POSTS + n * rows * columns * out,), 77, dtype=x.dtype)
        result[POSTS:-POSTS] = torch.nan
        pixels = n * h * w + (n * rows * columns if blocks > 1 else 0)
        workspace = torch.full((2 * POSTS + pixels * mid,), 77, dtype=x.dtype)
        workspace[POSTS:-POSTS] = torch.nan
        read = (x.permute(0, 2, 3, 1).contiguous(), packed.weights, packed.biases)
        maps, weights, biases = (fenced(t, torch.nan) for t in read)
        sizes = (n, h, w, packed.in_channels, mid, out, blocks, stride, packed.project, multiprocessors, shared_bytes)
        buffers = (maps, result[POSTS:-POSTS], weights, biases, packed.dilations, workspace[POSTS:-POSTS])
        kernels("chain", *buffers, *sizes)
        for buffer in (result, workspace):
            assert (buffer[:POSTS] == 77).all() and (buffer[-POSTS:] == 77).all()
        return result[POSTS:-POSTS].view(n, rows, columns, out).permute(0, 3, 1, 2)

    return run


def exact(x, blocks, dilations, stride=1, rounded=True):
    """The equation in float64, rounded where the kernel stores or multiplies again."""
    cut = (lambda v: v.to(dtype).double()) if rounded else (lambda v: v)
    x, dtype = x.double(), x.dtype
    for index, (block, d) in enumerate(zip(blocks, dilations, strict=True)):
        w1, b1, w2, b2, w3, b3 = (t.double() for t in block[:6])
        step = 1 if index else stride
        y = cut(F.relu(F.conv2d(x, w1[:, :, None, None], b1)))
        z = cut(F.relu(F.conv2d(y, w2, b2, step, d, d)))
        if block.projection is not None:
            x = F.conv2d(x, block.projection.double()[:, :, None, None], stride=step)
        x = cut(F.relu(x + F.conv2d(z, w3[:, :, None, None], b3)))
    return x


def rms(got, want):
    return float((got.double() - want).norm() / want.norm())


def data(rng, dtype, maps, widths, dilations, stride=1, project=None, design=MMA):
    n, h, w = maps
    project = widths[0] != widths[2] or stride != 1 if project is None else project
    blocks = random_blocks(rng, dtype, *widths, len(dilations), project)
    x = torch.from_numpy(rng.normal(size=(n, widths[0], h, w))).relu().to(dtype)
    return x, blocks, pack_bottlenecks(blocks, dilations, stride, LAYOUTS[design])


BF16, HALF = TYPES
# Type, (N, H, W), (in, mid, out), dilations, stride, multiprocessors, bytes of shared memory.
CASES = [
    (BF16, (1, 32, 24), (128, 32, 128), PYRAMID, 1, 132, H100),
    (BF16, (1, 13, 9), (128, 32, 128), PYRAMID[::-1], 1, 1, H100),  # operands of 32 rows; many tiles for a warp
    (BF16, (3, 5, 7), (64, 32, 32), (3, 1), 1, 2, H100),  # a projection
    (BF16, (1, 9, 17), (32, 32, 64), (2,), 2, 3, H100),  # one block alone
    (BF16, (1, 1, 1), (96, 32, 96), (1, 2), 1, 132, H100),
    (BF16, (2, 5, 9), (256, 64, 256), (4, 1), 1, 1, H100),
    (BF16, (1, 9, 6), (64, 64, 128), (1, 2), 3, 132, SMALL),
    (HALF, (1, 9, 9), (64, 128, 128), (2, 1), 2, 132, SMALL),
]
LONG = [
    (BF16, (3, 32, 24), (256, 64, 256), PYRAMID, 1, 132, H100),
    (HALF, (1, 32, 24), (256, 64, 256), PYRAMID, 1, 2, SMALL),
    (HALF, (1, 17, 11), (256, 64, 256), (3, 5, 7, 2, 1, 9), 1, 132, H100),
    (HALF, (3, 32, 24), (128, 32, 128), PYRAMID, 1, 3, H100),
    (BF16, (1, 16, 12), (64, 64, 256), (1, 1, 1), 1, 3, H100),
    (BF16, (1, 24, 18), (256, 128, 512), (1, 1, 1, 1), 2, 3, SMALL),
    (HALF, (1, 15, 10), (512, 128, 512), (4, 1), 1, 1, H100),
]


WARPGROUPS = [
    (BF16, (1, 8, 17), (64, 64, 64), (2, 1), 1, 132, H100),
    (
        BF16,
        (2, 13, 9),
        (64, 32, 128),
        (4, 1),
        2,
        1,
        H100,
    ),  # a projection; many tiles for a warpgroup, rows beyond the map
    (HALF, (1, 1, 1), (96, 32, 96), (1,), 1, 132, H100),
]
LONG_WARPGROUPS = [
    (BF16, (1, 32, 24), (256, 64, 256), PYRAMID, 1, 132, H100),
    (HALF, (2, 32, 24), (256, 64, 256), PYRAMID[::-1], 1, 2, H100),
    (BF16, (3, 32, 24), (128, 32, 128), PYRAMID, 1, 3, H100),
    (HALF, (1, 17, 11), (256, 64, 256), (3, 5, 9), 1, 1, H100),
    (BF16, (1, 16, 12), (64, 64, 256), (1, 1, 1), 1, 3, H100),
    (HALF, (1, 19, 10), (128, 64, 256), (2, 1), 3, 1, H100),  # a projection of 128 inputs, in two pieces
]
EVERY = [(MMA, case) for case in CASES] + [(WGMMA, case) for case in WARPGROUPS]
EVERY += [pytest.param(MMA, case, marks=pytest.mark.slow) for case in LONG]
EVERY += [pytest.param(WGMMA, case, marks=pytest.mark.slow) for case in LONG_WARPGROUPS]


def name_of(value):
    return LAYOUTS.get(value) or str(value)


@pytest.mark.parametrize(("design", "case"), EVERY, ids=name_of)
def test_equals_float64(kernels, run, rng, design, case):
    dtype, maps, widths, dilations, stride, *card = case
    x, blocks, packed = data(rng, dtype, maps, widths, dilations, stride, design=design)
    got = run(kernels(dtype, widths[1], design=design), x, packed, *card)
    assert rms(got, exact(x, blocks, dilations, stride)) < TOLERANCE[dtype]
    truth = exact(x, blocks, dilations, stride, rounded=False)
    assert rms(got, truth) < 1.05 * rms(bottlenecks_reference(x, packed), truth) + 0.01 / truth.numel() ** 0.5


@pytest.mark.parametrize(("design", "mid"), [(MMA, 32), (MMA, 64), (WGMMA, 32)], ids=name_of)
def test_a_stride_without_a_projection(kernels, run, rng, design, mid):
    x, blocks, packed = data(rng, BF16, (2, 9, 10), (96, mid, 96), (2, 1), 2, project=False, design=design)
    got = run(kernels(BF16, mid, design=design), x, packed, 3, H100)
    y = exact(x, blocks[:1], (2,))[:, :, ::2, ::2].to(BF16)
    assert rms(got, exact(y, blocks[1:], (1,))) < TOLERANCE[BF16]


def test_schedules_change_nothing(kernels, run, rng):
    """Resident weights and the ring: the threads of a block, and the blocks, in any order; also another split."""
    x, _, packed = data(rng, BF16, (1, 5, 10), (128, 64, 128), (3, 1))
    emulated = kernels(BF16, 64)
    results = []
    for schedule, multiprocessors in (("forward", 132), ("reverse", 132), ("shuffled", 132), ("shuffled", 1)):
        emulated.configure(schedule, seed=3)
        results += [run(emulated, x, packed, multiprocessors, shared_bytes) for shared_bytes in (H100, SMALL)]
    emulated.configure()
    assert all(torch.equal(result, results[0]) for result in results) and not results[0].isnan().any()


@pytest.mark.parametrize("mid", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_schedules_change_nothing_for_warpgroups(kernels, run, rng, mid):
    """The next block is the next kernel's, too: few warpgroups with a tile, and many tiles for each."""
    x, _, packed = data(rng, BF16, (2, 17, 10), (2 * mid, mid, 2 * mid), (3, 1), design=WGMMA)
    emulated, results = kernels(BF16, mid, design=WGMMA), []
    for schedule, multiprocessors in (("forward", 132), ("reverse", 132), ("shuffled", 132), ("shuffled", 1)):
        emulated.configure(schedule, seed=3)
        results.append(run(emulated, x, packed, multiprocessors))
    emulated.configure()
    assert all(torch.equal(result, results[0]) for result in results) and not results[0].isnan().any()


@pytest.mark.parametrize("design", [MMA, WGMMA], ids=name_of)
def test_taps_outside_the_map_are_not_read(kernels, run, rng, design):
    """With d beyond the map only the centre tap counts: the others may be NaN, and a lone pixel's NaN stays alone."""
    x, (block,), packed = data(rng, BF16, (2, 6, 5), (32, 32, 32), (6,), design=design)
    w2 = torch.full_like(block.w2, torch.nan)
    w2[:, :, 1, 1] = block.w2[:, :, 1, 1]
    poisoned = pack_bottlenecks([block._replace(w2=w2)], [6], 1, LAYOUTS[design])
    emulated = kernels(BF16, 32, design=design)
    want = run(emulated, x, packed)
    assert torch.equal(run(emulated, x, poisoned), want) and not want.isnan().any()
    x[1, :, 2, 3] = torch.nan
    assert run(emulated, x, poisoned).isnan().any(1).nonzero().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("design", [MMA, WGMMA], ids=name_of)
def test_exact_products(kernels, run, design):
    """Identities, one tap of the 3x3, whole numbers: every product is exact, so a misplaced channel shows."""
    channels = 64
    zero, eye = torch.zeros(channels, dtype=BF16), torch.eye(channels, dtype=BF16)
    w2 = torch.zeros(channels, channels, 3, 3, dtype=BF16)
    w2[:, :, 0, 2] = eye
    block = BottleneckWeights(eye.roll(1, 0), zero, w2, zero + 1, 3 * eye.roll(2, 1), zero + 2)
    x = (torch.arange(channels * 6 * 35) % 11).to(BF16).view(1, channels, 6, 35)
    shifted = torch.zeros_like(x)
    shifted[:, :, 1:, :-1] = x[:, :, :-1, 1:].roll(1, 1)
    packed = pack_bottlenecks([block], [1], 1, LAYOUTS[design])
    got = run(kernels(BF16, channels, design=design), x, packed)
    assert torch.equal(got, x + 3 * (shifted + 1).roll(-2, 1) + 2)


@pytest.mark.parametrize("design", [MMA, WGMMA], ids=name_of)
def test_infinities_and_nan_are_those_of_the_reference(kernels, run, rng, design):
    x, _, packed = data(rng, BF16, (1, 7, 9), (128, 32, 128), (2, 1), design=design)
    x[0, 5, 3, 4], x[0, 7, 0, 0] = torch.inf, torch.nan
    got, want = run(kernels(BF16, 32, design=design), x, packed), bottlenecks_reference(x, packed)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


DISPATCH = """
using namespace hrpose::cuda;
static const BottlenecksArgs *only_sizes(const int64_t *v, int64_t type) {
  static BottlenecksArgs args;
  args = {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,   v[0],      v[1],      v[2],
          v[3],    v[4],    v[5],    v[6],    v[7],    v[8] != 0, v[9] != 0, Type(type)};
  return &args;
}
extern "C" {
const char *workspace(int64_t *bytes, int64_t capability, int64_t shared_bytes, const int64_t *sizes) {
  simt::machine.attributes[cudaDevAttrComputeCapabilityMajor] = int(capability / 10);
  simt::machine.attributes[cudaDevAttrComputeCapabilityMinor] = int(capability % 10);
  simt::machine.attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin] = int(shared_bytes);
  return bottlenecks_workspace(*only_sizes(sizes, 1), bytes);
}
const char *which(const int64_t *sizes, int64_t type) { return bottlenecks_fwd(*only_sizes(sizes, type), nullptr); }
}
"""


def test_what_the_launcher_takes(emulate, emulation_error):
    """csrc/cuda/bottlenecks.cu alone: its kernels are stand-ins that say which they are."""
    stand_ins = [
        f"template <> const char *{run}<{kind}, {mid}>(const BottlenecksArgs &, const Card &, Stream) "
        f'{{ return "{run} {kind} of {mid}"; }}\n'
        for run, mids in (("run_bottlenecks", (32, 64, 128)), ("run_bottlenecks_wgmma", (32, 64)))
        for kind in TYPES.values()
        for mid in mids
    ]
    source = (CUDA / "bottlenecks.cu").read_text().replace('#include "bottlenecks_wgmma.h"', "")
    text = re.sub("extern template .*\n", "", header(wgmma=True))
    launcher = emulate("".join([text, "\nnamespace hrpose::cuda {\n", *stand_ins, "\n}\n", source]), DISPATCH)

    def workspace(
        n, h, w, ins, mid, out, blocks=1, stride=1, project=False, wgmma=False, capability=90, shared_bytes=H100
    ):
        answer = torch.zeros(1, dtype=torch.int64)
        sizes = [n, h, w, ins, mid, out, blocks, stride, project, wgmma]
        launcher("workspace", answer, capability, shared_bytes, sizes)
        return int(answer)

    assert workspace(3, 9, 7, 64, 32, 64) == 3 * 9 * 7 * 32 * 2
    assert workspace(3, 9, 7, 64, 64, 256, 2, 2, True) == 3 * (9 * 7 + 5 * 4) * 64 * 2
    assert workspace(1, 1, 1, 256, 128, 512, 4, 2, True, capability=86, shared_bytes=SMALL) > 0
    assert workspace(1, 1, 1, 64, 64, 256, capability=75) == -1
    assert workspace(1, 1, 1, 64, 48, 256) == workspace(1, 1, 1, 80, 64, 256) == workspace(1, 1, 1, 64, 64, 80) == -1
    assert workspace(1, 1, 1, 512, 128, 512, shared_bytes=SMALL) == -1 != workspace(1, 1, 1, 512, 128, 512)
    # 146 KB of weights for a step, and C = 32 has no ring
    assert workspace(1, 1, 1, 1024, 32, 1024, 2, shared_bytes=SMALL) == -1 != workspace(1, 1, 1, 1024, 32, 1024, 2)
    assert workspace(1 << 20, 32, 32, 64, 64, 64) > 0 > workspace((1 << 20) + 1, 32, 32, 64, 64, 64)
    assert workspace(1, 1 << 12, 1 << 12, 64, 64, 64) > 0 > workspace(1, 1 << 12, (1 << 12) + 1, 64, 64, 64)
    pyramid = (1, 32, 24, 256, 64, 256, 6)
    assert workspace(*pyramid, wgmma=True) == workspace(*pyramid) == 2 * 32 * 24 * 64 * 2
    for capability in (80, 89, 100, 120):  # sm_90a is for 9.0 alone
        assert (
            workspace(*pyramid, wgmma=True, capability=capability) == -1 != workspace(*pyramid, capability=capability)
        )
    assert workspace(*pyramid, wgmma=True, shared_bytes=SMALL) == -1 != workspace(*pyramid, shared_bytes=SMALL)
    assert workspace(1, 1, 1, 96, 64, 256, 2, 1, True, wgmma=True) == -1 != workspace(1, 1, 1, 96, 64, 256, 2, 1, True)
    assert workspace(1, 1, 1, 256, 128, 512, wgmma=True) == -1
    assert workspace(1, 1, 1, 256, 64, 256, 2, 2, True, wgmma=True) == -1  # 264 KB of weights
    for type_number, kind in ((1, "BFloat16"), (2, "Half")):
        for mid in (32, 64, 128):
            with pytest.raises(emulation_error, match=f"^run_bottlenecks {kind} of {mid}$"):
                launcher("which", [1, 1, 1, 64, mid, 64, 1, 1, 0, 0], type_number)
        for mid in (32, 64):
            with pytest.raises(emulation_error, match=f"^run_bottlenecks_wgmma {kind} of {mid}$"):
                launcher("which", [1, 1, 1, 64, mid, 64, 1, 1, 0, 1], type_number)
    for mid, wgmma in ((96, 0), (128, 1)):
        with pytest.raises(emulation_error, match=r"^bottlenecks: no kernel for these sizes$"):
            launcher("which", [1, 1, 1, 64, mid, 64, 1, 1, 0, wgmma], 1)


def test_what_is_packed_fits(rng):
    """The rule of `core_matrices_take` is that of the launcher, for every width up to what either refuses."""
    for mid in (32, 64):
        for ins, out, project in ((mid, 8 * mid, True), (4 * mid, 4 * mid, False), (64, 4 * mid, True)):
            packed_bytes = 2 * (9 * mid * mid + out * (ins * project + 2 * mid))
            others = 4 * (out + 2 * mid) + 8 * (9 + out // mid)
            assert not core_matrices_take(BF16, ins, mid, out, project) or packed_bytes + others <= H100


# Texts of bottlenecks.h and what takes their place.
MUTANTS = {
    "one row too many": ("first_row + r * s) < unsigned(p.in_h)", "first_row + r * s) <= unsigned(p.in_h)"),
    "no barrier after the weights": ("  __syncthreads();\n  // The next kernel's", "  // The next kernel's"),
}
LONG_MUTANTS = {
    "a tap is left out": ("last * p.stride + (k - 1) * p.dilation >= 0", "last * p.stride + (k - 1) * p.dilation > 0"),
    "a column too many": ("unsigned(column) < unsigned(p.in_w)", "unsigned(column) <= unsigned(p.in_w)"),
    "padding is not zero": ("mask[r] = valid ? p.ones : 0;", "mask[r] = p.ones;"),
    "no copy is waited for": ("    commit_copies();\n    wait_copies<0>();\n  }", "    commit_copies();\n  }"),
    "y in place": ("last ? nullptr : y[(block + 1) % 2]", "last ? nullptr : y[block % 2]"),
    "a row beyond the map": ("active && y0 + r < p.h", "active && y0 + r <= p.h"),
    "rows of an operand change places": ("4 * group + i / 2][i % 2 * 2]", "4 * group + i / 2][2 - i % 2 * 2]"),
    "another bias": ("next_b1 = b3 + p.out_channels", "next_b1 = b3"),
    "a shortcut without stride": ("min(x, p.w - 1)) * s * p.in", "min(x, p.w - 1)) * p.in"),
    "the first inputs of the projection": ("load(i + 1 < in_groups ? i + 1 : 0);", "load(0);"),
}
RING_MUTANTS = {
    "no barrier": ("    __syncthreads(); // this stage", "    // this stage"),
    "one copy less is waited for": ("wait_copies<S::kSlots - 2>();", "wait_copies<S::kSlots - 1>();"),
    "a slot is filled too early": ("    __syncthreads(); // this stage", "    issue();\n    // this stage"),
    "groups are not counted": ("    commit_copies(); // empty", "    if (ahead) commit_copies(); // empty"),
    "a warp without a tile leaves": ("if (resident && !active)", "if (!active)"),
}
WGMMA_MUTANTS = {
    "offsets change places": (
        "descriptor(matrix, kNextInputs, kNextOutputs)",
        "descriptor(matrix, kNextOutputs, kNextInputs)",
    ),
    "products are not waited for": ("  wait_products<0>();\n", ""),
}
LONG_WGMMA_MUTANTS = {
    "a tap is not waited for": ("        wait_for(taps[tap]);\n        multiply", "        multiply"),
    "no barrier": ("    b2[i] = p.biases[i];\n  __syncthreads();", "    b2[i] = p.biases[i];"),
    "a block leaves before its copies have come": (
        "  if (threadIdx.x == 0)\n    for (int tap = 0; tap < 9; ++tap)",
        "  if (false)\n    for (int tap = 0; tap < 9; ++tap)",
    ),
    "one group may be open": ("wait_products<0>();", "wait_products<1>();"),
    "no fence": ("  fence_products();\n", ""),
    "arrivals are not announced": ("    announce();\n", ""),
    "a part is not waited for": ("        wait_for(arrivals[part]);\n", ""),
    "the next outputs are too near": ("kNextOutputs = 128", "kNextOutputs = 64"),
    "the next inputs are too far": ("kNextInputs = 16 * C", "kNextInputs = 32 * C"),
    "a step of 8 inputs": ("i * 2 * kNextInputs", "i * kNextInputs"),
    "taps of the warp, not of the tile": (
        "taps_inside(p, tile_y0, min(tile_y0 + 8, p.h) - 1",
        "taps_inside(p, y0, min(y0 + 2, p.h) - 1",
    ),
    "a row too many": ("first_row + r * s) < unsigned(p.in_h)", "first_row + r * s) <= unsigned(p.in_h)"),
    "a row beyond the map": ("x < p.w && y0 + 1 < p.h", "x < p.w && y0 < p.h"),
    "padding is not zero": ("mask[r] = valid ? p.ones : 0;", "mask[r] = p.ones;"),
    "another bias": ("begin(next, next_b1, t);", "begin(next, b2, t);"),
    "w1 in place of w3": (
        "multiply_matrix<T, C>(sums[0], z, matrix);",
        "multiply_matrix<T, C>(sums[0], z, matrix + kMatrixBytes<C>);",
    ),
    "operands change while they are read": (
        "  commit_products();\n",
        "  commit_products();\n  a[0].words[0][0][0] = 0;\n",
    ),
}
SPOILT = [("resident", *edit) for edit in MUTANTS.items()]
SPOILT += [pytest.param("resident", *edit, marks=pytest.mark.slow) for edit in LONG_MUTANTS.items()]
SPOILT += [pytest.param("ring", *edit, marks=pytest.mark.slow) for edit in RING_MUTANTS.items()]
SPOILT += [("warpgroups", *edit) for edit in WGMMA_MUTANTS.items()]
SPOILT += [pytest.param("warpgroups", *edit, marks=pytest.mark.slow) for edit in LONG_WGMMA_MUTANTS.items()]


@pytest.mark.parametrize(("weights", "name", "edit"), SPOILT, ids=lambda v: v if isinstance(v, str) else "")
def test_planted_bugs_are_seen(kernels, run, rng, emulation_error, weights, name, edit):
    mid, shared_bytes = (64, 64 << 10) if weights == "ring" else (32, H100)
    design = WGMMA if weights == "warpgroups" else SMALL_ONLY
    spoilt = kernels(BF16, mid, [edit], design)
    seen = False
    runs = [(1, (1, 5, 10), (2, 1), 1), (2, (1, 6, 9), (2, 1), 1)]
    runs += [(1, (1, 17, 9), (9, 1), 132)] if weights == "warpgroups" else []  # blocks without use for every tap
    for stride, maps, dilations, multiprocessors in runs:
        x, blocks, packed = data(rng, BF16, maps, (64, mid, 64), dilations, stride, design=design)
        for schedule in ("forward", "reverse", "shuffled"):
            spoilt.configure(schedule)
            try:
                got = run(spoilt, x, packed, multiprocessors, shared_bytes)
                error = rms(got, exact(x, blocks, dilations, stride))
                seen = seen or not error < TOLERANCE[BF16]
            except (AssertionError, emulation_error):
                seen = True
    assert seen
