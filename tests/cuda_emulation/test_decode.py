"""csrc/cuda/decode.cu, emulated, against the reference."""

import math

import pytest
import torch

from hrpose.ops import decode_reference
from hrpose.ops.decode import _gaussian

SHIM = """
extern "C" const char *decode(const void *heatmaps, const void *flipped, const int64_t *perm, const double *transforms,
                              float *keypoints, float *scores, int64_t n, int64_t k, int64_t h, int64_t w,
                              int64_t shift, int64_t quarter, const double *taps, int64_t blur, int64_t type) {
  int joints[hrpose::cuda::kMaxJoints];
  for (int64_t i = 0; i < k; ++i)
    joints[i] = int(perm[i]);
  return hrpose::cuda::decode_fwd({heatmaps, flipped, joints, transforms, keypoints, scores, n, k, h, w, shift != 0,
                                   quarter != 0, taps, int(blur), hrpose::cuda::Type(type)}, nullptr);
}
"""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 9), (2, 3, 4, 47), (1, 17, 64, 48), (1, 2, 5, 136), (1, 1, 3, 1100), (2, 4, 2, 3)]
MUTANTS = {
    "no barrier": ("    __syncthreads();\n", ""),
    "the last tie wins": ("b.index < a.index", "b.index > a.index"),
    "a thread's last tie wins": ("value > best.value ? (chunk", "value >= best.value ? (chunk"),
    "one chunk too many": ("const int chunks = map.h * map.w / count", "const int chunks = map.h * map.w / count + 1"),
    "one chunk too few": ("const int chunks = map.h * map.w / count", "const int chunks = map.h * map.w / count - 1"),
    "column 0 moves": ("map.shift && x > 0 ?", "map.shift ?"),
    "NaN of one lane": ("best.nan = __any_sync(0xffffffffu, best.nan);", ""),
    "joints stay": ("params.perm[k]) * size", "k) * size"),
    "border": ("px < map.w - 1 && py", "px < map.w && py"),
    "DARK: border": ("px >= map.w - 2 ||", "px >= map.w - 1 ||"),
    "DARK: no barrier": ("  __syncwarp();\n", ""),
    "DARK: rows beyond the map": ("row >= 0 && row < map.h", "row >= 0"),
    "DARK: columns beyond the map": ("column >= 0 && column < map.w", "column < map.w"),
    "DARK: one column too few": ("for (int i = 0; i < side; ++i)", "for (int i = 0; i < side - 1; ++i)"),
    "DARK: one row too few": ("if (lane < side &&", "if (lane < side - 1 &&"),
    "DARK: one tap too few": ("i - j < blur)", "i - j < blur - 1)"),
    "DARK: rows for columns": ("rows[lane / kNear + t][lane % kNear]", "rows[lane % kNear + t][lane / kNear]"),
    "DARK: floor": ("level < 1e-10 ? 1e-10 : level", "level"),
    "DARK: sign of Hxy": ("- at(-1, 1) - at(1, -1) +", "- at(-1, 1) + at(1, -1) +"),
    "DARK: one column off": ("(2 + j) * kNear + 2 + i)", "(2 + j) * kNear + 1 + i)"),
    "DARK: no second derivatives": ("if (det != 0 &&", "if ("),
    "DARK: one warp's rows": (".rows[threadIdx.x / 32]", ".rows[0]"),
    "half a warp": ("int step = 16;", "int step = 8;"),
}


def pairs_for(joints: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(1, joints - 1, 2)]


def run(kernel, heatmaps, flipped=None, pairs=(), shift=True, refine="quarter", transforms=None, blur=11):
    n, k, h, w = heatmaps.shape
    perm = list(range(k))
    for left, right in pairs:
        perm[left], perm[right] = right, left
    keypoints, scores = torch.full((n, k, 2), 77.0), torch.full((n, k), 77.0)
    dark = ([float(v) for v in _gaussian(blur)], blur) if refine == "dark" else (None, 0)
    sizes = (n, k, h, w, shift, refine == "quarter", *dark, TYPES[heatmaps.dtype])
    kernel("decode", heatmaps, flipped, perm, transforms, keypoints, scores, *sizes)
    return keypoints, scores


def random_maps(rng, shape):
    """Multiples of 1/8, exact in every type, with frequent ties; rarely a NaN or an infinity."""
    maps = torch.from_numpy(rng.integers(-8, 24, shape) / 8).float()
    where = torch.from_numpy(rng.random(shape))
    maps[where < 0.0002] = math.nan
    maps[where > 0.9998] = math.inf
    return maps


def differences(kernel, rng, fenced):
    """Calls that do not give what the reference gives."""
    wrong = []
    for shape in SHAPES:
        pairs, transforms = pairs_for(shape[1]), torch.from_numpy(rng.normal(size=(shape[0], 2, 3)))
        heatmaps, flipped = random_maps(rng, shape), random_maps(rng, shape)
        if shape[1] > 3:  # all that DARK sees is floored: it takes no step
            heatmaps[0, 3] = -1
            heatmaps[0, 3, shape[2] // 2, shape[3] // 2] = 0.5
        for dtype in TYPES:
            for other, shift, refine, affine in (
                (None, False, "none", None),
                (None, True, "quarter", transforms),
                (fenced(flipped.to(dtype), math.inf), True, "quarter", None),
                (fenced(flipped.to(dtype), math.inf), False, "quarter", transforms),
                (None, False, "dark", None),
                (fenced(flipped.to(dtype), math.inf), True, "dark", transforms),
                (fenced(flipped.to(dtype), math.inf), False, "dark", None),
            ):
                arguments = (fenced(heatmaps.to(dtype), math.inf), other, pairs, shift, refine, affine)
                arguments += (int(rng.choice([3, 11, 27])),) if refine == "dark" else ()
                got, want = run(kernel, *arguments), decode_reference(*arguments)
                limit = 1e-5 if refine == "dark" else 0  # logarithms are those of two libraries
                if not all(
                    torch.allclose(a, b, rtol=limit, atol=limit, equal_nan=True) for a, b in zip(got, want, strict=True)
                ):
                    wrong.append((shape, *arguments[2:]))
    return wrong


@pytest.mark.parametrize("multiprocessors", [1, 10_000], ids=["warp", "block"])
def test_equals_the_reference(emulate, rng, fenced, schedule, multiprocessors):
    """A warp per map where there are 16 for every multiprocessor, else a block."""
    kernel = emulate("decode.cu", SHIM)
    kernel.configure(schedule, multiprocessors=multiprocessors)
    assert differences(kernel, rng, fenced) == []


def test_tensors_that_do_not_start_on_16_bytes(emulate, rng):
    kernel = emulate("decode.cu", SHIM)
    storage = random_maps(rng, (2 * 2 * 8 * 8 + 1,))
    heatmaps = storage[1:].view(2, 2, 8, 8)
    assert heatmaps.data_ptr() % 16
    for a, b in zip(run(kernel, heatmaps), decode_reference(heatmaps), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    run(kernel, heatmaps[:0])  # no launch: a grid of no blocks would be an error


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(emulate, emulation_error, rng, fenced, name):
    kernel, found = emulate("decode.cu", SHIM, [MUTANTS[name]]), 0
    for schedule in ("forward", "reverse", "shuffled"):
        for multiprocessors in (1, 10_000):
            kernel.configure(schedule, multiprocessors=multiprocessors)
            try:
                found += bool(differences(kernel, rng, fenced))
            except emulation_error:
                found += 1
    assert found
