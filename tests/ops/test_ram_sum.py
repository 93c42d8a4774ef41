"""ram_sum: reference against a loop written from the definition, kernel against reference, gradients, misuse."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrpose.errors import InputError
from hrpose.ops import _ext, ram_sum, ram_sum_reference

# N, C, H, W of the output and the factors of the inputs; the largest is not always the first.
SHAPES = [
    (1, 1, 1, 1, (1,)),
    (2, 32, 64, 48, (1, 2, 4, 8)),
    (3, 7, 6, 18, (3, 1, 2)),
    (2, 1, 5, 7, (1, 1)),
    (1, 18, 24, 16, (8, 4, 2, 1)),
    (2, 48, 8, 8, (1, 8, 8)),
    (1, 5, 49, 49, (49, 1, 7)),
    (0, 3, 4, 4, (1, 2)),
]
# float32: PyTorch's bilinear values are off by up to 3e-6 where the factor is not a power of two, the kernel's by 6e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def maps(n, c, h, w, factors, dtype=torch.float32, channels_last=False, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, c, h // f, w // f, generator=generator, dtype=torch.float64).to(dtype) for f in factors]
    return [x.contiguous(memory_format=torch.channels_last) for x in made] if channels_last else made


def some_weights(n: int, m: int, seed: int = 1) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


def naive(inputs: list[Tensor], weights: Tensor | None, interpolation: str) -> np.ndarray:
    """One value at a time in double, from the definition; bilinear: half-pixel centres, clamped to the map."""
    arrays = [x.double().numpy() for x in inputs]
    n_, c_ = arrays[0].shape[:2]
    h_, w_ = (max(a.shape[axis] for a in arrays) for axis in (2, 3))
    out = np.zeros((n_, c_, h_, w_))

    def taps(i, factor, size):
        position = max((i + 0.5) / factor - 0.5, 0.0)
        low = int(position)
        return low, min(low + 1, size - 1), position - low

    for n, c, y, x in itertools.product(range(n_), range(c_), range(h_), range(w_)):
        for t, a in enumerate(arrays):
            factor, plane = h_ // a.shape[2], a[n, c]
            if interpolation == "nearest":
                value = plane[y // factor, x // factor]
            else:
                (y0, y1, v), (x0, x1, u) = taps(y, factor, a.shape[2]), taps(x, factor, a.shape[3])
                top, bottom = plane[y0, x0] * (1 - u) + plane[y0, x1] * u, plane[y1, x0] * (1 - u) + plane[y1, x1] * u
                value = top * (1 - v) + bottom * v
            out[n, c, y, x] += value * (1.0 if weights is None else float(weights[n, t]))
    return np.maximum(out, 0)


def gradients(op, inputs: list[Tensor], weights: Tensor | None, interpolation: str, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    scale = None if weights is None else weights.detach().clone().requires_grad_()
    out = op(leaves, scale, interpolation)
    return list(torch.autograd.grad(out, leaves if scale is None else [*leaves, scale], grad.to(out.dtype)))


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    scale = want.double().norm() / max(want.numel(), 1) ** 0.5
    assert torch.allclose(got.double(), want.double(), rtol=tolerance, atol=tolerance * (float(scale) + 1e-30))


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, (1,)), (2, 2, 6, 12, (3, 1, 2)), (1, 2, 8, 8, (1, 2, 4, 8))])
def test_reference_is_the_definition(shape, weighted, interpolation):
    inputs, weights = maps(*shape, dtype=torch.float64), some_weights(shape[0], len(shape[4])).double()
    weights = weights if weighted else None
    got = ram_sum_reference(inputs, weights, interpolation)
    np.testing.assert_allclose(got.numpy(), naive(inputs, weights, interpolation), atol=1e-12)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference(isa, shape, dtype, channels_last, weighted, interpolation):
    inputs = maps(*shape, dtype=dtype, channels_last=channels_last)
    weights = some_weights(shape[0], len(shape[4])) if weighted else None
    got, want = ram_sum(inputs, weights, interpolation), ram_sum_reference(inputs, weights, interpolation)
    if interpolation == "nearest" and dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(got, want)  # the same products and sums, in the same order, rounded once
    else:
        assert_near(got, want, TOLERANCE[dtype])
    if isa and dtype in (torch.float32, torch.bfloat16) and shape[0]:
        assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_composite(isa, shape, dtype, channels_last, weighted, interpolation):
    """Against autograd of PyTorch's own resampling in float64 of the same (rounded) values."""
    inputs = maps(*shape, dtype=dtype, channels_last=channels_last)
    weights = some_weights(shape[0], len(shape[4])) if weighted else None
    grad = maps(*shape[:4], (1,), dtype=dtype, seed=2)[0]
    got = gradients(ram_sum, inputs, weights, interpolation, grad)
    out = ram_sum(inputs, weights, interpolation)

    def composite(inputs, weights, interpolation):
        total = 0
        for h, x in enumerate(inputs):
            factor = shape[2] // x.shape[2]
            mode = "nearest-exact" if interpolation == "nearest" else interpolation
            x = F.interpolate(x, scale_factor=float(factor), mode=mode) if factor > 1 else x
            total = total + (x if weights is None else x * weights[:, h, None, None, None])
        return total * (out > 0)  # the same pixels as the op's, whose sums round differently

    double = None if weights is None else weights.double()
    want = gradients(composite, [x.double() for x in inputs], double, interpolation, grad.double())
    for a, b, like in zip(got, want, [*inputs, weights], strict=False):
        scale = 1e-5 if dtype == torch.float32 else 2e-2
        assert_near(a.double(), b.double(), scale)
        assert a.dtype == like.dtype and a.shape == like.shape


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("weighted", [True, False])
def test_numerical_gradients(weighted, interpolation):
    inputs = [x.requires_grad_() for x in maps(2, 2, 4, 6, (1, 2), dtype=torch.float64)]
    weights = some_weights(2, 2).double().requires_grad_() if weighted else None

    def run(*tensors):
        return ram_sum(tensors[:2], tensors[2] if weighted else None, interpolation)

    assert torch.autograd.gradcheck(run, (*inputs, weights) if weighted else tuple(inputs))


def test_second_derivatives():
    """What is not in the kernel runs in PyTorch: never a silent None."""
    inputs = [x.requires_grad_() for x in maps(1, 2, 4, 4, (1, 2))]
    weights = some_weights(1, 2).requires_grad_()
    results = []
    for op in (ram_sum, ram_sum_reference):
        (first,) = torch.autograd.grad(op(inputs, weights).square().sum(), weights, create_graph=True)
        results.append(torch.autograd.grad(first.sum(), [*inputs, weights]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
        assert want.abs().max() > 0


def test_weights_of_one_are_no_weights(isa):
    for dtype, interpolation in itertools.product((torch.float32, torch.bfloat16), ("nearest", "bilinear")):
        inputs = maps(2, 8, 16, 16, (1, 2, 4), dtype=dtype)
        assert torch.equal(ram_sum(inputs, torch.ones(2, 3), interpolation), ram_sum(inputs, None, interpolation))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_means_are_the_same_before_and_after_resampling(factor, interpolation):
    """The attention of RAM relies on it: it pools the small maps."""
    small = maps(2, 3, 5 * factor, 4 * factor, (factor,), dtype=torch.float64)[0].abs()
    large = ram_sum([torch.zeros(2, 3, 5 * factor, 4 * factor, dtype=torch.float64), small], None, interpolation)
    torch.testing.assert_close(large.mean((2, 3)), small.mean((2, 3)), rtol=1e-13, atol=0)


def test_layouts_and_views(isa):
    """Slices, expanded tensors and mixed memory formats give what dense ones give."""
    inputs, weights = maps(2, 8, 8, 12, (1, 2, 4)), some_weights(2, 3)
    want = ram_sum(inputs, weights)
    wide = [torch.cat([x, x], 3)[..., : x.shape[3]] for x in inputs]
    mixed = [inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]]
    assert not wide[0].is_contiguous()
    for views in (wide, mixed, [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]):
        assert torch.equal(ram_sum(views, weights), want)
    assert torch.equal(ram_sum(inputs, weights.T.contiguous().T), want)
    alike = ram_sum([x[:1].expand(2, -1, -1, -1) for x in inputs], weights[:1].expand(2, 3))
    assert torch.equal(alike[0], want[0]) and torch.equal(alike[1], want[0])


def test_types_are_brought_together():
    inputs = [torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), torch.full((1, 1, 1, 1), 1 / 3)]
    out = ram_sum(inputs)
    assert out.dtype == torch.float32 and torch.equal(out, torch.full((1, 1, 2, 2), 1 + 1 / 3))
    assert ram_sum(inputs, torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float32


def test_nan_and_infinity(isa):
    first = torch.tensor([[torch.nan, torch.inf], [-torch.inf, -1.0]])[None, None]
    second = torch.tensor([[1.0]])[None, None]
    got = ram_sum([first, second])
    torch.testing.assert_close(got, torch.tensor([[torch.nan, torch.inf], [0.0, 0.0]])[None, None], equal_nan=True)
    assert ram_sum([first, torch.tensor([[-torch.inf]])[None, None]])[0, 0, 0].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_change_nothing(threads):
    inputs, weights = maps(5, 16, 32, 32, (1, 2, 4)), some_weights(5, 3)
    grad = torch.randn(5, 16, 32, 32)
    before = torch.get_num_threads()
    want = [ram_sum(inputs, weights), *gradients(ram_sum, inputs, weights, "bilinear", grad)]
    try:
        torch.set_num_threads(threads)
        got = [ram_sum(inputs, weights), *gradients(ram_sum, inputs, weights, "bilinear", grad)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# As an operator of torch ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _ext.isas(), reason="the native module is not installed")
@pytest.mark.parametrize("weighted", [True, False])
def test_registration(weighted):
    inputs = [x.requires_grad_() for x in maps(2, 3, 8, 8, (1, 2))]
    weights = some_weights(2, 2).requires_grad_() if weighted else None
    torch.library.opcheck(torch.ops.hrpose.ram_sum_fwd.default, (inputs, weights, [1, 2], False))
    torch.library.opcheck(torch.ops.hrpose.ram_sum_fwd.default, (inputs, weights, [1, 2], True))


def test_compiles_without_graph_break():
    def double(inputs, weights):
        return ram_sum(inputs, weights) * 2

    compiled = torch.compile(double, fullgraph=True, backend="eager", dynamic=True)
    for n in (1, 3):
        inputs, weights = maps(n, 3, 8, 8, (1, 2)), some_weights(n, 2)
        assert torch.equal(compiled(inputs, weights), double(inputs, weights))


def test_exports_to_plain_operators():
    class Module(torch.nn.Module):
        def forward(self, first, second):
            return ram_sum([first, second], None, "bilinear")

    inputs = maps(2, 3, 8, 8, (1, 2))
    exported = torch.export.export(Module(), tuple(inputs))
    assert not any("hrpose" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*inputs), ram_sum(inputs, None, "bilinear"))


# Misuse ---------------------------------------------------------------------------------------------------------------

ONE = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("inputs", "weights", "interpolation", "message"),
    [
        ([], None, "nearest", "inputs must be a list or tuple of at least one tensor, got none"),
        (ONE, None, "nearest", "inputs must be a list or tuple of at least one tensor, got Tensor"),
        ([ONE, 3], None, "nearest", r"inputs\[1\] must be a .*tensor.*, got int"),
        ([ONE.int()], None, "nearest", r"inputs\[0\] must be .*, got .*torch.int32"),
        ([ONE[0]], None, "nearest", r"inputs\[0\] must be \(N, C, H, W\) with C, H, W >= 1, got \(3, 4, 4\)"),
        ([ONE[:, :0]], None, "nearest", r"inputs\[0\] must be \(N, C, H, W\) with C, H, W >= 1, got \(2, 0, 4, 4\)"),
        ([ONE, ONE[:1]], None, "nearest", r"inputs\[1\] must have N = 2, C = 3 .*, got \(1, 3, 4, 4\)"),
        ([ONE, ONE[:, :2]], None, "nearest", r"inputs\[1\] must have N = 2, C = 3 .*, got \(2, 2, 4, 4\)"),
        ([ONE, ONE[..., :3, :3]], None, "nearest", r"inputs\[1\] must be smaller .* one whole factor .*, got 3 x 3"),
        ([ONE, ONE[..., :2, :4]], None, "nearest", r"inputs\[1\] must be smaller .* one whole factor .*, got 2 x 4"),
        ([ONE, ONE.to("meta")], None, "nearest", r"inputs\[1\] must be on cpu like inputs\[0\], got meta"),
        ([ONE], torch.ones(2, 2), "nearest", r"weights must be \(N, M\) = \(2, 1\).*, got \(2, 2\)"),
        ([ONE], torch.ones(2, 1).int(), "nearest", r"weights must be .*, got .*torch.int32"),
        ([ONE], torch.ones(2, 1, device="meta"), "nearest", "weights must be on cpu like inputs, got meta"),
        ([ONE], None, "area", "interpolation must be 'nearest' or 'bilinear', got 'area'"),
    ],
)
@pytest.mark.parametrize("op", [ram_sum, ram_sum_reference])
def test_wrong_arguments(op, inputs, weights, interpolation, message):
    with pytest.raises(InputError, match=f"^ram_sum: {message}"):
        op(inputs, weights, interpolation)


def fuzz(rng: np.random.Generator, calls: int) -> int:
    """Calls with whatever comes to mind: each gives what the reference gives, or an InputError. Returns the results."""
    dtypes, results = [torch.float32] * 4 + [torch.bfloat16, torch.float64, torch.int64], 0
    for _ in range(calls):
        n, c = int(rng.integers(0, 4)), int(rng.integers(0, 20))
        base, m = int(rng.integers(1, 5)), int(rng.integers(1, 11))
        factors = [1, *(int(f) for f in rng.choice([1, 2, 3, 4, 6, 12], m - 1))]
        rng.shuffle(factors)
        inputs = []
        for factor in factors:
            h, w = 12 * base // factor, 24 // factor + int(rng.random() < 0.01)
            x = torch.from_numpy(rng.standard_normal((n, c, h, w))).to(
                dtypes[rng.integers(0, 4 + 3 * (rng.random() < 0.1))]
            )
            x = x.contiguous(memory_format=torch.channels_last) if rng.random() < 0.5 else x
            inputs.append(x[:, :, :, ::2].repeat_interleave(2, 3)[..., :w] if rng.random() < 0.1 else x)
        weights = torch.from_numpy(rng.standard_normal((n, m))) if rng.random() < 0.6 else None
        interpolation = str(rng.choice(["nearest", "bilinear", "bicubic"], p=[0.5, 0.48, 0.02]))
        try:
            got = ram_sum(inputs, weights, interpolation)
        except InputError:
            continue
        want = ram_sum_reference(inputs, weights, interpolation)
        assert_near(got, want, TOLERANCE[want.dtype])
        results += 1
    return results


def test_fuzz(isa, rng):
    assert fuzz(rng, 300) > 150


@pytest.mark.slow
def test_fuzz_long(isa, rng):
    assert fuzz(rng, 10_000) > 5000
