"""csrc/cuda/ram_sum.cu, emulated, against the reference and its gradients."""

import math

import pytest
import torch

from hrpose.ops import ram_sum_reference

SHIM = """
using namespace hrpose::cuda;
extern "C" const char *forward(const void *const *inputs, const int64_t *factors, const float *weights, void *out,
                               int64_t n, int64_t h, int64_t w, int64_t c, int64_t share, int64_t m, int64_t bilinear,
                               int64_t type) {
  RamSumArgs args = {{},     {},         weights, out,           int(n),    int(h), int(w),
                     int(c), int(share), int(m),  bilinear != 0, Type(type)};
  for (int t = 0; t < m; ++t)
    args.inputs[t] = inputs[t], args.factors[t] = int(factors[t]);
  return ram_sum_fwd(args, nullptr);
}
extern "C" const char *backward(const void *grad, const void *out, const void *const *inputs, const int64_t *factors,
                                const float *weights, void *const *grads, float *products, int64_t parts, int64_t n,
                                int64_t h, int64_t w, int64_t c, int64_t share, int64_t m, int64_t bilinear,
                                int64_t type) {
  RamSumGradArgs args = {grad,   out,    {},     {},         weights, {},            products, int(parts), int(n),
                         int(h), int(w), int(c), int(share), int(m),  bilinear != 0, Type(type)};
  for (int t = 0; t < m; ++t) {
    args.inputs[t] = weights ? inputs[t] : nullptr;
    args.factors[t] = int(factors[t]), args.grads[t] = grads[t];
  }
  return ram_sum_bwd(args, nullptr);
}
"""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative error of one rounding
# N, C, H, W and the factors of the inputs: HRNet's, single pixels, odd sizes, more terms than are read at once
CASES = [
    (2, 16, 16, 8, (1, 2, 4, 8)),
    (1, 1, 1, 1, (1,)),
    (2, 7, 6, 12, (1, 2, 3)),
    (3, 8, 8, 16, (2, 1, 8, 4)),
    (1, 24, 10, 5, (1, 5)),
    (1, 5, 24, 12, (1, 1, 2, 3, 4, 6, 2, 12)),
    (1, 72, 4, 260, (1, 2)),
]
MUTANTS = {
    "no barrier": ("  __syncthreads();\n", ""),
    "half a warp": ("int step = 16;", "int step = 8;"),
    "left border": ("max(x * f - (f + 1) / 2, 0)", "max(x * f - f / 2 + 1, 0)"),
    "lower border": ("min((y + 1) * f + f / 2, a.h)", "min((y + 1) * f + f / 2 - 1, a.h)"),
    "the next pixel": ("min(first + 1, size - 1)", "min(first + 1, size)"),
    "terms left over": ("begin < a.m; begin += kAhead", "begin < a.m - 1; begin += kAhead"),
    "mask": ("out[i] <= 0 ?", "out[i] < 0 ?"),
    "ReLU": ("sum[i] < 0 ? 0", "sum[i] < -1 ? 0"),
    "weights of the first sample": ("a.weights[sample * a.m + t]", "a.weights[t]"),
    "parts": ("item += a.parts * kThreads", "item += items"),
    "no power of two": ("1 << shift == factor ? shift : -1", "shift"),
    "column": ("col >= a.w * chunks", "col > a.w * chunks"),
    "row": ("row >= a.n * a.h ||", "row >= a.n * a.h - 1 ||"),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def images(x):
    """n, h, w, c of what the kernel takes for images."""
    n, c, h, w = x.shape
    return (n * c, h, w, 1) if x.is_contiguous() else (n, h, w, c)


def forward(kernel, fenced, inputs, weights, factors, bilinear):
    full = inputs[factors.index(1)]
    out = fenced(torch.full_like(full, math.nan), 7.5)
    n, h, w, c = images(full)
    numbers = (n, h, w, c, full.shape[1] // c, len(inputs), bilinear, TYPES[full.dtype])
    kernel("forward", inputs, factors, weights, out, *numbers)
    check_fence(out)
    return out


def backward(kernel, fenced, grad, out, inputs, weights, factors, bilinear, parts):
    """Gradients of the inputs, and of the weights if there are any."""
    n, h, w, c = images(out)
    grads = [fenced(torch.full_like(x, math.nan), 7.5) for x in inputs]
    products = torch.full((out.shape[0], len(inputs), parts), math.nan)
    numbers = (parts, n, h, w, c, out.shape[1] // c, len(inputs), bilinear, TYPES[out.dtype])
    kernel("backward", grad, out, inputs, factors, weights, grads, products, *numbers)
    for one in grads:
        check_fence(one)
    return [*grads, products.sum(2)] if weights is not None else grads


def check_fence(tensor):
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    assert (storage == 7.5).sum() == len(storage) - tensor.numel() + (tensor == 7.5).sum()


def close(got, want, dtype, steps):
    """Within `steps` roundings of values as great as the greatest, NaN where NaN is."""
    limit = steps * UNIT[dtype] * max(1.0, want.nan_to_num().abs().max().item())
    return torch.allclose(got.float(), want.float(), rtol=0, atol=limit, equal_nan=True)


def differences(kernel, rng, fenced):
    """Calls that do not give what the reference gives."""
    wrong = []
    for shift, case in enumerate(CASES):
        n, c, h, w, factors = case
        for index, (dtype, layout) in enumerate((d, form) for d in TYPES for form in LAYOUTS):
            weights = torch.from_numpy(rng.normal(size=(n, len(factors)))).float() if (index + shift) % 3 else None
            inputs = [torch.from_numpy(rng.normal(size=(n, c, h // f, w // f))) for f in factors]
            inputs = [fenced(x.to(dtype).contiguous(memory_format=layout), math.nan) for x in inputs]
            for bilinear in (False, True):
                mode = "bilinear" if bilinear else "nearest"
                leaves = [x.detach().clone().requires_grad_() for x in inputs]
                scales = None if weights is None else weights.clone().requires_grad_()
                want = ram_sum_reference(leaves, scales, mode)
                out = forward(kernel, fenced, inputs, weights, factors, bilinear)
                exact = dtype == torch.float32 and not bilinear
                if not (torch.equal(out, want) if exact else close(out, want, dtype, 8)):
                    wrong.append((case, dtype, layout, mode, "forward"))
                grad = fenced(
                    torch.from_numpy(rng.normal(size=want.shape)).to(dtype).contiguous(memory_format=layout), 0
                )
                wanted = torch.autograd.grad(want, [*leaves, *([] if scales is None else [scales])], grad)
                got = backward(kernel, fenced, grad, want.detach(), inputs, weights, factors, bilinear, 1 + index % 2)
                for t, (a, b) in enumerate(zip(got, wanted, strict=True)):
                    steps = 8 if t < len(factors) else 8 * math.sqrt(h * w * c)
                    if not close(a, b, dtype, steps):
                        wrong.append((case, dtype, layout, mode, f"gradient {t}"))
    return wrong


def test_equals_the_reference(emulate, rng, fenced, schedule):
    kernel = emulate("ram_sum.cu", SHIM)
    kernel.configure(schedule)
    assert differences(kernel, rng, fenced) == []


def test_nan_is_loud_and_infinity_is_not(emulate, fenced):
    kernel, factors = emulate("ram_sum.cu", SHIM), (1, 2)
    inputs = [torch.ones(1, 8, 4, 4), torch.ones(1, 8, 2, 2)]
    inputs[0][0, 0, 0, 0], inputs[1][0, 1, 1, 1], inputs[0][0, 2, 3, 0] = math.nan, math.inf, -math.inf
    for layout in LAYOUTS:
        maps = [x.contiguous(memory_format=layout) for x in inputs]
        out = forward(kernel, fenced, maps, None, factors, False)
        assert out.isnan().nonzero().tolist() == [[0, 0, 0, 0]]
        assert (out == math.inf).nonzero().tolist() == [[0, 1, y, x] for y in (2, 3) for x in (2, 3)]
        assert (out == 0).nonzero().tolist() == [[0, 2, 3, 0]]
        ones = torch.ones_like(out)
        fine, coarse = backward(kernel, fenced, ones, out, maps, None, factors, False, 1)
        assert torch.equal(fine, (out != 0).float()) and coarse[0, 2].tolist() == [[4, 4], [3, 4]]
        assert coarse.sum() == 8 * 16 - 1


def test_tensors_that_do_not_start_on_16_bytes(emulate, rng, fenced):
    kernel = emulate("ram_sum.cu", SHIM)
    storage = torch.from_numpy(rng.normal(size=2 * 8 * 16 + 1)).float()
    x = storage[1:].view(2, 4, 4, 8).permute(0, 3, 1, 2)
    assert x.data_ptr() % 16
    out = forward(kernel, fenced, [x], None, (1,), False)
    assert torch.equal(out, x.relu())
    assert torch.equal(backward(kernel, fenced, x, out, [x], None, (1,), False, 3)[0], x.relu())
    empty = x[:0]
    forward(kernel, fenced, [empty], None, (1,), False)  # no launch: a grid of no blocks would be an error
    backward(kernel, fenced, empty, empty, [empty], None, (1,), False, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(emulate, emulation_error, rng, fenced, name):
    kernel, found = emulate("ram_sum.cu", SHIM, [MUTANTS[name]]), 0
    for schedule in ("forward", "reverse", "shuffled"):
        kernel.configure(schedule)
        try:
            found += bool(differences(kernel, rng, fenced))
        except (emulation_error, AssertionError):
            found += 1
    assert found
