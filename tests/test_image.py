"""Image files: odd ones give the right RGB values, broken ones an error that names the path, never anything else."""

import gc
import io
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from hrpose import image as image_module
from hrpose.errors import InputError
from hrpose.image import as_image, read_image, to_rgb
from hrpose.pillow_memory import borrow_rgb


@pytest.fixture
def rgb(rng):
    """A smooth 37x29 picture: JPEG keeps it to within a few grey levels."""
    y, x = np.mgrid[0:29, 0:37]
    return np.stack([x * 6, y * 8, 255 - x * 3 - y * 2], 2).astype(np.uint8)


def saved(tmp_path, picture, name, **options):
    """The path of a picture (array or Pillow image) saved under a name."""
    path = tmp_path / name
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path, **options)
    return path


def grey3(grey):
    return np.repeat(np.asarray(grey, np.uint8)[:, :, None], 3, 2)


def distance(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Formats --------------------------------------------------------------------------------------------------------------


def grey_8_bit(rgb):
    return Image.fromarray(rgb[:, :, 0]), "grey.png", {}, grey3(rgb[:, :, 0])


def grey_jpeg(rgb):
    return Image.fromarray(np.full((16, 16), 77, np.uint8)), "grey.jpg", {}, grey3(np.full((16, 16), 77))


def one_bit(rgb):
    bits = rgb[:, :, 0] > 100
    return Image.fromarray(bits), "bits.png", {}, grey3(bits * 255)


def grey_with_alpha(rgb):
    grey, alpha = rgb[:, :, 0].copy(), np.full(rgb.shape[:2], 255, np.uint8)
    alpha[:5], alpha[5:9] = 0, 128
    expected = np.where(alpha == 255, grey, np.where(alpha == 0, 0, np.rint(grey * (128 / 255))))
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "la.png", {}, grey3(expected)


def rgb_with_alpha(rgb):
    alpha = np.full(rgb.shape[:2], 255, np.uint8)
    alpha[:7] = 0
    expected = rgb.copy()
    expected[:7] = 0
    return Image.fromarray(np.dstack([rgb, alpha])), "rgba.png", {}, expected


def palette(rgb):
    picture = Image.fromarray((np.arange(29 * 37) % 3).reshape(29, 37).astype(np.uint8))
    picture = picture.convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 9, 8, 7])
    colours = np.array([[255, 0, 0], [0, 255, 0], [9, 8, 7]], np.uint8)
    return picture, "palette.png", {}, colours[(np.arange(29 * 37) % 3).reshape(29, 37)]


def palette_with_transparent_entry(rgb):
    picture, _, _, expected = palette(rgb)
    expected = expected.copy()
    expected[(expected == [0, 255, 0]).all(2)] = 0  # over black
    return picture, "transparent.png", {"transparency": 1}, expected


def grey_with_transparent_value(rgb):
    grey = rgb[:, :, 0]
    return Image.fromarray(grey), "trns.png", {"transparency": 60}, grey3(np.where(grey == 60, 0, grey))


def transparent_gif(rgb):
    picture, _, _, expected = palette_with_transparent_entry(rgb)
    return picture, "transparent.gif", {"transparency": 1}, expected


def grey_16_bit_png(rgb):
    grey = (rgb[:, :, 0].astype(np.uint16) * 257) + 40
    return Image.fromarray(grey), "grey16.png", {}, grey3(rgb[:, :, 0])


def dark_grey_16_bit_png(rgb):
    """All values below 256: still 16 bits, so nearly black, not eight bits of full range."""
    return Image.fromarray(rgb[:, :, 0].astype(np.uint16)), "dark16.png", {}, grey3(np.rint(rgb[:, :, 0] / 257))


def grey_16_bit_big_endian_tiff(rgb):
    grey = Image.fromarray((rgb[:, :, 0].astype(">u2") * 257).byteswap().view("<u2"))
    big = Image.frombytes("I;16B", grey.size, grey.tobytes())
    return big, "big.tiff", {}, grey3(rgb[:, :, 0])


def grey_32_bit_tiff(rgb):
    return Image.fromarray(rgb[:, :, 0].astype(np.int32) * 257), "int32.tiff", {}, grey3(rgb[:, :, 0])


def float_tiff_of_ones(rgb):
    return Image.fromarray(rgb[:, :, 0].astype(np.float32) / 255), "unit.tiff", {}, grey3(rgb[:, :, 0])


def float_tiff_of_255(rgb):
    return Image.fromarray(rgb[:, :, 0].astype(np.float32)), "float.tiff", {}, grey3(rgb[:, :, 0])


def float_tiff_stretched(rgb):
    values = np.linspace(-3e8, 7e8, 256, dtype=np.float32).reshape(16, 16)
    return Image.fromarray(values), "stretched.tiff", {}, grey3(np.arange(256).reshape(16, 16))


def cmyk_tiff(rgb):
    ink = 255 - rgb
    return Image.fromarray(np.dstack([ink, np.zeros_like(ink[:, :, 0])]), "CMYK"), "cmyk.tiff", {}, rgb


def lossless_webp(rgb):
    return Image.fromarray(rgb), "picture.webp", {"lossless": True}, rgb


def bmp(rgb):
    return Image.fromarray(rgb), "picture.bmp", {}, rgb


def ppm(rgb):
    return Image.fromarray(rgb), "picture.ppm", {}, rgb


def no_suffix(rgb):
    return Image.fromarray(rgb), "picture", {"format": "PNG"}, rgb


def png_named_jpg(rgb):
    return Image.fromarray(rgb), "wrong.jpg", {"format": "PNG"}, rgb


def animated_gif(rgb):
    frames = [Image.new("RGB", (12, 9), color) for color in ("red", "lime", "blue")]
    first = np.zeros((9, 12, 3), np.uint8)
    first[..., 0] = 255
    return frames[0], "animated.gif", {"save_all": True, "append_images": frames[1:]}, first


def animated_png(rgb):
    frames = [Image.new("RGB", (12, 9), color) for color in ("red", "lime")]
    first = np.zeros((9, 12, 3), np.uint8)
    first[..., 0] = 255
    return frames[0], "animated.png", {"save_all": True, "append_images": frames[1:]}, first


def multi_page_tiff(rgb):
    return Image.fromarray(rgb), "pages.tiff", {"save_all": True, "append_images": [Image.new("L", (5, 5))]}, rgb


def one_pixel(rgb):
    return Image.new("RGB", (1, 1), (1, 2, 3)), "one.png", {}, np.array([[[1, 2, 3]]], np.uint8)


EXACT = [grey_8_bit, grey_jpeg, one_bit, grey_with_alpha, rgb_with_alpha, palette, palette_with_transparent_entry,
         grey_with_transparent_value, transparent_gif, grey_16_bit_png, dark_grey_16_bit_png,
         grey_16_bit_big_endian_tiff, grey_32_bit_tiff, float_tiff_of_ones, float_tiff_of_255, float_tiff_stretched,
         cmyk_tiff, lossless_webp, bmp, ppm, no_suffix, png_named_jpg, animated_gif, animated_png, multi_page_tiff,
         one_pixel]  # fmt: skip


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.__name__)
def test_format_gives_the_right_values(tmp_path, rgb, case):
    picture, name, options, expected = case(rgb)
    found = read_image(saved(tmp_path, picture, name, **options))
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.shape == expected.shape
    assert distance(found, expected) <= 1  # one grey level: rounding of the conversions
    path = tmp_path / name
    assert np.array_equal(read_image(path, contiguous=False), found)
    part = {"part": lambda width, height: (width // 3, height // 2, width, height)}
    height, width = found.shape[:2]
    for contiguous in (True, False):
        cut = read_image(path, contiguous=contiguous, **part)
        assert np.array_equal(cut, found[height // 2 :, width // 3 :]) and cut.flags.c_contiguous >= contiguous


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(tmp_path, rgb, mode, progressive):
    picture = Image.fromarray(rgb).convert(mode)
    path = saved(tmp_path, picture, "picture.jpg", quality=95, subsampling=0, progressive=progressive)
    assert distance(read_image(str(path)), rgb) <= 8


def test_cmyk_jpeg_as_adobe_writes_it(tmp_path):
    """Such files hold inverted ink; read without care, white comes out black."""
    white = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "white.jpg")
    assert b"Adobe" in white.read_bytes()
    assert read_image(white).min() > 250


# EXIF -----------------------------------------------------------------------------------------------------------------

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, rgb, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, rgb, "turned.png", exif=exif)
    assert np.array_equal(read_image(path), UPRIGHT[orientation](rgb))
    assert np.array_equal(read_image(path, exif=False), rgb)
    with Image.open(path) as picture:
        assert np.array_equal(as_image(picture), UPRIGHT[orientation](rgb))


def test_exif_rule_by_hand(tmp_path):
    """Orientation 6: the stored picture is shown turned a quarter clockwise, so its left column becomes the top row."""
    stored = np.zeros((2, 3, 3), np.uint8)
    stored[:, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    found = read_image(saved(tmp_path, stored, "turned.png", exif=exif))
    assert found.shape == (3, 2, 3) and (found[0] == 200).all() and (found[1:] == 0).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x05"])
def test_broken_exif_is_no_reason_to_refuse_a_photo(tmp_path, rgb, exif):
    path = saved(tmp_path, rgb, "photo.jpg", exif=exif, quality=95, subsampling=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distance(read_image(path), rgb) <= 8


# What is refused ------------------------------------------------------------------------------------------------------


def refuse(path, message, **options):
    with pytest.raises(InputError, match=message) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(path, **options)
    assert str(caught.value).startswith(f"image {path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jpg", b""),
        ("text.jpg", b"This is not a picture.\n"),
        ("zeros.png", bytes(1000)),
        ("page.html.jpg", b"<!DOCTYPE html><html><body>404</body></html>"),
        ("only_header.png", b"\x89PNG\r\n\x1a\n"),
        ("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ],
)
def test_no_image_at_all(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, "is not an image that Pillow can read|is damaged or not supported")


def test_paths_that_are_no_files(tmp_path, rgb):
    refuse(tmp_path, "cannot be read \\(Is a directory\\)")
    refuse(tmp_path / "missing.jpg", "cannot be read \\(No such file or directory\\)")
    refuse(f"{tmp_path}/" + "x" * 300 + ".jpg", "cannot be read \\(File name too long\\)")
    refuse(f"{saved(tmp_path, rgb, 'a.png')}/b.png", "cannot be read \\(Not a directory\\)")
    refuse("zero\0byte.jpg", "is damaged or not supported")


@pytest.mark.parametrize("name", ["picture.jpg", "picture.png", "picture.tiff", "picture.webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(tmp_path, rng, name, share):
    path = saved(tmp_path, rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refuse(path, "is damaged or not supported|is not an image that Pillow can read")


def test_truncated_in_the_last_rows_of_a_jpeg(tmp_path, rng):
    path = saved(tmp_path, rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), "picture.jpg")
    path.write_bytes(path.read_bytes()[:-40])
    refuse(path, "is damaged or not supported \\(image file is truncated")


def test_too_many_pixels(tmp_path):
    path = saved(tmp_path, Image.new("1", (300, 200)), "large.png")
    assert read_image(path, max_pixels=60_000).shape == (200, 300, 3)
    refuse(path, "must have at most 59999 pixels, has 300x200", max_pixels=59_999)


def test_a_small_file_of_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_of(50_000, 50_000))
    refuse(path, "must have at most 178956970 pixels")
    path.write_bytes(png_header_of(13_000, 13_000))  # where Pillow itself would only print a warning
    refuse(path, "must have at most 100000000 pixels, has 13000x13000", max_pixels=100_000_000)


def png_header_of(width, height):
    buffer = io.BytesIO()
    chunks = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    buffer.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(buffer, b"IHDR", chunks)
    PngImagePlugin.putchunk(buffer, b"IDAT", b"")
    return buffer.getvalue()


def test_the_limit_is_pillows_own():
    """Between the two limits of another value Pillow would refuse with a message that names the wrong one."""
    assert 2 * Image.MAX_IMAGE_PIXELS == image_module.MAX_PIXELS


def test_postscript_is_not_handed_to_an_interpreter(tmp_path, rgb, monkeypatch):
    path = saved(tmp_path, rgb, "program.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was called"))
    refuse(path, "is PostScript, which is not read")


def test_the_reason_is_told_in_one_line(tmp_path, rgb, monkeypatch):
    def fail(image, where, contiguous):
        raise SyntaxError("broken\n  in two lines")

    monkeypatch.setattr(image_module, "to_rgb", fail)
    refuse(saved(tmp_path, rgb, "a.png"), r"is damaged or not supported \(broken in two lines\)$")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_float_pixels_that_are_not_finite(tmp_path, value):
    pixels = np.ones((4, 4), np.float32)
    pixels[1, 2] = value
    refuse(saved(tmp_path, Image.fromarray(pixels), "float.tiff"), "pixels must be finite numbers")


# Arrays and Pillow images ---------------------------------------------------------------------------------------------


def test_as_image_takes_arrays_tensors_paths_and_pillow_images(tmp_path, rgb):
    path = saved(tmp_path, rgb, "picture.png")
    for given in (rgb, torch.from_numpy(rgb), Image.fromarray(rgb), path, str(path), memoryview(rgb)):
        assert np.array_equal(as_image(given), rgb)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBa", "RGBX", "HSV", "YCbCr", "CMYK", "1", "L", "P", "I;16", "F"])
def test_every_mode_of_pillow_gives_rgb_or_an_input_error(mode):
    assert to_rgb(Image.new(mode, (5, 4))).shape == (4, 5, 3)


def test_premultiplied_modes(rgb):
    alpha = Image.fromarray(rgb[:, :, 1])
    straight = Image.merge("RGBA", [*Image.fromarray(rgb).split(), alpha])
    assert distance(to_rgb(straight.convert("RGBa")), to_rgb(straight)) <= 2
    grey = Image.merge("LA", [Image.fromarray(rgb[:, :, 0]), alpha])
    assert distance(to_rgb(grey.convert("La")), to_rgb(grey)) <= 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"photo: must be \(H, W, 3\) uint8 RGB, got \(4, 5\) uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"must be \(H, W, 3\) uint8 RGB, got \(3, 4, 5\) uint8"),
        (np.zeros((4, 5, 4), np.uint8), r"must be \(H, W, 3\) uint8 RGB, got \(4, 5, 4\) uint8"),
        (np.zeros((4, 5, 3), np.float32), r"must be \(H, W, 3\) uint8 RGB, got \(4, 5, 3\) float32"),
        (np.zeros((0, 5, 3), np.uint8), r"must be \(H, W, 3\) uint8 RGB, got \(0, 5, 3\) uint8"),
        (None, "must be a path, a Pillow image or an array, got NoneType"),
        (7, "must be a path, a Pillow image or an array, got int"),
        (b"\xff\xd8\xff", "must be a path, a Pillow image or an array, got bytes"),
        ([[1, 2], [3]], "must be a readable Pillow image or an array"),
        (torch.zeros(4, 5, 3, requires_grad=True), "must be a readable Pillow image or an array"),
        (torch.zeros(4, 5, 3, device="meta"), "must be a readable Pillow image or an array"),
        (Image.new("RGB", (0, 4)), "must have at least one pixel, has 0x4"),
    ],
)
def test_as_image_refuses(value, message):
    with pytest.raises(InputError, match=message) as caught:
        as_image(value, "photo")
    assert str(caught.value).startswith("photo: ")


def test_as_image_refuses_a_pillow_image_of_a_truncated_file(tmp_path, rng):
    path = saved(tmp_path, rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), "picture.jpg")
    path.write_bytes(path.read_bytes()[:-500])
    with Image.open(path) as picture, pytest.raises(InputError, match="photo: must be a readable Pillow image"):
        as_image(picture, "photo")


# Threads and damage ---------------------------------------------------------------------------------------------------


def test_threads_leave_the_warning_filters_as_they_were(tmp_path, rgb):
    """catch_warnings in two threads that overlap can leave warnings off for the whole process."""
    path = saved(tmp_path, rgb, "picture.png")
    wrong, before = [], list(warnings.filters)

    def read():
        for _ in range(60):
            if not np.array_equal(read_image(path), rgb):
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and warnings.filters == before


def test_overlapping_readers_leave_the_warning_filters_as_they_were(tmp_path, rgb, monkeypatch):
    """The same by force: the first reader to come in is the first to go out; the second stays quiet."""
    path, before = saved(tmp_path, rgb, "picture.png"), list(warnings.filters)
    first_is_in, second_is_in = threading.Event(), threading.Event()
    order, quiet = [], []

    def slow(image, where, contiguous):
        name = threading.current_thread().name
        (first_is_in if name == "first" else second_is_in).set()
        assert second_is_in.wait(10)
        if name == "second":
            threads[0].join(10)
            quiet.append(warnings.filters != before)
        order.append(name)
        return to_rgb(image, where, contiguous)

    monkeypatch.setattr(image_module, "to_rgb", slow)
    threads = [threading.Thread(target=read_image, args=(path,), name=name) for name in ("first", "second")]
    threads[0].start()
    assert first_is_in.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"] and quiet == [True] and warnings.filters == before


def mutated(content, rng):
    """Bytes flipped, overwritten, removed, inserted or cut off: 1 to 8 such changes, anywhere."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        at, kind = int(rng.integers(len(data))), rng.integers(5)
        if kind == 0:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at : at + 4] = rng.bytes(4)
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 20)))
        else:
            data[at:] = b"" if rng.random() < 0.3 else data[at:]
        if not data:
            return bytes(data)
    return bytes(data)


def sources(rgb):
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({"format": "JPEG", "exif": exif}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}):
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, **options)
        yield buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(rgb).convert("P").save(buffer, "PNG", transparency=3)
    yield buffer.getvalue()


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_give_pixels_or_an_input_error(tmp_path, rgb, rng, count, capfd):
    contents, path, read = list(sources(rgb)), tmp_path / "mutated", 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(count):
            path.write_bytes(mutated(contents[i % len(contents)], rng))
            try:
                found = read_image(path, max_pixels=1_000_000)
            except InputError as error:
                assert str(path) in str(error)
            else:
                assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
                read += 1
    assert count * 0.05 < read < count * 0.95  # the mutations reach the decoder, and break something
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
def test_a_part_of_an_image_is_cut_from_the_whole(tmp_path, rng, mode):
    pixels = rng.integers(0, 256, (30, 40, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16))
    else:
        image = Image.fromarray(pixels, "RGBA").convert(mode)
    image.save(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.png")
    asked = []

    def part(width, height):
        asked.append((width, height))
        return 3, 5, 21, 30

    assert np.array_equal(read_image(tmp_path / "a.png", part=part), whole[5:30, 3:21]) and asked == [(40, 30)]
    assert np.array_equal(read_image(tmp_path / "a.png", part=lambda width, height: (0, 0, width, height)), whole)


def test_pillow_lends_its_memory(rgb):
    image = Image.fromarray(rgb)
    lent = borrow_rgb(image)
    if not hasattr(image, "__arrow_c_array__"):
        assert lent is None
        pytest.skip("this Pillow has no Arrow interface")
    assert np.array_equal(lent, rgb) and lent.strides == (4 * 37, 4, 1) and not lent.flags.writeable
    image.putpixel((3, 2), (9, 8, 7))
    assert lent[2, 3].tolist() == [9, 8, 7]  # a view, not a copy
    expected = np.array(image)
    part = lent[5:, 6:]
    del image, lent
    gc.collect()
    others = [Image.new("RGB", (37, 29), "red") for _ in range(50)]  # would take memory that was given back
    assert np.array_equal(part, expected[5:, 6:]) and others


def test_what_pillow_does_not_lend_is_copied(tmp_path, rgb):
    assert borrow_rgb(Image.fromarray(rgb[:, :, 0])) is None
    large = Image.effect_noise((2100, 2100), 50).convert("RGB")  # 17.6 MB: more than a block of Pillow's memory
    assert borrow_rgb(large) is None
    path = saved(tmp_path, large, "large.bmp")
    assert np.array_equal(read_image(path, contiguous=False), np.asarray(large))
