"""ram_sum: kernel against reference, reference against a loop written from the definition."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from hrpose.errors import InputError
from hrpose.ops import _ext, ram_sum, ram_sum_reference

pytestmark = pytest.mark.usefixtures("fenced_workspace")

# N, C, H, W and the factors of the inputs. The first three are HRNet's outputs 0, 1 and 2.
CASES = [
    (1, 32, 16, 24, (1, 2, 4, 8)),
    (2, 18, 8, 12, (1, 1, 2, 4)),
    (1, 48, 8, 6, (1, 1, 1, 2)),
    (2, 16, 4, 8, (1, 2)),
    (1, 1, 1, 1, (1,)),
    (2, 7, 6, 12, (1, 2, 3)),
    (3, 18, 16, 8, (2, 1, 8, 4)),
    (1, 17, 3, 5, (1, 1, 1, 1)),
    (1, 3, 8, 8, (8, 1, 8)),
    (1, 2, 82, 41, (1, 41)),  # torch's "nearest" takes wrong pixels here
    (1, 5, 24, 48, (1, 1, 2, 3, 4, 6, 8, 12)),
    (1, 600, 4, 2, (1, 2)),
    (2, 16, 4, 8, (1, 2, 2, 1, 2, 4, 1, 2, 2)),  # too many for the kernel
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
MODES = ["nearest", "bilinear"]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # relative error of one rounding


def naive(inputs, weights, interpolation):
    """One output pixel at a time, in double."""
    n_, c_ = inputs[0].shape[:2]
    h_, w_ = max(x.shape[2] for x in inputs), max(x.shape[3] for x in inputs)
    out = np.zeros((n_, c_, h_, w_))
    for y, x in itertools.product(range(h_), range(w_)):
        for m, map_ in enumerate(inputs):
            h, w = map_.shape[2:]
            if interpolation == "nearest":
                value = map_[:, :, y // (h_ // h), x // (w_ // w)]
            else:
                sy, sx = max((y + 0.5) * h / h_ - 0.5, 0), max((x + 0.5) * w / w_ - 0.5, 0)
                y0, x0 = math.floor(sy), math.floor(sx)
                y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
                top = (1 - (sx - x0)) * map_[:, :, y0, x0] + (sx - x0) * map_[:, :, y0, x1]
                bottom = (1 - (sx - x0)) * map_[:, :, y1, x0] + (sx - x0) * map_[:, :, y1, x1]
                value = (1 - (sy - y0)) * top + (sy - y0) * bottom
            out[:, :, y, x] += value * (1 if weights is None else weights[:, m, None])
    return np.maximum(out, 0)


def random_inputs(rng, case, layout=torch.contiguous_format, dtype=torch.float32):
    n, c, h, w, factors = case
    maps = [torch.from_numpy(rng.normal(size=(n, c, h // f, w // f))) for f in factors]
    return [x.to(dtype).contiguous(memory_format=layout) for x in maps]


def random_weights(rng, case):
    return torch.from_numpy(rng.normal(size=(case[0], len(case[4])))).float()


def double(tensors):
    return [None if t is None else t.detach().double() for t in tensors]


def assert_same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7e30), want.nan_to_num(7e30))


def assert_near(got, want, scale, roundings):
    """Rounded once to its dtype, from a sum in float32 with so many roundings of terms whose absolute values add up to
    `scale`."""
    bound = UNIT[got.dtype] * want.abs() + roundings * UNIT[torch.float32] * scale.abs() + 1e-30
    worst = ((got.double() - want) / bound).abs().max() if got.numel() else 0
    assert worst <= 1, f"{worst:.3g} times the bound"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_loop(rng, case, mode):
    inputs, weights = random_inputs(rng, case, dtype=torch.float64), random_weights(rng, case).double()
    for w in (None, weights):
        want = naive([x.numpy() for x in inputs], None if w is None else w.numpy(), mode)
        np.testing.assert_allclose(ram_sum_reference(inputs, w, mode).numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_reference(isa, rng, case, layout, dtype):
    inputs, weights = random_inputs(rng, case, layout, dtype), random_weights(rng, case)
    for w in (None, weights):
        got = ram_sum(inputs, w)
        assert_same(got, ram_sum_reference(inputs, w))
        assert got.is_contiguous(memory_format=layout) or isa is None

        got = ram_sum(inputs, w, "bilinear")
        want = ram_sum_reference(double(inputs), double([w])[0], "bilinear")
        magnitude = [x.abs() for x in double(inputs)]
        scale = ram_sum_reference(magnitude, None if w is None else w.double().abs(), "bilinear")
        assert_near(got, want, scale, 4 + len(inputs))
        assert got.dtype == dtype and (got.is_contiguous(memory_format=layout) or isa is None)


def kinkless(rng, case, layout, dtype):
    """Inputs of one sign per sample and channel: no output is so near to 0 that rounding opens or closes a ReLU."""
    n, c, _, _, _ = case
    sign = torch.from_numpy(rng.choice([-1.0, 1.0], (n, c, 1, 1)))
    return [
        ((x.double().abs() + 0.1) * sign).to(dtype).contiguous(memory_format=layout) for x in random_inputs(rng, case)
    ]


def gradients(function, inputs, weights, mode, grad):
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    w = None if weights is None else weights.clone().requires_grad_()
    return torch.autograd.grad(function(leaves, w, mode), [*leaves] if w is None else [*leaves, w], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_those_of_the_reference(isa, rng, case, layout, dtype):
    n, c, h, w, factors = case
    inputs, weights = kinkless(rng, case, layout, dtype), random_weights(rng, case).abs() + 0.1
    grad = torch.from_numpy(rng.normal(size=(n, c, h, w))).to(dtype)
    for mode, weight in itertools.product(MODES, (None, weights)):
        got = gradients(ram_sum, inputs, weight, mode, grad)
        exact = (double(inputs), double([weight])[0], mode)
        want, scale = (gradients(ram_sum_reference, *exact, g) for g in (grad.double(), grad.double().abs()))
        for i, (a, b, size) in enumerate(zip(got, want, scale, strict=True)):
            if i < len(inputs):
                assert a.dtype == dtype and (a.is_contiguous(memory_format=layout) or isa is None)
                # Rows, then columns of up to 2 f values are summed. PyTorch's own bilinear weights are off where f is
                # no power of 2: see `_resample`.
                assert_near(a, b, size, 4 + 2 * factors[i] if isa else 100)
            else:
                assert a.dtype == torch.float32
                assert_near(a, b, size, 32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [*UNIT, torch.float16], ids=str)
def test_devices_agree(device, rng, layout, dtype, mode):
    """Within eight roundings of the greatest value, in sums of f * f values f times as much."""
    unit = torch.finfo(dtype).eps / 2
    for case in CASES:
        weights = torch.from_numpy(rng.normal(size=(case[0], len(case[4])))).float()
        there = [x.to(device).requires_grad_() for x in random_inputs(rng, case, layout, dtype)]
        here = [x.detach().cpu().requires_grad_() for x in there]
        scales = [weights.to(device, copy=True).requires_grad_(), weights.clone().requires_grad_()]
        got, want = ram_sum(there, scales[0], mode), ram_sum_reference(here, scales[1], mode)
        grad = torch.from_numpy(rng.normal(size=want.shape)).to(dtype)
        got.backward(grad.to(device))
        want.backward(grad)
        values = math.sqrt(want[0].numel())
        pairs = [(got, want, 8), *[(a.grad, b.grad, 8 * f) for a, b, f in zip(there, here, case[4], strict=True)]]
        for a, b, steps in (*pairs, (scales[0].grad, scales[1].grad, 8 * values)):
            assert a.device.type == device
            limit = steps * unit * max(1, b.detach().abs().max().item())
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=limit)


def test_gradients_by_hand(isa):
    """y = relu(2 a + 3 up(b)) with a = (1, -9; 1, 1), b = 1: open everywhere but at the -9."""
    a = torch.tensor([[[[1.0, -9], [1, 1]]]], requires_grad=True)
    b = torch.ones(1, 1, 1, 1, requires_grad=True)
    weights = torch.tensor([[2.0, 3.0]], requires_grad=True)
    for mode in MODES:
        y = ram_sum([a, b], weights, mode)
        assert y.tolist() == [[[[5, 0], [5, 5]]]]
        for_a, for_b, for_weights = torch.autograd.grad(y, (a, b, weights), torch.tensor([[[[1.0, 10], [100, 1000]]]]))
        assert for_a.tolist() == [[[[2, 0], [200, 2000]]]]
        assert for_b.tolist() == [[[[3 * 1101]]]]
        assert for_weights.tolist() == [[1101, 1101]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_reference_gradcheck(rng, mode, weighted):
    case = (2, 2, 6, 6, (1, 2, 3))
    inputs = [x.requires_grad_() for x in kinkless(rng, case, torch.contiguous_format, torch.float64)]
    weights = (random_weights(rng, case).double().abs() + 0.5).requires_grad_() if weighted else None

    def function(*tensors):
        return ram_sum_reference(tensors[:3], tensors[3] if weighted else None, mode)

    tensors = (*inputs, weights) if weighted else tuple(inputs)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_second_derivative(rng, mode, weighted):
    """Of a loss whose gradient depends on everything; in float64 it is the reference's, from autograd."""
    case = (2, 3, 6, 12, (1, 3, 2))
    inputs = kinkless(rng, case, torch.contiguous_format, torch.float32)
    weights = random_weights(rng, case).abs() + 0.5 if weighted else None

    def second(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        w = weights.to(dtype).requires_grad_() if weighted else None
        both = [*leaves, w] if weighted else leaves
        first = torch.autograd.grad((ram_sum(leaves, w, mode) ** 3).sum(), both, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), both)

    for got, want in zip(second(torch.float32), second(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_of_functions(rng):
    case = (2, 3, 8, 16, (1, 4, 2))
    inputs, weights = kinkless(rng, case, torch.contiguous_format, torch.float32), random_weights(rng, case).abs()

    def loss(function, inputs, weights):
        return (function(inputs, weights) ** 2).sum()

    for a, b in zip(
        torch.func.grad(lambda *leaves: loss(ram_sum, leaves[:3], leaves[3]), (0, 1, 2, 3))(*inputs, weights),
        torch.func.grad(lambda *leaves: loss(ram_sum_reference, leaves[:3], leaves[3]), (0, 1, 2, 3))(*inputs, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    stacked = torch.vmap(lambda *leaves: ram_sum(leaves, weights))(*(torch.stack([x, 2 * x]) for x in inputs))
    torch.testing.assert_close(stacked[1], 2 * ram_sum(inputs, weights))
    # Forward mode: y is linear in the inputs where it is not 0, so its directional derivative along them is y itself.
    y, along = torch.func.jvp(lambda *leaves: ram_sum(leaves, weights), tuple(inputs), tuple(inputs))
    torch.testing.assert_close(along, y)
    with torch.autograd.forward_ad.dual_level():
        dual = ram_sum([torch.autograd.forward_ad.make_dual(x, x) for x in inputs], weights)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, y)
    assert y.max() > 0


@pytest.mark.parametrize("mode", MODES)
def test_resampling_keeps_the_mean(rng, mode):
    """What lets attention pool its maps before they are resampled."""
    for factor in (1, 2, 3, 4, 8):
        x = torch.from_numpy(rng.random((2, 3, 5, 7)))  # not negative, so that the ReLU does nothing
        y = ram_sum([torch.zeros(2, 3, 5 * factor, 7 * factor, dtype=torch.float64), x], None, mode)
        torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_weights_of_one_change_nothing(isa, rng, layout):
    for case, mode in itertools.product(CASES, MODES):
        inputs = random_inputs(rng, case, layout)
        assert_same(ram_sum(inputs, torch.ones(case[0], len(case[4])), mode), ram_sum(inputs, None, mode))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(isa, rng, monkeypatch, threads):
    for case, layout, mode in itertools.product((CASES[1], CASES[6], CASES[7]), LAYOUTS, MODES):
        inputs, weights = random_inputs(rng, case, layout), random_weights(rng, case)
        grad = torch.ones(case[:4])
        with monkeypatch.context() as patch:
            want = ram_sum(inputs, weights, mode), *gradients(ram_sum, inputs, weights, mode, grad)
            patch.setattr(sys.modules[ram_sum.__module__], "PARALLEL_ABOVE", 0)
            patch.setattr(torch, "get_num_threads", lambda: threads)
            got = ram_sum(inputs, weights, mode), *gradients(ram_sum, inputs, weights, mode, grad)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [2, 16, 19])
def test_nan_is_loud_and_infinity_is_not(isa, channels, layout, mode):
    """Like relu, where NaN stays NaN, and like interpolate, where a weight of 0 times infinity is one."""
    for where, value in itertools.product(range(3), (math.nan, math.inf, -math.inf)):
        inputs = [torch.ones(1, channels, 8 // f, 8 // f).contiguous(memory_format=layout) for f in (1, 2, 4)]
        inputs[where][0, 1, 1, 1] = value
        got, want = ram_sum(inputs, None, mode), ram_sum_reference(inputs, None, mode)
        assert_same(got, want)
        assert math.isnan(value) == got[0, 1].isnan().any() or mode == "bilinear"
        assert got[0, 0].isfinite().all() and (got[0, 0] == 3).all()
    inputs[0][0, 1, 1, 1], inputs[2][:] = math.inf, -math.inf
    assert ram_sum(inputs, None, mode)[0, 1, 1, 1].isnan()
    leaf = torch.full((1, channels, 2, 2), math.nan).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.grad(ram_sum([leaf]).sum(), leaf)[0].eq(1).all()


def test_strides_and_memory_formats(isa, rng):
    case = (2, 18, 8, 16, (1, 2, 4))
    inputs, weights = random_inputs(rng, case), random_weights(rng, case)
    for mode in MODES:
        want = ram_sum(inputs, weights, mode)
        other = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        for first, second, third in itertools.product(*zip(inputs, other, strict=True)):
            got = ram_sum([first, second, third], weights, mode)
            assert_same(got, want)
            assert got.stride() == first.stride()
        wide = torch.full((2, 40, 8, 40), math.nan)
        wide[:, 1:37:2, :, 3:35:2] = inputs[0]
        pixels = torch.full((2, 40, 8, 16), math.nan).contiguous(memory_format=torch.channels_last)
        pixels[:, 7:25] = inputs[0]
        turned = inputs[0].transpose(2, 3).contiguous().transpose(2, 3)
        for x in (wide[:, 1:37:2, :, 3:35:2], pixels[:, 7:25], turned):
            assert not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
            assert_same(ram_sum([x, *inputs[1:]], weights.t().contiguous().t(), mode), want)
        assert ram_sum([pixels[:, 7:25], *inputs[1:]], weights, mode).is_contiguous(memory_format=torch.channels_last)

        one = [x[:1, :, :1, :1].expand_as(x) for x in inputs]
        assert_same(ram_sum(one, weights, mode), ram_sum([x.contiguous() for x in one], weights, mode))
        grad = torch.ones(1, 1, 1, 1).expand(2, 18, 8, 16)
        for a, b in zip(
            gradients(ram_sum, inputs, weights, mode, grad),
            gradients(ram_sum, inputs, weights, mode, grad.contiguous()),
            strict=True,
        ):
            assert_same(a, b)


def test_dtypes(isa, rng):
    case = (2, 5, 4, 8, (1, 2))
    a, b = random_inputs(rng, case)
    weights = random_weights(rng, case)
    for mode in MODES:
        want = ram_sum_reference([a.double(), b.double()], weights.double(), mode)
        assert ram_sum([a.double(), b.double()], weights.half(), mode).dtype == torch.float64
        torch.testing.assert_close(ram_sum([a, b.double()], weights, mode), want, rtol=1e-12, atol=1e-12)
        assert_same(ram_sum([a, b.bfloat16()], weights, mode), ram_sum([a, b.bfloat16().float()], weights, mode))
        mixed = ram_sum([a.half(), b.bfloat16()], weights, mode)
        assert_same(mixed, ram_sum([a.half().float(), b.bfloat16().float()], weights, mode))
        assert_same(ram_sum([a, b], weights.bfloat16(), mode), ram_sum([a, b], weights.bfloat16().float(), mode))
        half = ram_sum([a.half(), b.half()], weights, mode)
        assert_same(half, ram_sum_reference([a.half().float(), b.half().float()], weights, mode).half())
    # 1 + 2^-9 + 2^-9 in float32 is 1 + 2^-8, half way: to even. Rounded twice it would be 1 as well; three times 2^-9
    # tells them apart.
    terms = [torch.full((1, 1, 1, 1), v, dtype=torch.bfloat16) for v in (1, 2.0**-9, 2.0**-9, 2.0**-9)]
    assert ram_sum(terms).item() == 1 + 2.0**-7


def test_autocast_changes_nothing(rng):
    inputs, weights = random_inputs(rng, CASES[0]), random_weights(rng, CASES[0])
    for mode, function in itertools.product(MODES, (ram_sum, ram_sum_reference)):
        want = function(inputs, weights, mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(function(inputs, weights, mode), want)


def test_empty_batch(isa):
    for layout, mode in itertools.product(LAYOUTS, MODES):
        inputs = [torch.zeros(0, 3, 8 // f, 4 // f).contiguous(memory_format=layout) for f in (1, 2)]
        weights = torch.zeros(0, 2)
        assert ram_sum(inputs, weights, mode).shape == ram_sum_reference(inputs, weights, mode).shape == (0, 3, 8, 4)
        got = gradients(ram_sum, inputs, weights, mode, torch.zeros(0, 3, 8, 4))
        assert [g.shape for g in got] == [(0, 3, 8, 4), (0, 3, 4, 2), (0, 2)]


@pytest.mark.skipif(_ext.native() is None, reason="the reference saves what autograd wants")
def test_saves_for_the_gradient_what_it_needs(rng):
    inputs = [x.requires_grad_() for x in random_inputs(rng, CASES[0])]
    weights = random_weights(rng, CASES[0]).requires_grad_()

    def saved(w):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            ram_sum(inputs, w)
        return sorted(shapes)

    assert saved(None) == [(1, 32, 16, 24)]
    assert saved(weights) == sorted([(1, 32, 16, 24), (1, 4), *(tuple(x.shape) for x in inputs)])


def test_not_all_need_gradients(isa, rng):
    inputs, weights = random_inputs(rng, CASES[0]), random_weights(rng, CASES[0])
    want = gradients(ram_sum, inputs, weights, "nearest", torch.ones(CASES[0][:4]))
    inputs[2].requires_grad_()
    assert_same(torch.autograd.grad(ram_sum(inputs, weights).sum(), inputs[2])[0], want[2])
    weights.requires_grad_()
    ram_sum([x.detach() for x in inputs], weights).sum().backward()
    assert_same(weights.grad, want[4])


A, B = torch.zeros(2, 3, 8, 4), torch.zeros(2, 3, 4, 2)
ERRORS = [
    ({"inputs": []}, "inputs must be a list or tuple of at least one tensor, got none"),
    ({"inputs": A}, "inputs must be a list or tuple of at least one tensor, got Tensor"),
    ({"inputs": None}, "got NoneType"),
    ({"inputs": [A, B.numpy()]}, r"inputs\[1\] must be a dense tensor of float32, .* or float16, got ndarray"),
    ({"inputs": [A.to_sparse(), B]}, r"inputs\[0\] must be a dense tensor .*, got torch.sparse_coo"),
    ({"inputs": [A, B.int()]}, r"inputs\[1\] must be a dense tensor of float32, .*, got torch.int32"),
    ({"inputs": [A, B.to(torch.complex64)]}, "got torch.complex64"),
    ({"inputs": [A[0], B]}, r"inputs\[0\] must be \(N, C, H, W\) with C, H, W >= 1, got \(3, 8, 4\)"),
    ({"inputs": [A[:, :0], B[:, :0]]}, r"C, H, W >= 1, got \(2, 0, 8, 4\)"),
    ({"inputs": [A, B[..., :0]]}, r"inputs\[1\] must be .* C, H, W >= 1, got \(2, 3, 4, 0\)"),
    ({"inputs": [A, B[:1]]}, r"inputs\[1\] must have N = 2, C = 3 like inputs\[0\], got \(1, 3, 4, 2\)"),
    ({"inputs": [A, B[:, :2]]}, r"inputs\[1\] must have N = 2, C = 3 like inputs\[0\], got \(2, 2, 4, 2\)"),
    ({"inputs": [A, B[:, :, :3]]}, r"inputs\[1\] must be smaller than 8 x 4, .* by one whole factor .*, got 3 x 2"),
    ({"inputs": [A, B[..., :1]]}, r"inputs\[1\] must be smaller than 8 x 4, .* in both directions, got 4 x 1"),
    ({"inputs": [A, A.transpose(2, 3)]}, r"inputs\[0\] must be smaller than 8 x 8, .*, got 8 x 4"),
    ({"inputs": [A, B.to("meta")]}, r"inputs\[1\] must be on cpu like inputs\[0\], got meta"),
    ({"weights": [1.0, 1.0]}, "weights must be a dense tensor of float32, .*, got list"),
    ({"weights": torch.ones(2, 2).int()}, "weights must be a dense tensor of float32, .*, got torch.int32"),
    ({"weights": torch.ones(2)}, r"weights must be \(N, M\) = \(2, 2\), one per sample and input, got \(2,\)"),
    ({"weights": torch.ones(2, 3)}, r"weights must be \(N, M\) = \(2, 2\), .*, got \(2, 3\)"),
    ({"weights": torch.ones(1, 2)}, r"weights must be \(N, M\) = \(2, 2\), .*, got \(1, 2\)"),
    ({"weights": torch.ones(2, 2, device="meta")}, "weights must be on cpu like inputs, got meta"),
    ({"interpolation": "bicubic"}, "interpolation must be 'nearest' or 'bilinear', got 'bicubic'"),
    ({"interpolation": None}, "interpolation must be 'nearest' or 'bilinear', got None"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
@pytest.mark.parametrize("function", [ram_sum, ram_sum_reference])
def test_mistakes_are_named(function, change, message):
    with pytest.raises(InputError, match=f"^ram_sum: .*{message}"):
        function(**({"inputs": [A, B]} | change))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_registration(rng, layout, weighted):
    case = (2, 3, 8, 4, (2, 1, 4))
    inputs, weights = random_inputs(rng, case, layout), random_weights(rng, case) if weighted else None
    torch.library.opcheck(torch.ops.hrpose.ram_sum_fwd.default, (inputs, weights, [2, 1, 4], weighted))
    out = ram_sum(inputs, weights)
    arguments = (torch.ones_like(out), out, inputs if weighted else [], weights, [2, 1, 4], weighted)
    torch.library.opcheck(torch.ops.hrpose.ram_sum_bwd.default, arguments)


@pytest.mark.skipif(_ext.native() is None, reason="without the native module the op runs the reference anyway")
def test_ops_without_the_native_module(rng, monkeypatch):
    """A graph that torch.compile made, run where there is no kernel."""
    case = CASES[1]
    for layout, bilinear, weighted in itertools.product(LAYOUTS, (False, True), (False, True)):
        inputs = kinkless(rng, case, layout, torch.float32)
        weights = random_weights(rng, case).abs() if weighted else None
        factors = list(case[4])

        def both(inputs=inputs, weights=weights, factors=factors, bilinear=bilinear):
            out = torch.ops.hrpose.ram_sum_fwd(inputs, weights, factors, bilinear)
            return out, *torch.ops.hrpose.ram_sum_bwd(torch.ones_like(out), out, inputs, weights, factors, bilinear)

        want = both()
        with monkeypatch.context() as patch:
            patch.setattr(_ext, "usable", lambda *tensors, **options: False)
            got = both()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
            assert a.stride() == b.stride()


def test_compile(rng):
    case = (5, 4, 8, 4, (1, 2, 4))
    inputs, weights = random_inputs(rng, case, torch.channels_last), random_weights(rng, case)
    graphs = []

    def backend(graph, example):
        graphs.append(graph.code)
        return graph

    def twice(inputs, weights, mode):
        return ram_sum([x * 2 for x in inputs], weights.sigmoid(), mode) + ram_sum(inputs, None, mode)

    for mode in MODES:
        compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend=backend)
        for n in (5, 2, 1):
            arguments = [x[:n].clone() for x in inputs], weights[:n].clone(), mode  # views would be guarded as views
            torch.testing.assert_close(compiled(*arguments), twice(*arguments))
        assert all("hrpose.ram_sum_fwd" in code for code in graphs) == (_ext.native() is not None)
        assert len(graphs) <= 2  # one for N > 1, one for N = 1
        graphs.clear()

        compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
        grad = torch.ones(case[:4])
        for a, b in zip(
            gradients(compiled, inputs, weights, mode, grad), gradients(twice, inputs, weights, mode, grad), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_export_holds_no_op_of_ours(rng):
    case = (2, 3, 8, 4, (1, 2, 4))
    inputs, weights = random_inputs(rng, case), random_weights(rng, case)
    for mode, strict in itertools.product(MODES, (False, True)):

        class Module(torch.nn.Module):
            def forward(self, a, b, c, weights, mode=mode):
                return ram_sum([a, b, c], weights, mode)

        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(Module(), (*inputs, weights), dynamic_shapes=[{0: batch}] * 4, strict=strict)
        assert not [node for node in exported.graph.nodes if "hrpose" in str(node.target)]
        assert_same(exported.module()(*inputs, weights), ram_sum_reference(inputs, weights, mode))
        three = [torch.cat((t, t[:1])) for t in (*inputs, weights)]
        assert_same(exported.module()(*three), ram_sum_reference(three[:3], three[3], mode))
        traced = torch.jit.trace(Module(), (*inputs, weights))
        assert not [node for node in traced.inlined_graph.nodes() if "hrpose" in node.kind()]
        assert_same(traced(*three), ram_sum_reference(three[:3], three[3], mode))


def test_other_devices_take_the_reference():
    y = ram_sum([torch.zeros(2, 3, 8, 4, device="meta"), torch.zeros(2, 3, 2, 1, device="meta")])
    assert y.shape == (2, 3, 8, 4) and y.device.type == "meta"


def fuzz(rng, calls: int) -> int:
    """Random calls, many of them wrong; counts results. Anything but a result or an InputError fails the test."""
    results = 0
    dtypes = [torch.float32] * 8 + [torch.bfloat16] * 4 + [torch.float64, torch.float16, torch.int64, torch.complex64]

    def tensor(shape, dtype):
        value = torch.from_numpy(rng.normal(size=shape)).to(dtype)
        if value.is_floating_point() and rng.random() < 0.2 and value.numel():
            value.view(-1)[rng.integers(value.numel())] = (math.nan, math.inf, -math.inf)[rng.integers(3)]
        kind = rng.integers(10)
        if kind < 4 and value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        elif kind == 4 and value.ndim > 1:
            value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif kind == 5 and value.ndim > 1:
            value = value[:1].expand_as(value)
        elif kind == 6 and rng.random() < 0.1:
            value = value.to("meta")
        return value.requires_grad_() if value.is_floating_point() and rng.random() < 0.5 else value

    def maybe(value, wrong):
        return value if rng.random() < 0.97 else wrong

    for _ in range(calls):
        n, c, h, w = (int(v) for v in rng.integers(0 if rng.random() < 0.1 else 1, (4, 20, 4, 4)))
        factors = [int(v) for v in rng.choice([1, 1, 2, 3, 4, 8], rng.integers(1, 6))]
        whole = math.lcm(*factors)
        dtype = dtypes[rng.integers(len(dtypes))]
        inputs = [
            tensor((n, maybe(c, c + 1), h * whole // f, maybe(w * whole // f, 3)), maybe(dtype, torch.float32))
            for f in factors
        ]
        weights = tensor((maybe(n, 2), maybe(len(inputs), 3)), torch.float32) if rng.random() < 0.6 else None
        mode = maybe(MODES[rng.integers(2)], "area")
        try:
            y = ram_sum(maybe(inputs, inputs[0]), weights, mode)
        except InputError:
            continue
        if mode == "nearest" and y.device.type == "cpu":
            assert_same(y, ram_sum_reference(inputs, weights))
        if y.requires_grad:
            y.sum().backward()
        results += 1
    return results


def test_fuzz(isa, rng):
    assert fuzz(rng, 350) > 150


@pytest.mark.slow
def test_fuzz_long(isa, rng):
    assert fuzz(rng, 10_000) > 5000
