"""csrc/cuda/crop.cu, emulated, against the reference."""

import math

import pytest
import torch

from hrpose.ops import crop_reference
from hrpose.ops._ext import CUDA_TYPES

SHIM = """
extern "C" const char *crop(const uint8_t *image, const double *transforms, void *out, bool *bad, int64_t image_h,
                            int64_t image_w, int64_t n, int64_t h, int64_t w, double s0, double s1, double s2,
                            double b0, double b1, double b2, int64_t opencv4, int64_t mirror, int64_t channels_last,
                            int64_t type) {
  return hrpose::cuda::crop_fwd({image, transforms, out, bad, image_h, image_w, n, h, w,
                                 {float(s0), float(s1), float(s2)}, {float(b0), float(b1), float(b2)}, opencv4 != 0,
                                 mirror != 0, channels_last != 0, hrpose::cuda::Type(type)}, nullptr);
}
"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISE = (*(1 / (255 * s) for s in STD), *(-m / s for m, s in zip(MEAN, STD, strict=True)))
TRANSFORMS = [
    [[1, 0, 0], [0, 1, 0]],
    [[0.7, 0, 3.25], [0, 0.7, -8.5]],
    [[1.59, -1.03, -20], [1.03, 1.59, 4]],
    [[-0.24, 0.2, 14], [-0.2, -0.24, 20]],
    [[-1, 0, 30], [0, 1, 0]],  # mirrored
    [[0.02, 0, 10], [0, 0.02, 10]],  # the whole image in a few pixels
    [[1, 0, 5000], [0, 1, 0]],  # nothing of it
    [[1e-9, 0, 0], [0, 1, 0]],  # coordinates to 1e10
    [[1e-200, 0, 1], [0, 1e-100, 1]],  # and beyond what any integer holds
    [[200, -200, -3000], [200, 200, -3000]],
]
# height and width of the image, width and height of the crops: single pixels, odd rows, whole chunks, several blocks
SIZES = [((1, 1), (1, 1)), ((37, 45), (13, 9)), ((40, 33), (16, 12)), ((64, 21), (52, 60))]
MUTANTS = {
    "no barrier": ("  __syncthreads();\n", ""),
    "right edge": ("right = ix >= -1 && ix < a.image_w - 1", "right = ix >= -1 && ix < a.image_w"),
    "lower edge": ("lower = iy >= -1 && iy < a.image_h - 1", "lower = iy >= 0 && iy < a.image_h - 1"),
    "half a step": ("double half_step = kFixed / kSteps / 2", "double half_step = 0"),
    "rounding": ("+ 0.5f", "+ 0.499f"),
    "in float": ("const double column = inverse_row[0] * x,", "const double column = float(inverse_row[0]) * x,"),
    "one block too few": ("ceil_div(threads, int64_t(kThreads))", "max(threads / kThreads, int64_t(1))"),
    "channels": ("a.image[at + 3 + c]", "a.image[at + 1 + c]"),
    "mirrored order": ("values[c][mirrored ? count - 1 - i : i]", "values[c][i]"),
    "mirrored place": ("int(a.w) - count - x : first", "int(a.w) - 1 - x : first"),
    "mirrored copies over the crops": ("store<T, true>(a, n + a.n,", "store<T, true>(a, n,"),
    "pixel by pixel": ("value((j + 2) % 3, (j + 2) / 3)", "value((j + 2) % 3, j / 3)"),
    "not aligned": ("args.w % kTogether == 0 &&", "args.w >= kTogether &&"),
}


PLAIN = (False, torch.float32, torch.contiguous_format)
OUTPUTS = [
    PLAIN,
    (True, torch.float32, torch.channels_last),
    (True, torch.bfloat16, torch.channels_last),
    (False, torch.float16, torch.contiguous_format),
]


def run(kernel, fenced, image, transforms, size, mode, normalise, output=PLAIN):
    """The crops, NaN where the kernel wrote nothing; beside them too nothing may have been written."""
    n, (width, height), post = len(transforms), size, 12352.0
    mirror, dtype, layout = output
    out = torch.full((n * (1 + mirror), 3, height, width), math.nan, dtype=dtype).contiguous(memory_format=layout)
    out = fenced(out, post)
    bad = torch.ones(n, dtype=torch.bool)
    numbers = normalise or (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    image = fenced(image, 201)
    sizes = (*image.shape[:2], n, height, width)
    last = (mirror, layout == torch.channels_last, CUDA_TYPES[dtype])
    kernel("crop", image, transforms, out, bad, *sizes, *numbers, mode == "opencv4", *last)
    storage = torch.empty(0, dtype=dtype).set_(out.untyped_storage())
    assert (storage == post).sum() == len(storage) - out.numel()
    return out, bad


def differences(kernel, rng, fenced):
    """Calls that do not give what the reference gives."""
    transforms, wrong = torch.tensor(TRANSFORMS, dtype=torch.float64), []
    for image_size, size in SIZES:
        image = torch.from_numpy(rng.integers(0, 200, (*image_size, 3))).to(torch.uint8)
        for mode, mean, std, normalise in (
            ("exact", MEAN, STD, NORMALISE),
            ("exact", None, None, None),
            ("opencv4", MEAN, STD, NORMALISE),
            ("opencv4", None, None, None),
        ):
            for output in OUTPUTS if mode == "exact" else OUTPUTS[:1]:
                out, bad = run(kernel, fenced, image, transforms, size, mode, normalise, output)
                if bad.any() or not torch.equal(out, crop_reference(image, transforms, size, mode, mean, std, *output)):
                    wrong.append((image_size, size, mode, mean, output))
    return wrong


def test_equals_the_reference(emulate, rng, fenced, schedule):
    kernel = emulate("crop.cu", SHIM)
    kernel.configure(schedule)
    assert differences(kernel, rng, fenced) == []


def test_what_cannot_be_inverted_is_reported_and_nan(emulate, rng, fenced):
    kernel = emulate("crop.cu", SHIM)
    image = torch.from_numpy(rng.integers(0, 200, (9, 7, 3))).to(torch.uint8)
    matrices = [TRANSFORMS[0], [[1, 2, 3], [2, 4, 5]], [[math.nan, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, math.inf]]]
    matrices += [[[1e-320, 0, 0], [0, 1, 0]], TRANSFORMS[2]]
    transforms = torch.tensor(matrices, dtype=torch.float64)
    out, bad = run(kernel, fenced, image, transforms, (24, 20), "exact", None)
    assert bad.tolist() == [False, True, True, True, True, False]
    assert out.isnan().flatten(1).all(1).tolist() == bad.tolist()
    assert torch.equal(out[~bad], crop_reference(image, transforms[~bad], (24, 20)))
    run(kernel, fenced, image, transforms[:0], (24, 20), "exact", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(emulate, emulation_error, rng, fenced, name):
    kernel, found = emulate("crop.cu", SHIM, [MUTANTS[name]]), 0
    for schedule in ("forward", "reverse", "shuffled"):
        kernel.configure(schedule)
        try:
            found += bool(differences(kernel, rng, fenced))
        except (emulation_error, AssertionError):
            found += 1
    assert found
