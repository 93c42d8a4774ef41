"""crop: kernel against reference, reference against a float64 loop, opencv4 against crops made by OpenCV 4."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hrpose.errors import InputError
from hrpose.ops import crop, crop_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EYE = torch.eye(3, dtype=torch.float64)[None, :2]


def similarity(degrees: float, scale: float, tx: float, ty: float) -> list[list[float]]:
    cosine, sine = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return [[cosine, -sine, tx], [sine, cosine, ty]]


TRANSFORMS = torch.tensor(
    [
        similarity(0, 1, 0, 0),
        similarity(0, 0.7, 3.25, -8.5),
        similarity(33, 1.9, -20, 4),
        similarity(-140, 0.31, 14, 20),
        [[-1, 0, 30], [0, 1, 0]],  # mirrored
        similarity(10, 0.02, 10, 10),  # the whole image in a few pixels
        similarity(0, 1, 5000, 0),  # nothing of it
        [[1e-9, 0, 0], [0, 1, 0]],  # coordinates to 1e10
        [[1e-200, 0, 1], [0, 1e-100, 1]],  # and beyond what any integer holds
        similarity(45, 300, -3000, -3000),
    ],
    dtype=torch.float64,
)


def naive(image, matrix, width, height):
    """(3, height, width): bilinear with a zero frame around the image, in Python floats (double)."""
    (a, b, tx), (c, d, ty) = np.asarray(matrix).tolist()
    det = a * d - b * c
    h, w = image.shape[:2]
    out = np.zeros((3, height, width))

    def pixel(x, y):
        return image[y, x].astype(np.float64) if 0 <= x < w and 0 <= y < h else np.zeros(3)

    for y in range(height):
        for x in range(width):
            sx, sy = (d * (x - tx) - b * (y - ty)) / det, (a * (y - ty) - c * (x - tx)) / det
            if not (-2 < sx < w + 1 and -2 < sy < h + 1):
                continue
            x0, y0 = math.floor(sx), math.floor(sy)
            u, v = sx - x0, sy - y0
            top = (1 - u) * pixel(x0, y0) + u * pixel(x0 + 1, y0)
            out[:, y, x] = (1 - v) * top + v * ((1 - u) * pixel(x0, y0 + 1) + u * pixel(x0 + 1, y0 + 1))
    return out


def random_image(rng, h, w, channels=3):
    return torch.from_numpy(rng.integers(0, 256, (h, w, channels), dtype=np.uint8))


@pytest.mark.parametrize("image_size", [(1, 1), (1, 9), (9, 1), (2, 2), (31, 47), (120, 90)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (47, 5), (300, 3), (48, 64)], ids=str)
@pytest.mark.parametrize("mode", ["exact", "opencv4"])
@pytest.mark.parametrize("channels", [3, 4])
def test_kernel_equals_reference(isa, rng, image_size, size, mode, channels):
    image = random_image(rng, *image_size, channels)[..., :3]
    for normalise in ({}, {"mean": MEAN, "std": STD}):
        got = crop(image, TRANSFORMS, size, mode, **normalise)
        assert got.shape == (len(TRANSFORMS), 3, size[1], size[0]) and got.dtype == torch.float32
        assert torch.equal(got, crop_reference(image, TRANSFORMS, size, mode, **normalise))


OUTPUTS = [
    {"mirror": mirror, "dtype": dtype, "memory_format": layout}
    for mirror in (False, True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for layout in (torch.contiguous_format, torch.channels_last)
]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: " ".join(str(v).removeprefix("torch.") for v in o.values()))
@pytest.mark.parametrize("function", [crop, crop_reference])
def test_outputs_are_the_float32_crop_rounded_and_its_flip(isa, rng, function, output):
    """To the bit, in the layout asked for; rows are longer and shorter than a piece and than vectors."""
    image = random_image(rng, 40, 50)
    for size in ((300, 2), (13, 9), (1, 1)):
        for mode, normalise in (("exact", (MEAN, STD)), ("opencv4", (None, None))):
            plain = crop_reference(image, TRANSFORMS, size, mode, *normalise)
            want = torch.cat((plain, plain.flip(3))) if output["mirror"] else plain
            got = function(image, TRANSFORMS, size, mode, *normalise, **output)
            assert got.dtype == output["dtype"] and got.is_contiguous(memory_format=output["memory_format"])
            assert torch.equal(got, want.to(output["dtype"]))


@pytest.mark.parametrize("index", range(6))
def test_exact_equals_float64_loop(isa, rng, index):
    """A point within rounding of a neighbour or of the border may take either side; there the values agree anyway."""
    image = random_image(rng, 23, 31)
    got = crop(image, TRANSFORMS[index : index + 1], (29, 26))[0]
    want = naive(image.numpy(), TRANSFORMS[index], 29, 26)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-3)
    assert want.max() > 0


def test_identity_and_normalisation(isa, rng):
    image = random_image(rng, 8, 9)
    planes = image.permute(2, 0, 1).float()
    for mode in ("exact", "opencv4"):
        assert torch.equal(crop(image, EYE, (9, 8), mode)[0], planes)
        wider = crop(image, EYE, (11, 8), mode, MEAN, STD)[0]
        want = (planes.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(wider[..., :9].double(), want, rtol=1e-5, atol=1e-6)
        zero = -torch.tensor(MEAN) / torch.tensor(STD)  # zero before normalising
        torch.testing.assert_close(wider[..., 9:], zero[:, None, None].expand(3, 8, 2))


def test_half_pixel_by_hand(isa):
    """Crop pixel x sits at image x - 0.5, so columns read (0 + 10)/2, (10 + 20)/2, (20 + 0)/2, then nothing."""
    image = torch.tensor([[[10, 100, 0], [20, 200, 0]]], dtype=torch.uint8)
    transforms = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]])
    for mode in ("exact", "opencv4"):
        assert crop(image, transforms, (4, 1), mode)[0, :, 0].tolist() == [[5, 15, 10, 0], [50, 150, 100, 0], [0] * 4]


def test_opencv4_by_hand(isa):
    """2:1 reduction with a shift of 1/7 px: all in integers, as cv::warpAffine documents its fixed point.

    Source x of column x is 2 x - 2/7. In 1/1024 px: 2048 x + round(-292.57) + 16 = 2048 x - 277; >> 5 gives 1/32 px:
    64 x - 9 (floor), that is pixel 2 x - 1 and 23/32. So value = (9 I[2x-1] + 23 I[2x] + 16) / 32, rounded down.
    """
    row = [200, 31, 77, 4, 250, 93, 18, 255]
    image = torch.tensor(row, dtype=torch.uint8)[None, :, None].expand(1, 8, 3)
    transforms = torch.tensor([[[0.5, 0, 1 / 7], [0, 1, 0]]], dtype=torch.float64)
    padded = [0, *row, 0]
    want = [(9 * padded[2 * x] + 23 * padded[2 * x + 1] + 16) // 32 for x in range(4)]
    assert crop(image, transforms, (4, 1), "opencv4")[0, 0, 0].tolist() == want


def test_opencv4_equals_opencv(isa, data_root):
    folder = data_root / "opencv4_crops"
    if not folder.is_dir():
        pytest.skip(f"real data not found: no {folder}")
    with np.load(folder / "crops.npz") as archive:
        images, transforms, crops = archive["image_id"], archive["transform"], archive["crops_bgr"]
    assert len(crops) == 7
    for image_id, transform, want in zip(images, transforms, crops, strict=True):
        with Image.open(data_root / "coco_mini" / "val2017" / f"{image_id:012d}.jpg") as file:
            image = np.asarray(file.convert("RGB"))[..., ::-1]
        got = crop(image, transform[None], (192, 256), "opencv4")[0].permute(1, 2, 0)
        assert np.array_equal(got.numpy(), want), image_id
        exact = crop(image, transform[None], (192, 256))[0].permute(1, 2, 0)
        assert np.abs(exact.numpy() - want.astype(np.float32)).mean() < 0.5


@pytest.mark.parametrize("mode", ["exact", "opencv4"])
def test_devices_agree(device, rng, mode):
    image = torch.from_numpy(rng.integers(0, 256, (97, 61, 3))).to(torch.uint8)
    for size in ((1, 1), (13, 9), (48, 64)):
        got = crop(image.to(device), TRANSFORMS.to(device), size, mode, MEAN, STD)
        assert got.device.type == device
        assert torch.equal(got.cpu(), crop_reference(image, TRANSFORMS, size, mode, MEAN, STD))
    for output in OUTPUTS:
        for size in ((16, 9), (13, 4)):
            got = crop(image.to(device), TRANSFORMS.to(device), size, mode, MEAN, STD, **output)
            assert got.is_contiguous(memory_format=output["memory_format"])
            assert torch.equal(got.cpu(), crop_reference(image, TRANSFORMS, size, mode, MEAN, STD, **output))
    singular = torch.cat((EYE, torch.zeros_like(EYE))).to(device)
    with pytest.raises(InputError, match=r"transforms\[1\] must be finite and invertible"):
        crop(image.to(device), singular, (8, 8), mode)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(isa, rng, monkeypatch, threads):
    image = random_image(rng, 60, 80)
    monkeypatch.setattr(sys.modules[crop.__module__], "PARALLEL_ABOVE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(crop(image, TRANSFORMS, (48, 64)), crop_reference(image, TRANSFORMS, (48, 64)))
    output = {"mirror": True, "dtype": torch.bfloat16, "memory_format": torch.channels_last}
    got = crop(image, TRANSFORMS, (48, 64), **output)
    assert torch.equal(got, crop_reference(image, TRANSFORMS, (48, 64), **output))


def test_strides_and_numpy(isa, rng):
    image = random_image(rng, 20, 30)
    want = crop_reference(image, TRANSFORMS, (16, 12))
    planar = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.full((40, 70, 4), 255, dtype=torch.uint8)
    wide[::2, 5:65:2, :3] = image
    packed, alpha = (random_image(rng, 23, 37, channels)[1:21, 2:32] for channels in (3, 4))  # parts of pictures
    packed.copy_(image), alpha[..., :3].copy_(image)
    read_only = image.numpy().copy()
    read_only.flags.writeable = False
    backwards = np.ascontiguousarray(image.numpy()[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    views = planar, wide[::2, 5:65:2, :3], packed, alpha[..., :3]
    for same in (*views, read_only, backwards, Image.fromarray(image.numpy())):
        assert torch.equal(crop(same, TRANSFORMS, (16, 12)), want)
    assert torch.equal(crop(image, TRANSFORMS.numpy(), np.array([16, 12])), want)
    assert torch.equal(crop(image, TRANSFORMS.mT.contiguous().mT, (16, 12)), want)
    float32 = TRANSFORMS[:5].float()
    assert torch.equal(crop(image, float32, (16, 12)), crop(image, float32.double(), (16, 12)))


def test_empty_batch(isa, rng):
    assert crop(random_image(rng, 5, 5), torch.zeros(0, 2, 3), (4, 6)).shape == (0, 3, 6, 4)
    assert crop_reference(random_image(rng, 5, 5), torch.zeros(0, 2, 3), (4, 6)).shape == (0, 3, 6, 4)


def with_value(value, index=1):
    changed = EYE.repeat(3, 1, 1)
    changed[index, 0, 0] = value
    return changed


PIXELS = torch.zeros(4, 5, 3, dtype=torch.uint8)
ERRORS = [
    ({"image": PIXELS.float()}, "image must be uint8, got torch.float32"),
    ({"image": PIXELS[..., :2]}, r"image must be \(H, W, 3\), got \(4, 5, 2\)"),
    ({"image": PIXELS[0]}, r"image must be \(H, W, 3\), got \(5, 3\)"),
    ({"image": PIXELS[:0]}, r"image must have sides of 1\.\.1048576 px, got \(0, 5\)"),
    ({"image": PIXELS[:1].expand(1 << 21, 5, 3)}, r"image must have sides of 1\.\.1048576 px, got \(2097152, 5\)"),
    ({"image": None}, "image must be a tensor or an array of numbers, got NoneType"),
    ({"transforms": EYE[0]}, r"transforms must be \(N, 2, 3\), got \(2, 3\)"),
    ({"transforms": EYE.int()}, "transforms must be float32 or float64 on cpu, got torch.int32"),
    ({"transforms": EYE.to("meta")}, "on cpu, got torch.float64 on meta"),
    ({"transforms": with_value(0.0)}, r"transforms\[1\] must be finite and invertible, got \[\[0.0, 0.0, 0.0\]"),
    ({"transforms": with_value(math.nan, 2)}, r"transforms\[2\] must be finite and invertible"),
    ({"transforms": with_value(math.inf, 0)}, r"transforms\[0\] must be finite and invertible"),
    ({"transforms": with_value(5e-324)}, r"transforms\[1\] must be finite and invertible"),
    ({"size": (0, 4)}, r"size must be \(width, height\) of 1\.\.16384 px each, got \(0, 4\)"),
    ({"size": (4, 20000)}, r"got \(4, 20000\)"),
    ({"size": 4}, r"size must be \(width, height\), got 4"),
    ({"size": (4, math.nan)}, r"size must be \(width, height\), got \(4, nan\)"),
    ({"size": (4, math.inf)}, r"size must be \(width, height\), got \(4, inf\)"),
    ({"size": (16384, 16384), "transforms": EYE.expand(9, 2, 3)}, "few enough for 2147483648 .* values, got 9 crops"),
    (
        {"size": (16384, 16384), "transforms": EYE.expand(2, 2, 3), "mirror": True},
        "2 crops of 16384 x 16384 and their copies",
    ),
    ({"dtype": torch.float64}, "dtype must be one of torch.float32, torch.bfloat16, torch.float16, got torch.float64"),
    ({"dtype": "bf16"}, "dtype must be one of torch.float32, .*, got bf16"),
    ({"memory_format": torch.preserve_format}, "memory_format must be one of torch.contiguous_format, torch.channels"),
    ({"mode": "cubic"}, "mode must be 'exact' or 'opencv4', got 'cubic'"),
    ({"mean": MEAN}, "mean and std must be given together"),
    ({"std": STD}, "mean and std must be given together"),
    ({"mean": MEAN[:2], "std": STD}, "mean and std must be three finite numbers each, std > 0"),
    ({"mean": MEAN, "std": (1, 0, 1)}, "mean and std must be three finite numbers each, std > 0"),
    ({"mean": (math.nan, 0, 0), "std": STD}, "mean and std must be three finite numbers each"),
    ({"mean": MEAN, "std": (1, 1e-320, 1)}, "1 / std and mean / std must fit float32"),
    ({"mean": 0.5, "std": STD}, "mean and std must be three numbers each"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
@pytest.mark.parametrize("function", [crop, crop_reference])
def test_mistakes_are_named(function, change, message):
    with pytest.raises(InputError, match=f"^crop: .*{message}"):
        function(**({"image": PIXELS, "transforms": EYE, "size": (4, 4)} | change))


def test_registration_and_compile(rng):
    image, transforms = random_image(rng, 20, 30), TRANSFORMS[:4]
    scale_bias = ([0.01, 0.02, 0.03], [-1.0, -2.0, -3.0])
    torch.library.opcheck(torch.ops.hrpose.crop.default, (image, transforms, 9, 7, False, *scale_bias))
    output = (True, torch.bfloat16, True)
    torch.library.opcheck(torch.ops.hrpose.crop.default, (image, transforms, 9, 7, False, *scale_bias, *output))
    torch.library.opcheck(torch.ops.hrpose.invert_affine.default, (transforms.float(),))

    def crop_both(pixels, affine):
        modes = ("exact", "opencv4")
        layout = {"mirror": True, "dtype": torch.bfloat16, "memory_format": torch.channels_last}
        several = [crop(pixels, affine, (9, 7), m, MEAN, STD) for m in modes]
        several += [f(pixels, affine, (9, 7), **layout) for f in (crop, crop_reference)]
        return [*several, crop_reference(pixels, affine, (9, 7))]

    class Module(torch.nn.Module):
        forward = staticmethod(crop_both)

    want = crop_both(image, transforms)
    compiled = torch.compile(crop_both, fullgraph=True, backend="eager")
    exported = torch.export.export(
        Module(), (image, transforms), dynamic_shapes=[{}, {0: torch.export.Dim("crops", min=1, max=64)}]
    )
    for run in (compiled, exported.module()):
        assert all(map(torch.equal, run(image, transforms), want))
        with pytest.raises(Exception, match=r"transforms\[1\] must be finite and invertible"):
            run(image, with_value(0.0).repeat(2, 1, 1)[:4])
    assert all(map(torch.equal, exported.module()(image, TRANSFORMS[:6]), crop_both(image, TRANSFORMS[:6])))


def fuzz(rng, calls: int) -> int:
    """Random calls, many of them wrong; counts results. Anything but a result or an InputError fails the test."""
    results = 0

    def maybe(value, *wrong):
        return value if rng.random() < 0.95 else wrong[rng.integers(len(wrong))]

    for _ in range(calls):
        h, w = (int(v) for v in rng.integers(0 if rng.random() < 0.05 else 1, 40, 2))
        image = torch.from_numpy(rng.integers(0, 256, (h, w, maybe(3, 1, 4)), dtype=np.uint8))
        view = rng.integers(5)
        if view == 0:
            image = image.transpose(0, 1)
        elif view == 1:
            image = image[:: rng.integers(1, 3), :: rng.integers(1, 3)]
        elif view == 2 and h:  # one row, fifty times
            image = image[:1].expand(50, -1, -1)
        elif view == 3:  # a part of a picture, maybe of one with an alpha channel
            wide = torch.from_numpy(rng.integers(0, 256, (h + 2, w + 3, rng.integers(3, 5)), dtype=np.uint8))
            image = wide[rng.integers(3) :, rng.integers(4) :, : image.shape[2]]
        image = maybe(image, image.float(), image.to("meta"), image[..., 0], None, image.numpy()[::-1])
        n = int(rng.integers(0, 4))
        transforms = rng.normal(size=(n, maybe(2, 3), 3)) * 10.0 ** rng.integers(-320, 300 if rng.random() < 0.2 else 3)
        if n and rng.random() < 0.2:
            odd = (0, math.nan, math.inf, 1e308, -1e308, 1e-320)[rng.integers(6)]
            transforms[rng.integers(n), 0, rng.integers(3)] = odd
        transforms = maybe(torch.from_numpy(transforms), transforms, torch.from_numpy(transforms).float(), "x", None)
        largest = 300 if rng.random() < 0.1 else 30
        size = maybe(tuple(int(v) for v in rng.integers(1, largest, 2)), (0, 1), (1 << 40, 2), "ab")
        mode = maybe(("exact", "opencv4")[rng.integers(2)], None, "cv")
        mean, std = maybe((MEAN, STD), (None, None), (MEAN, None), ((1,), (2,)), (MEAN, (1, -1, 1)))
        output = OUTPUTS[rng.integers(len(OUTPUTS))] | maybe({}, {"dtype": torch.int8}, {"memory_format": None})
        try:
            out = crop(image, transforms, size, mode, mean, std, **output)
        except InputError:
            continue
        assert out.shape == (n * (1 + output["mirror"]), 3, size[1], size[0])
        if out.device.type == "cpu" and rng.random() < 0.1:
            assert torch.equal(out, crop_reference(image, transforms, size, mode, mean, std, **output))
        results += 1
    return results


def test_fuzz(isa, rng):
    assert fuzz(rng, 300) > 50


@pytest.mark.slow
def test_fuzz_long(isa, rng):
    assert fuzz(rng, 10_000) > 1000


def test_written_where_asked(rng, isa):
    image, transforms = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), torch.eye(2, 3).repeat(2, 1, 1)
    expected = crop(image, transforms, (8, 6))
    batch = torch.full((5, 3, 6, 8), -1.0)
    out = batch[1:3]
    assert crop(image, transforms, (8, 6), out=out) is out
    assert torch.equal(batch[1:3], expected) and (batch[[0, 3, 4]] == -1).all()
    for wrong in (batch, batch[1:3].double(), batch[:2].transpose(2, 3), batch[:4:2], "here"):
        with pytest.raises(InputError, match=r"crop: out must be a contiguous \(2, 3, 6, 8\) float32 on cpu"):
            crop(image, transforms, (8, 6), out=wrong)
    for output in OUTPUTS:
        expected = crop(image, transforms, (8, 6), **output)
        out = torch.empty_like(expected)
        assert crop(image, transforms, (8, 6), out=out, **output) is out and torch.equal(out, expected)
        other = torch.channels_last if out.is_contiguous() else torch.contiguous_format
        with pytest.raises(InputError, match="crop: out must be a "):
            crop(image, transforms, (8, 6), out=out.contiguous(memory_format=other), **output)
