"""decode: kernel against reference, reference against a loop written from the published procedure."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hrpose
from hrpose.errors import InputError
from hrpose.ops import _ext, decode, decode_reference

COCO_PAIRS = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)]
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 9), (2, 3, 4, 47), (2, 17, 64, 48), (1, 4, 5, 129), (1, 2, 3, 2500), (2, 4, 2, 3)]


def pairs_for(joints: int) -> list[tuple[int, int]]:
    return [pair for pair in COCO_PAIRS if max(pair) < joints]


def naive(heatmaps, flipped=None, flip_pairs=(), shift=True, refine="quarter", transforms=None):
    """One map, one pixel at a time, in Python floats (double)."""
    n_, k_, h_, w_ = heatmaps.shape
    partner = list(range(k_))
    for left, right in flip_pairs:
        partner[left], partner[right] = right, left
    keypoints, scores = np.zeros((n_, k_, 2)), np.zeros((n_, k_))
    for n in range(n_):
        for k in range(k_):
            grid = [[float(heatmaps[n, k, y, x]) for x in range(w_)] for y in range(h_)]
            if flipped is not None:
                for y in range(h_):
                    back = [float(flipped[n, partner[k], y, w_ - 1 - x]) for x in range(w_)]
                    if shift:
                        back = back[:1] + back[:-1]
                    grid[y] = [(grid[y][x] + back[x]) / 2 for x in range(w_)]
            best, px, py = grid[0][0], 0, 0
            for y in range(h_):
                for x in range(w_):
                    if grid[y][x] > best:
                        best, px, py = grid[y][x], x, y
            if best <= 0:
                px = py = 0
            fx, fy = px, py
            if refine == "quarter" and 1 < px < w_ - 1 and 1 < py < h_ - 1:
                dx, dy = grid[py][px + 1] - grid[py][px - 1], grid[py + 1][px] - grid[py - 1][px]
                fx += 0.25 * ((dx > 0) - (dx < 0))
                fy += 0.25 * ((dy > 0) - (dy < 0))
            if transforms is not None:
                t = transforms[n]
                fx, fy = t[0, 0] * fx + t[0, 1] * fy + t[0, 2], t[1, 0] * fx + t[1, 1] * fy + t[1, 2]
            keypoints[n, k], scores[n, k] = (fx, fy), best
    return keypoints, scores


def assert_same(got, want):
    for name, a, b in zip(("keypoints", "scores"), got, want, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30)) and torch.equal(a.isnan(), b.isnan()), name


def random_maps(rng, shape):
    """Multiples of 1/8: averages are exact and ties frequent."""
    return torch.from_numpy(rng.integers(-8, 24, shape) / 8).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "noshift"])
@pytest.mark.parametrize("refine", ["quarter", "none"])
def test_kernel_equals_reference_and_loop(isa, rng, shape, shift, refine):
    heatmaps, flipped = random_maps(rng, shape), random_maps(rng, shape)
    transforms, pairs = torch.from_numpy(rng.normal(size=(shape[0], 2, 3))), pairs_for(shape[1])
    small = math.prod(shape) < 10_000
    for other in (None, flipped):
        for affine in (None, transforms, transforms.float()):
            got = decode(heatmaps, other, pairs, shift, refine, affine)
            assert_same(got, decode_reference(heatmaps, other, pairs, shift, refine, affine))
            if small:
                keypoints, scores = naive(heatmaps, other, pairs, shift, refine, affine)
                np.testing.assert_array_equal(got[1].numpy(), scores.astype(np.float32))
                np.testing.assert_allclose(got[0].numpy(), keypoints, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_devices_agree(device, rng, dtype):
    for shape in (*SHAPES, (150, 17, 16, 12)):  # on CUDA a block per map, then a warp
        heatmaps, flipped = random_maps(rng, shape).to(dtype), random_maps(rng, shape).to(dtype)
        transforms = torch.from_numpy(rng.normal(size=(shape[0], 2, 3)))
        for tensors in ((heatmaps, None, None), (heatmaps, flipped, None), (heatmaps, flipped, transforms)):
            maps, other, affine = (None if t is None else t.to(device) for t in tensors)
            keypoints, scores = decode(maps, other, pairs_for(shape[1]), transforms=affine)
            assert keypoints.device.type == scores.device.type == device
            want = decode_reference(heatmaps, tensors[1], pairs_for(shape[1]), transforms=tensors[2])
            assert_same((keypoints.cpu(), scores.cpu()), want)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(isa, rng, monkeypatch, threads):
    heatmaps, flipped = random_maps(rng, (5, 17, 16, 12)), random_maps(rng, (5, 17, 16, 12))
    monkeypatch.setattr(sys.modules[decode.__module__], "PARALLEL_ABOVE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_same(decode(heatmaps, flipped, COCO_PAIRS), decode_reference(heatmaps, flipped, COCO_PAIRS))


def test_gaussian_lands_on_the_image(isa):
    """The peak at (20.3, 30.6) is found at (20.25, 30.75): a quarter towards the larger neighbour."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
    heatmaps = torch.exp(-((x - 20.3) ** 2 + (y - 30.6) ** 2) / 8)[None, None]
    keypoints, scores = decode(heatmaps, transforms=torch.tensor([[[5.0, 0.0, 100.0], [0.0, 5.0, 50.0]]]))
    assert keypoints.tolist() == [[[5 * 20.25 + 100, 5 * 30.75 + 50]]]
    assert scores.item() == pytest.approx(math.exp(-(0.3**2 + 0.4**2) / 8), rel=1e-6)


def test_flip_merge_by_hand(isa):
    """One row of four. Mirrored back, joint 1's map 0 0 8 0 reads 0 8 0 0, and 0 0 8 0 after the shift."""
    heatmaps = torch.tensor([[[[0.0, 0, 4, 0]], [[1.0, 0, 0, 0]]]])
    flipped = torch.tensor([[[[0.0, 0, 0, 2]], [[0.0, 0, 8, 0]]]])
    shifted = decode(heatmaps, flipped, [(0, 1)], shift=True)
    assert shifted[0].tolist() == [[[2, 0], [0, 0]]] and shifted[1].tolist() == [[6, 1.5]]
    plain = decode(heatmaps, flipped, [(0, 1)], shift=False)
    assert plain[0].tolist() == [[[1, 0], [0, 0]]] and plain[1].tolist() == [[4, 1.5]]
    unswapped = decode(heatmaps, flipped, [], shift=False)
    assert unswapped[0].tolist() == [[[2, 0], [1, 0]]] and unswapped[1].tolist() == [[2, 4]]


@pytest.mark.parametrize(
    ("px", "py", "moves"),
    [(1, 4, 0), (2, 4, 1), (6, 4, 1), (7, 4, 0), (4, 1, 0), (4, 2, 1), (4, 5, 1), (4, 6, 0)],
)
def test_quarter_offset_borders(isa, px, py, moves):
    """8 x 7 map: 1 < px < 7 and 1 < py < 6, so column and row 1 and the last ones stay."""
    heatmaps = torch.zeros(1, 1, 7, 8)
    heatmaps[0, 0, py, px] = 1
    if px + 1 < 8 and py + 1 < 7:
        heatmaps[0, 0, py, px + 1] = heatmaps[0, 0, py + 1, px] = 0.5
    keypoints, _ = decode(heatmaps)
    assert keypoints.tolist() == [[[px + 0.25 * moves, py + 0.25 * moves]]]


def test_ties_zeros_negatives(isa):
    heatmaps = torch.zeros(1, 4, 6, 6)
    heatmaps[0, 0, 2, 3] = heatmaps[0, 0, 4, 1] = heatmaps[0, 0, 2, 5] = 0.5  # the first in row-major order wins
    heatmaps[0, 2] = -1
    heatmaps[0, 2, 3, 3] = -0.25  # a maximum, but not > 0: coordinates are zeroed
    heatmaps[0, 3] = -math.inf
    keypoints, scores = decode(heatmaps, refine="none")
    assert keypoints.tolist() == [[[3, 2], [0, 0], [0, 0], [0, 0]]]
    assert scores.tolist() == [[0.5, 0, -0.25, -math.inf]]


def test_nan_is_loud_and_infinity_is_not(isa):
    heatmaps = torch.rand(1, 4, 9, 33) + 0.1
    heatmaps[0, 1, 8, 32] = math.nan
    heatmaps[0, 2, 4, 10:14] = math.inf  # neighbours inf - inf in x
    keypoints, scores = decode(heatmaps, transforms=torch.eye(3, dtype=torch.float64)[None, :2])
    assert scores.isnan().tolist() == [[False, True, False, False]]
    assert keypoints.isnan().all(-1).tolist() == [[False, True, False, False]]
    assert scores[0, 2] == math.inf and keypoints[0, 2, 0] == 10.25
    assert_same((keypoints, scores), decode_reference(heatmaps, transforms=torch.eye(3, dtype=torch.float64)[None, :2]))
    opposite = torch.full((1, 1, 3, 3), math.inf)
    assert decode(opposite, -opposite, [])[1].isnan().all()  # inf - inf in the merge


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(isa, rng, dtype):
    heatmaps, flipped = random_maps(rng, (2, 17, 16, 12)), random_maps(rng, (2, 17, 16, 12))  # exact in every dtype
    got = decode(heatmaps.to(dtype), flipped.to(dtype), COCO_PAIRS)
    assert_same(got, decode(heatmaps, flipped, COCO_PAIRS))


def test_float64_is_not_rounded_before_the_maximum():
    heatmaps = torch.ones(1, 1, 1, 3, dtype=torch.float64)
    heatmaps[..., 2] += 1e-12
    assert decode(heatmaps)[0].tolist() == [[[2, 0]]]


def test_strides_numpy_and_gradients(isa, rng):
    heatmaps, flipped = random_maps(rng, (2, 6, 9, 13)), random_maps(rng, (2, 6, 9, 13))
    want = decode_reference(heatmaps, flipped, [(1, 2)])
    channels_last = heatmaps.to(memory_format=torch.channels_last)
    assert_same(decode(channels_last, flipped.flip(3).flip(3), [(1, 2)]), want)
    wide = torch.full((2, 12, 9, 30), math.nan)
    wide[:, ::2, :, 5:18] = heatmaps
    assert_same(decode(wide[:, ::2, :, 5:18], flipped, [(1, 2)]), want)
    assert_same(decode(heatmaps.numpy(), flipped.numpy()[..., ::-1].copy()[..., ::-1], np.array([[1, 2]])), want)
    read_only = heatmaps.numpy().copy()
    read_only.flags.writeable = False
    got = decode(read_only, flipped.requires_grad_(), ((1, 2),))
    assert_same(got, want)
    assert not got[0].requires_grad


def test_empty_batch(isa):
    keypoints, scores = decode(torch.zeros(0, 17, 8, 6), torch.zeros(0, 17, 8, 6), [], transforms=torch.zeros(0, 2, 3))
    assert keypoints.shape == (0, 17, 2) and scores.shape == (0, 17)
    assert_same(decode_reference(torch.zeros(0, 17, 8, 6)), (keypoints, scores))


def naive_dark(maps: np.ndarray, blur: int) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (N, K, 2), scores (N, K) as the published code goes about it, in float64: the whole map is blurred,
    zeros around it, and scaled back to its maximum; its logarithm is taken, and a Newton step on that."""
    sigma = 0.3 * ((blur - 1) * 0.5 - 1) + 0.8
    taps = np.exp(-(np.arange(-(blur // 2), blur // 2 + 1) ** 2) / (2 * sigma**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    n_, k_, h, w = maps.shape
    keypoints, scores = np.zeros((n_, k_, 2)), np.zeros((n_, k_))
    for n, k in np.ndindex(n_, k_):
        grid = maps[n, k].astype(np.float64)
        scores[n, k], (py, px) = grid.max(), np.unravel_index(grid.argmax(), grid.shape)
        if scores[n, k] <= 0:
            continue
        keypoints[n, k] = px, py
        if not (1 < px < w - 2 and 1 < py < h - 2):
            continue
        padded, smooth = np.pad(grid, blur // 2), np.zeros_like(grid)
        for j, i in np.ndindex(kernel.shape):
            smooth += kernel[j, i] * padded[j : j + h, i : i + w]
        level = np.log(np.maximum(smooth * (scores[n, k] / smooth.max()), 1e-10))
        gradient = np.array([level[py, px + 1] - level[py, px - 1], level[py + 1, px] - level[py - 1, px]]) / 2
        xx = (level[py, px + 2] - 2 * level[py, px] + level[py, px - 2]) / 4
        yy = (level[py + 2, px] - 2 * level[py, px] + level[py - 2, px]) / 4
        xy = (level[py + 1, px + 1] - level[py - 1, px + 1] - level[py + 1, px - 1] + level[py - 1, px - 1]) / 4
        hessian = np.array([[xx, xy], [xy, yy]])
        if np.linalg.det(hessian) != 0:
            keypoints[n, k] -= np.linalg.solve(hessian, gradient)
    return keypoints, scores


def blobs(rng, shape, sigma=2.0):
    """Gaussians at random places, some near or beyond the border, on positive noise; and where they are."""
    n, k, h, w = shape
    centres = rng.uniform([-2, -2], [w + 1, h + 1], (n, k, 2))
    y, x = np.arange(h)[:, None], np.arange(w)
    cx, cy = centres[..., 0, None, None], centres[..., 1, None, None]
    maps = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2)) + 0.05 * rng.random(shape)
    return torch.from_numpy(maps).float(), centres


def assert_near(got, want):
    """But for the rounding of coordinates below 128 to float32, and of the logarithms in double."""
    assert torch.equal(got[1].nan_to_num(7e30), want[1].nan_to_num(7e30))
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("blur", [3, 11, 17, 27])
def test_dark_equals_the_published_procedure(isa, rng, blur):
    for shape in ((2, 17, 64, 48), (1, 6, 9, 7), (1, 5, 4, 40), (1, 2, 3, 3), (2, 1, 5, 5), (1, 1, 1, 9)):
        maps, _ = blobs(rng, shape)
        got = decode(maps, refine="dark", blur=blur)
        assert_near(got, decode_reference(maps, refine="dark", blur=blur))
        keypoints, scores = naive_dark(maps.numpy(), blur)
        np.testing.assert_array_equal(got[1].numpy(), scores.astype(np.float32))
        np.testing.assert_allclose(got[0].numpy(), keypoints, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("sigma", "blur"), [(2.0, 11), (3.0, 17), (1.0, 3), (2.0, 27)])
def test_dark_finds_the_centre_of_a_gaussian(isa, rng, sigma, blur):
    """Within a hundredth of a pixel, where the quarter offset is up to a quarter away."""
    centres = rng.uniform([20, 25], [27, 38], (200, 2))
    y, x = np.arange(64)[:, None], np.arange(48)
    cx, cy = centres[:, 0, None, None], centres[:, 1, None, None]
    maps = torch.from_numpy(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2))[:, None]).float()
    dark, quarter = (decode(maps, refine=refine, blur=blur)[0][:, 0].numpy() for refine in ("dark", "quarter"))
    assert np.abs(dark - centres).max() < 0.01 and 0.2 < np.abs(quarter - centres).max() < 0.26


def test_dark_with_flip_test_and_transforms(isa, rng):
    """The step is taken on the merged map, then the transform; it equals that of the map merged by hand."""
    (heatmaps, _), (flipped, _) = blobs(rng, (3, 5, 32, 24)), blobs(rng, (3, 5, 32, 24))
    transforms = torch.from_numpy(rng.normal(size=(3, 2, 3)))
    for shift in (True, False):
        mirrored = flipped[:, [0, 2, 1, 3, 4]].flip(3)
        if shift:
            mirrored = torch.cat((mirrored[..., :1], mirrored[..., :-1]), 3)
        merged = (heatmaps + mirrored) / 2
        points, scores = naive_dark(merged.numpy(), 11)
        affine = transforms.numpy()
        want = np.einsum("nij,nkj->nki", affine[:, :, :2], points) + affine[:, None, :, 2]
        arguments = (heatmaps, flipped, [(1, 2)], shift, "dark")
        got = decode(*arguments, transforms)
        np.testing.assert_array_equal(got[1].numpy(), scores.astype(np.float32))
        np.testing.assert_allclose(got[0].numpy(), want, rtol=1e-6, atol=1e-5)
        assert_near(got, decode_reference(*arguments, transforms))
        assert_near(decode(*arguments), decode(merged, refine="dark"))


@pytest.mark.parametrize(
    ("px", "py", "moves"),
    [(1, 4, 0), (2, 4, 1), (5, 4, 1), (6, 4, 0), (7, 4, 0), (4, 1, 0), (4, 2, 1), (4, 5, 1), (4, 6, 0), (4, 7, 0)],
)
def test_dark_borders(isa, px, py, moves):
    """8 x 8 map: 1 < px < 6 and 1 < py < 6, one column and row less than the quarter offset takes."""
    heatmaps = torch.zeros(1, 1, 8, 8)
    heatmaps[0, 0, py, px] = 1
    heatmaps[0, 0, min(py + 1, 7), min(px + 1, 7)] += 0.5
    moved = decode(heatmaps, refine="dark")[0][0, 0] - torch.tensor([px, py])
    assert bool((moved > 0.01).all()) == bool(moves) and bool((moved == 0).all()) != bool(moves)


def test_dark_where_there_is_no_peak(isa):
    """Ties: the first. A flat neighbourhood and infinities have no second derivatives: no step. Zeros: (0, 0)."""
    maps = torch.zeros(1, 6, 40, 40)
    maps[0, 0, 10, 12] = maps[0, 0, 30, 31] = 1.0  # each alone in its blur: symmetric
    maps[0, 1, 8:33, 8:33] = 1.0  # the first is a corner, and steps
    maps[0, 2] = 0.5  # the first is in the corner of the map
    maps[0, 3] = -0.5
    maps[0, 5, 20, 20:22] = math.inf
    maps[0, 5, 21, 20] = -math.inf
    keypoints, scores = got = decode(maps, refine="dark")
    assert_near(got, decode_reference(maps, refine="dark"))
    assert scores.tolist() == [[1, 1, 0.5, -0.5, 0, math.inf]]
    assert keypoints[0, 0].tolist() == [12, 10] and keypoints[0, 2:].tolist() == [[0, 0], [0, 0], [0, 0], [20, 20]]
    assert (keypoints[0, 1] > 8.5).all()
    nan = torch.ones(1, 2, 16, 16)
    nan[0, 0, 3, 3] = math.nan
    assert decode(nan, refine="dark")[1].isnan().tolist() == [[True, False]]
    assert decode(nan, refine="dark")[0].isnan().all(2).tolist() == [[True, False]]


def test_dark_floors_negative_values(isa, rng):
    """A peak in a sea of negative values: where blurring leaves them negative, the logarithm is that of 1e-10, with the
    original's scale or without; kernel and reference agree, and the step stays small."""
    maps = torch.full((1, 1, 24, 24), -1.0)
    maps[0, 0, 10, 11] = 3.0
    assert decode(maps, refine="dark")[0].tolist() == [[[11, 10]]]  # all is floored: no second derivative, no step
    maps[0, 0, 9:13, 10:14] += 6.0
    got = decode(maps, refine="dark")
    assert_near(got, decode_reference(maps, refine="dark"))
    assert (got[0] - torch.tensor([11, 10])).abs().max() < 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dark_in_other_dtypes(isa, rng, dtype):
    maps = blobs(rng, (2, 9, 32, 24))[0].to(dtype)
    assert_near(decode(maps, refine="dark"), decode(maps.float(), refine="dark"))


def test_dark_is_the_same_on_threads_and_compiled(rng, monkeypatch):
    maps, transforms = blobs(rng, (3, 7, 20, 24))[0], torch.from_numpy(rng.normal(size=(3, 2, 3)))
    want = decode(maps, refine="dark", transforms=transforms)
    arguments = (maps, maps.flip(3), list(range(7)), True, False, transforms, 11)
    torch.library.opcheck(torch.ops.hrpose.decode.default, arguments)
    for function in (decode, decode_reference):

        def dark(x, affine, function=function):
            return function(x, refine="dark", transforms=affine)

        assert_near(torch.compile(dark, fullgraph=True, backend="eager")(maps, transforms), want)
    monkeypatch.setattr(sys.modules[decode.__module__], "PARALLEL_ABOVE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert_same(decode(maps, refine="dark", transforms=transforms), want)


MAPS = torch.zeros(2, 4, 5, 6)
ERRORS = [
    ({"heatmaps": MAPS[0]}, r"heatmaps must be \(N, K, H, W\) with K, H, W >= 1, got \(4, 5, 6\)"),
    ({"heatmaps": MAPS[:, :0]}, r"K, H, W >= 1, got \(2, 0, 5, 6\)"),
    ({"heatmaps": MAPS[:, :, :0]}, r"got \(2, 4, 0, 6\)"),
    ({"heatmaps": MAPS[..., :0]}, r"got \(2, 4, 5, 0\)"),
    ({"heatmaps": MAPS.int()}, "heatmaps must be floating point, got torch.int32"),
    ({"heatmaps": MAPS.to_sparse()}, "heatmaps must be a dense tensor, got torch.sparse_coo"),
    ({"heatmaps": "maps"}, "heatmaps must be a tensor or an array of numbers, got str"),
    ({"heatmaps": [[1.0], [2.0, 3.0]]}, "heatmaps must be a tensor or an array of numbers, got list"),
    ({"flipped": MAPS}, r"flip_pairs must be given with flipped \(\[\] if no joints trade places\), got None"),
    ({"flipped": MAPS[:1], "flip_pairs": []}, r"flipped must be of the shape .*\(2, 4, 5, 6\), got \(1, 4, 5, 6\)"),
    ({"flipped": MAPS.double(), "flip_pairs": []}, "flipped must be torch.float32 on cpu .*, got torch.float64 on cpu"),
    ({"flipped": MAPS.to("meta"), "flip_pairs": []}, "on cpu like heatmaps, got torch.float32 on meta"),
    ({"flipped": MAPS, "flip_pairs": [(0, 4)]}, r"joint indices in 0\.\.3, got \(0, 4\)"),
    ({"flipped": MAPS, "flip_pairs": [(-1, 2)]}, r"joint indices in 0\.\.3, got \(-1, 2\)"),
    ({"flipped": MAPS, "flip_pairs": [(0, 1), (1, 2)]}, r"name each joint at most once, got \(1, 2\)"),
    ({"flipped": MAPS, "flip_pairs": [(2, 2)]}, r"name each joint at most once, got \(2, 2\)"),
    ({"flipped": MAPS, "flip_pairs": [1, 2]}, r"flip_pairs must be pairs of joint indices, got \[1, 2\]"),
    ({"flipped": MAPS, "flip_pairs": 3}, "flip_pairs must be pairs of joint indices, got 3"),
    ({"refine": "half"}, "refine must be 'quarter', 'dark' or 'none', got 'half'"),
    *[({"refine": "dark", "blur": v}, f"blur must be an odd integer, 3..27, got {v}") for v in (1, 10, 29, 11.0, True)],
    ({"transforms": torch.zeros(1, 2, 3)}, r"transforms must be \(N, 2, 3\) = \(2, 2, 3\), got \(1, 2, 3\)"),
    ({"transforms": torch.zeros(2, 3, 3)}, r"got \(2, 3, 3\)"),
    ({"transforms": torch.zeros(2, 2, 3).half()}, "float32 or float64 on cpu, got torch.float16 on cpu"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
@pytest.mark.parametrize("function", [decode, decode_reference])
def test_mistakes_are_named(function, change, message):
    with pytest.raises(InputError, match=f"^decode: .*{message}"):
        function(**({"heatmaps": MAPS} | change))


def test_registration_and_compile(rng):
    heatmaps, flipped = random_maps(rng, (2, 6, 9, 7)), random_maps(rng, (2, 6, 9, 7))
    transforms = torch.from_numpy(rng.normal(size=(2, 2, 3)))
    arguments = (heatmaps, flipped, [0, 2, 1, 3, 4, 5], True, True, transforms)
    torch.library.opcheck(torch.ops.hrpose.decode.default, arguments)
    torch.library.opcheck(torch.ops.hrpose.decode.default, (heatmaps, None, [], False, False, None))

    def double(maps, mirrored, affine):
        return decode(maps * 2, mirrored * 2, [(1, 2)], transforms=affine)

    want = double(heatmaps, flipped, transforms)
    assert_same(torch.compile(double, fullgraph=True, backend="eager")(heatmaps, flipped, transforms), want)

    class Module(torch.nn.Module):
        forward = staticmethod(double)

    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Module(), (heatmaps, flipped, transforms), dynamic_shapes=[{0: batch}] * 3)
    assert_same(exported.module()(heatmaps, flipped, transforms), want)
    three = [torch.cat((t, t[:1])) for t in (heatmaps, flipped, transforms)]
    assert_same(exported.module()(*three), double(*three))


def test_other_devices_take_the_reference():
    keypoints, scores = decode(torch.zeros(2, 3, 8, 6, device="meta"))
    assert keypoints.shape == (2, 3, 2) and scores.shape == (2, 3) and keypoints.device.type == "meta"
    if _ext.native():
        assert "CPU only" in _ext.why_reference(torch.zeros(1, device="meta"))


SAME_NUMBERS = """
import numpy as np, torch
from hrpose.ops import _ext, crop, decode
rng = np.random.default_rng(3)
maps, transforms = rng.normal(size=(2, 2, 4, 16, 12)).astype(np.float32), rng.normal(size=(2, 2, 3))
image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
out = [*decode(maps[0], maps[1], [(0, 1)], transforms=transforms), crop(image, transforms, (20, 16)),
       crop(image, transforms, (20, 16), "opencv4", (0.4, 0.5, 0.6), (0.2, 0.2, 0.3))]
print(_ext.isa(), [hash(t.numpy().tobytes()) for t in out])
"""


def test_without_the_native_module_the_numbers_are_the_same():
    def run(**environment):
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HRPOSE_")}
        environment = inherited | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
        done = subprocess.run(
            [sys.executable, "-c", SAME_NUMBERS],
            env=environment,
            cwd=Path(hrpose.__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.split(" ", 1)

    without, plain = run(HRPOSE_EXT="0"), run()
    assert without[0] == "None" and without[1] == plain[1]
    if _ext.native():
        assert plain[0] == _ext.isas()[0]


def fuzz(rng, calls: int) -> int:
    """Random calls, many of them wrong; counts results. Anything but a result or an InputError fails the test."""
    results = 0
    dtypes = [torch.float32] * 6 + [torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]

    def tensor(shape):
        value = torch.from_numpy(rng.normal(size=shape)).to(dtypes[rng.integers(len(dtypes))])
        if value.is_floating_point() and rng.random() < 0.2 and value.numel():
            value.view(-1)[rng.integers(value.numel())] = (math.nan, math.inf, -math.inf)[rng.integers(3)]
        kind = rng.integers(6)
        if kind == 0 and value.ndim > 1:
            value = value.transpose(-1, -2)
        elif kind == 1 and value.ndim:
            value = value[..., ::2]
        elif kind == 2 and value.ndim and rng.random() < 0.3:
            value = value.to("meta")
        elif kind == 3 and value.ndim > 1:
            value = value[:1].expand_as(value)
        return value

    def maybe(value, wrong):
        return value if rng.random() < 0.93 else wrong

    for _ in range(calls):
        shape = tuple(int(v) for v in rng.integers(0 if rng.random() < 0.2 else 1, 9, maybe(4, 3)))
        joints = shape[1] if len(shape) > 1 else 1
        pairs = [(int(a), int(b)) for a, b in rng.permutation(joints)[: joints // 2 * 2].reshape(-1, 2)]
        heatmaps = tensor(shape)
        flipped = (None, tensor(shape), heatmaps.clone())[rng.integers(3)]
        transforms = None if rng.random() < 0.5 else tensor((maybe(shape[0], 3), 2, maybe(3, 2)))
        try:
            keypoints, scores = decode(
                heatmaps,
                flipped,
                maybe(pairs, [None, [(0, joints)], [(1,)], "ab"][rng.integers(4)]),
                bool(rng.integers(2)),
                maybe(("quarter", "dark", "none")[rng.integers(3)], (None, 3)[rng.integers(2)]),
                transforms,
                maybe(int(rng.integers(1, 14)) * 2 + 1, [2, "a", None, 2.5][rng.integers(4)]),
            )
        except InputError:
            continue
        assert keypoints.shape == (*scores.shape, 2)
        results += 1
    return results


def test_fuzz(isa, rng):
    assert fuzz(rng, 300) > 50


@pytest.mark.slow
def test_fuzz_long(isa, rng):
    assert fuzz(rng, 10_000) > 1000
