"""What stands around the people: backgrounds drawn as simple places, and props rendered like the people themselves."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from hrpose.synth.figure import GARMENT_TONES, HAIR_TONES, SKIN_TONES, pick, rgb_of, vary
from hrpose.synth.relief import Cone, Ellipsoid, Shape

Colour = np.ndarray  # (3,) RGB 0..255

# Sky at the top, sky at the horizon, and the tint of what the sky lights.
SKIES = (("5aa4e0", "dcedf5"), ("3f7fc4", "c9e3f2"), ("8fb6d6", "f3ead7"), ("6d7fb3", "f6c9a0"), ("aab7c2", "e3e7e8"))
LEAF_TONES = ("4f8a4c", "6aa357", "3c6e47", "86ad58", "5b8f6b", "a2a24f")
WALL_TONES = ("e8ddcb", "cfdde0", "d9c7b8", "b9cbb8", "e6e2da", "c7c3d6", "a9bcc8", "dba98c", "8fa3a0", "d8b45f")
FLOOR_TONES = ("b98d62", "9c744f", "c9ab83", "8a8f94", "a8a39a", "7d6450")
HOUSE_TONES = ("c98f72", "d8c2a0", "a9b4bc", "8c9aa6", "b8705a", "e0d4c0", "7f8c86", "c7a468")
GROUND_TONES = ("9da3a6", "b5afa4", "8b9094")


class Canvas:
    """A picture under construction at `supersample` times its size; coordinates are shares of width and height."""

    def __init__(self, width: int, height: int, supersample: int):
        self.supersample = supersample
        self.width, self.height = width * supersample, height * supersample
        self.image = Image.new("RGB", (self.width, self.height))
        self.draw = ImageDraw.Draw(self.image)

    def gradient(self, top: float, bottom: float, first: Colour, last: Colour) -> None:
        """Rows from `top` to `bottom` from the first colour to the last."""
        start, stop = round(top * self.height), round(bottom * self.height)
        if stop <= start:
            return
        mix = ((np.arange(stop - start) + 0.5) / (stop - start))[:, None]
        column = np.clip(first * (1 - mix) + last * mix + 0.5, 0, 255).astype(np.uint8)[:, None]
        self.image.paste(
            Image.fromarray(column).resize((self.width, stop - start), Image.Resampling.NEAREST), (0, start)
        )

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([(x * self.width, y * self.height) for x, y in points], fill=_fill(colour))

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        if right > left and bottom > top:
            corners = (left * self.width, top * self.height, right * self.width - 1, bottom * self.height - 1)
            if corners[2] >= corners[0] and corners[3] >= corners[1]:
                self.draw.rectangle(corners, fill=_fill(colour))

    def ellipse(self, x: float, y: float, half_width: float, half_height: float, colour: Colour) -> None:
        """Both half axes are shares of the height, so that equal ones make a circle."""
        x, y = x * self.width, y * self.height
        half_width, half_height = half_width * self.height, half_height * self.height
        self.draw.ellipse((x - half_width, y - half_height, x + half_width, y + half_height), fill=_fill(colour))

    def line(self, points: list[tuple[float, float]], colour: Colour, thickness: float) -> None:
        """Thickness as a share of the height."""
        scaled = [(x * self.width, y * self.height) for x, y in points]
        self.draw.line(scaled, fill=_fill(colour), width=max(1, round(thickness * self.height)), joint="curve")

    def reduced(self, blur: float) -> np.ndarray:
        """(H, W, 3) float32 at the picture's own size, blurred by a box of `blur` pixels to each side."""
        image = self.image.reduce(self.supersample)
        if blur > 0:
            image = image.filter(ImageFilter.BoxBlur(blur))
        return np.asarray(image).astype(np.float32)


def _fill(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(min(max(value + 0.5, 0), 255)) for value in colour)
    return red, green, blue


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    return first * (1 - share) + second * share


def _how_many(rng: Generator, most: float) -> int:
    """A whole number between 0 and about `most`, evenly likely; `most` may be fractional."""
    return int(rng.random() * (most + 1))


def draw_backdrop(
    rng: Generator, width: int, height: int, horizon: float, difficulty: float, supersample: int
) -> np.ndarray:
    """A place to stand in, (H, W, 3) float32 RGB 0..255.

    horizon: where floor and background meet, as a share of the height. Difficulty 0 is an empty studio, 1 a place full
    of things.
    """
    canvas = Canvas(width, height, supersample)
    studio_only = rng.random() < max(0.08, 1 - 3 * difficulty)
    place = _studio if studio_only else pick(rng, (_room, _room, _park, _park, _street, _beach, _gym))
    place(rng, canvas, horizon, difficulty)
    return canvas.reduced(blur=rng.uniform(0.0, 0.0025) * height)


# --------------------------------------------------------------------------------------------------------- places


def _studio(rng: Generator, canvas: Canvas, horizon: float, difficulty: float) -> None:
    """A seamless paper background: wall and floor run into each other."""
    tone = vary(rng, rgb_of(pick(rng, WALL_TONES)), 0.06)
    canvas.gradient(0, horizon, tone * 0.92, tone * 1.04)
    canvas.gradient(horizon, horizon + 0.05, tone * 1.04, tone * 1.00)
    canvas.gradient(horizon + 0.05, horizon + 0.15, tone * 1.00, tone * 0.92)
    canvas.gradient(horizon + 0.15, 1, tone * 0.92, tone * 0.98)


def _sky(rng: Generator, canvas: Canvas, horizon: float, difficulty: float) -> tuple[Colour, Colour]:
    """Sky down to the horizon, with clouds and perhaps a sun; returns its two colours."""
    zenith, low = (vary(rng, rgb_of(code), 0.03) for code in pick(rng, SKIES))
    canvas.gradient(0, horizon + 0.02, zenith, low)
    if rng.random() < 0.4:
        x, y, radius = rng.uniform(0.08, 0.92), rng.uniform(0.05, 0.6) * horizon, rng.uniform(0.025, 0.05)
        for ring in range(5, -1, -1):
            sky_here = _mix(zenith, low, y / horizon)
            canvas.ellipse(x, y, *2 * (radius * (1 + 0.28 * ring),), _mix(rgb_of("fff3c4"), sky_here, ring / 6))
    for _ in range(_how_many(rng, 5 * difficulty)):
        x, y, size = rng.uniform(0, 1), rng.uniform(0.05, 0.75) * horizon, rng.uniform(0.02, 0.05)
        white = _mix(rgb_of("ffffff"), low, rng.uniform(0.1, 0.5))
        for _ in range(6):
            puff = size * rng.uniform(0.6, 1.2)
            canvas.ellipse(x + rng.normal(0, 1.3) * size, y + rng.normal(0, 0.25) * size, 1.6 * puff, 0.7 * puff, white)
    return zenith, low


def _hills(rng: Generator, canvas: Canvas, horizon: float, colour: Colour, rise: float) -> None:
    """A soft ridge up to about `rise` (share of the height) above the horizon."""
    waves = [(rng.uniform(1.5, 8), rng.uniform(0, 6.3), rng.uniform(0.15, 0.5)) for _ in range(3)]
    ridge = []
    for step in range(41):
        x = step / 40
        height = 0.5 + sum(share * math.sin(speed * x + phase) for speed, phase, share in waves) / 2
        ridge.append((x, horizon - rise * max(height, 0.05)))
    canvas.polygon([(0, horizon + 0.01), *ridge, (1, horizon + 0.01)], colour)


def _distant_tree(rng: Generator, canvas: Canvas, x: float, foot: float, size: float, leaf: Colour) -> None:
    trunk = rgb_of("6b4d35")
    canvas.rectangle(x - 0.04 * size, foot - 0.5 * size, x + 0.04 * size, foot, trunk)
    if rng.random() < 0.3:  # a fir
        for tier in range(3):
            base, half = foot - (0.18 + 0.24 * tier) * size, (0.30 - 0.06 * tier) * size
            shade = leaf * (0.88 + 0.08 * tier)
            half_x = half * canvas.height / canvas.width
            canvas.polygon([(x - half_x, base), (x + half_x, base), (x, base - 0.42 * size)], shade)
        return
    for blob in range(7):
        offset_x, offset_y = rng.normal(0, 0.13), rng.normal(0, 0.10)
        bright = 0.82 + 0.04 * blob  # later blobs lie higher and catch more light
        centre_y = foot - (0.66 + 0.03 * blob) * size + offset_y * size
        canvas.ellipse(x + offset_x * size * 0.8, centre_y, 0.19 * size, 0.17 * size, leaf * bright)


def _park(rng: Generator, canvas: Canvas, horizon: float, difficulty: float) -> None:
    _, low = _sky(rng, canvas, horizon, difficulty)
    leaf = vary(rng, rgb_of(pick(rng, LEAF_TONES)), 0.06)
    _hills(rng, canvas, horizon, _mix(leaf, low, 0.65), rng.uniform(0.08, 0.2))
    _hills(rng, canvas, horizon, _mix(leaf, low, 0.40), rng.uniform(0.04, 0.1))
    grass = _mix(vary(rng, rgb_of(pick(rng, LEAF_TONES[:4])), 0.05), rgb_of("b9c76a"), 0.35)
    canvas.gradient(horizon, 1, grass * 1.04, grass * 0.86)
    if rng.random() < 0.5:  # a path towards the horizon
        far, near = rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.9)
        path = vary(rng, rgb_of("d5c3a0"), 0.05)
        canvas.polygon([(far - 0.012, horizon), (far + 0.012, horizon), (near + 0.3, 1), (near - 0.3, 1)], path)
    for _ in range(_how_many(rng, 14 * difficulty)):
        foot = horizon + rng.uniform(0, 0.05)
        _distant_tree(rng, canvas, rng.uniform(0, 1), foot, rng.uniform(0.12, 0.38), vary(rng, leaf, 0.08))
    petals = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
    for _ in range(_how_many(rng, 60 * difficulty)):
        near = rng.random()
        size = 0.002 + 0.006 * near
        colour = petals if rng.random() < 0.4 else grass * rng.uniform(0.7, 0.85)
        canvas.ellipse(rng.random(), horizon + (1 - horizon) * near, 1.4 * size, size, colour)


def _street(rng: Generator, canvas: Canvas, horizon: float, difficulty: float) -> None:
    _sky(rng, canvas, horizon, 0.5 * difficulty)
    left = -rng.uniform(0, 0.1)
    while left < 1:
        right = left + rng.uniform(0.10, 0.28)
        top = horizon - rng.uniform(0.12, max(horizon - 0.02, 0.14))
        wall = vary(rng, rgb_of(pick(rng, HOUSE_TONES)), 0.06)
        canvas.rectangle(left, top, right, horizon + 0.01, wall)
        canvas.rectangle(left, top, right, top + 0.008, wall * 0.8)
        _windows(rng, canvas, (left, top + 0.03, right, horizon - 0.09), wall)
        if rng.random() < 0.7:  # a shop under an awning
            awning = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
            canvas.rectangle(left + 0.01, horizon - 0.055, right - 0.01, horizon, rgb_of("39444d"))
            canvas.rectangle(left + 0.005, horizon - 0.075, right - 0.005, horizon - 0.052, awning)
        left = right
    paving = vary(rng, rgb_of(pick(rng, GROUND_TONES)), 0.05)
    canvas.gradient(horizon, 1, paving * 0.92, paving * 1.05)
    _floor_lines(rng, canvas, horizon, paving * 0.88, across=True)


def _windows(rng: Generator, canvas: Canvas, box: tuple[float, float, float, float], wall: Colour) -> None:
    left, top, right, bottom = box
    columns, rows = max(1, int((right - left) / 0.05)), max(0, int((bottom - top) / 0.075))
    glass = _mix(rgb_of("7fa0b5"), wall, rng.uniform(0.0, 0.4))
    for row in range(rows):
        for column in range(columns):
            x = left + (right - left) * (column + 0.28) / columns
            y = top + (bottom - top) * (row + 0.15) / rows
            lit = glass if rng.random() < 0.85 else rgb_of("f5dc9a")
            canvas.rectangle(x, y, x + 0.44 * (right - left) / columns, y + 0.6 * (bottom - top) / rows, lit)


def _floor_lines(rng: Generator, canvas: Canvas, horizon: float, colour: Colour, across: bool) -> None:
    """Lines towards a vanishing point above the floor's edge, and rows of them across."""
    vanish_x, vanish_y = rng.uniform(0.3, 0.7), horizon - rng.uniform(0.1, 0.3)
    for step in range(-14, 15):
        near = vanish_x + step * 0.16
        far_share = (horizon - vanish_y) / (1 - vanish_y)
        canvas.line([(vanish_x + (near - vanish_x) * far_share, horizon), (near, 1)], colour, 0.002)
    if across:
        for step in range(1, 8):
            y = horizon + (1 - horizon) * 0.9 / (1 + 0.55 * (8 - step)) ** 1.0
            canvas.line([(0, y), (1, y)], colour, 0.002)


def _room(rng: Generator, canvas: Canvas, horizon: float, difficulty: float) -> None:
    wall = vary(rng, rgb_of(pick(rng, WALL_TONES)), 0.05)
    floor = vary(rng, rgb_of(pick(rng, FLOOR_TONES)), 0.06)
    canvas.gradient(0, horizon, wall * 0.94, wall * 1.03)
    if rng.random() < 0.3:  # wainscot
        canvas.rectangle(0, horizon * 0.62, 1, horizon, wall * 0.90)
        canvas.rectangle(0, horizon * 0.61, 1, horizon * 0.625, wall * 1.1)
    canvas.gradient(horizon, 1, floor * 0.86, floor * 1.06)
    _floor_lines(rng, canvas, horizon, floor * 0.80, across=False)
    canvas.rectangle(0, horizon - 0.018, 1, horizon, _mix(wall, rgb_of("ffffff"), 0.6))
    canvas.rectangle(0, horizon, 1, horizon + 0.004, floor * 0.6)
    things = (_window, _painting, _painting, _door, _shelf, _curtain)
    for _ in range(_how_many(rng, 6 * difficulty)):
        pick(rng, things)(rng, canvas, horizon)
    if rng.random() < 0.5 * difficulty:
        x, y, size = rng.uniform(0.2, 0.8), _mix(horizon, 1.0, rng.uniform(0.35, 0.7)), rng.uniform(0.2, 0.45)
        rug = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
        for ring, colour in ((1.0, rug), (0.86, _mix(rug, rgb_of("f4f1ea"), 0.6)), (0.78, rug * 0.92)):
            canvas.ellipse(x, y, size * ring, 0.22 * size * ring, colour)


def _window(rng: Generator, canvas: Canvas, horizon: float) -> None:
    left, right = (lambda x: (x, x + rng.uniform(0.12, 0.25)))(rng.uniform(0, 0.85))
    top, bottom = horizon * rng.uniform(0.08, 0.25), horizon * rng.uniform(0.65, 0.8)
    zenith, low = (rgb_of(code) for code in pick(rng, SKIES))
    canvas.rectangle(left - 0.01, top - 0.012, right + 0.01, bottom + 0.012, rgb_of("f3f0ea"))
    canvas.rectangle(left, top, right, bottom, _mix(zenith, low, 0.35))
    canvas.rectangle(left, _mix(top, bottom, 0.6), right, bottom, _mix(low, rgb_of(pick(rng, LEAF_TONES)), 0.5))
    middle = (left + right) / 2
    canvas.rectangle(middle - 0.004, top, middle + 0.004, bottom, rgb_of("f3f0ea"))
    canvas.rectangle(left, (top + bottom) / 2 - 0.004, right, (top + bottom) / 2 + 0.004, rgb_of("f3f0ea"))


def _painting(rng: Generator, canvas: Canvas, horizon: float) -> None:
    """Abstract art in the colours of skin, hair and clothes: what a network must not mistake for people."""
    left, top = rng.uniform(0, 0.9), horizon * rng.uniform(0.05, 0.4)
    width, height = rng.uniform(0.07, 0.2), horizon * rng.uniform(0.25, 0.5)
    canvas.rectangle(
        left - 0.006, top - 0.008, left + width + 0.006, top + height + 0.008, rgb_of(pick(rng, HAIR_TONES))
    )
    canvas.rectangle(left, top, left + width, top + height, _mix(rgb_of(pick(rng, WALL_TONES)), rgb_of("ffffff"), 0.4))
    for _ in range(int(rng.integers(2, 6))):
        colour = rgb_of(pick(rng, SKIN_TONES + GARMENT_TONES))
        half = min(width * canvas.width / canvas.height, height) * rng.uniform(0.08, 0.22)
        x, y = left + width * rng.uniform(0.25, 0.75), top + height * rng.uniform(0.28, 0.72)
        if rng.random() < 0.5:
            canvas.ellipse(x, y, half, half * rng.uniform(0.6, 1.3), colour)
        else:
            reach_x, reach_y = width * rng.uniform(-0.22, 0.22), height * rng.uniform(-0.25, 0.25)
            canvas.line([(x - reach_x, y - reach_y), (x + reach_x, y + reach_y)], colour, half * 0.7)


def _door(rng: Generator, canvas: Canvas, horizon: float) -> None:
    left, width = rng.uniform(0, 0.85), rng.uniform(0.10, 0.16)
    top, colour = horizon * rng.uniform(0.05, 0.2), vary(rng, rgb_of(pick(rng, HOUSE_TONES)), 0.05)
    canvas.rectangle(left - 0.008, top - 0.01, left + width + 0.008, horizon, colour * 0.85)
    canvas.rectangle(left, top, left + width, horizon, colour)
    for low, high in ((0.08, 0.45), (0.55, 0.92)):
        canvas.rectangle(
            left + 0.18 * width, _mix(top, horizon, low), left + 0.82 * width, _mix(top, horizon, high), colour * 0.93
        )
    canvas.ellipse(left + 0.9 * width, _mix(top, horizon, 0.52), 0.007, 0.007, rgb_of("d8b45f"))


def _shelf(rng: Generator, canvas: Canvas, horizon: float) -> None:
    left, width = rng.uniform(0, 0.8), rng.uniform(0.12, 0.25)
    wood = vary(rng, rgb_of(pick(rng, FLOOR_TONES[:3])), 0.06)
    top, floors = horizon * rng.uniform(0.2, 0.45), int(rng.integers(2, 5))
    canvas.rectangle(left, top, left + width, horizon, wood * 0.55)
    pitch = (horizon - top) / floors
    for floor in range(floors):
        base = top + (floor + 1) * pitch
        x = left + 0.01
        while x < left + width - 0.02:
            thick = rng.uniform(0.006, 0.016)
            tall = pitch * rng.uniform(0.5, 0.82)
            canvas.rectangle(x, base - tall, x + thick, base, vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05) * 0.9)
            x += thick + (rng.uniform(0.01, 0.04) if rng.random() < 0.2 else 0.001)
        canvas.rectangle(left, base - 0.008, left + width, base, wood)
    for x in (left - 0.006, left + width):
        canvas.rectangle(x, top - 0.008, x + 0.006, horizon, wood)
    canvas.rectangle(left, top - 0.008, left + width, top, wood)


def _curtain(rng: Generator, canvas: Canvas, horizon: float) -> None:
    left, folds = rng.uniform(0, 0.9), int(rng.integers(4, 9))
    colour = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
    for fold in range(folds):
        x = left + 0.018 * fold
        canvas.rectangle(x, 0, x + 0.018, horizon - 0.02, colour * (0.86 if fold % 2 else 1.0))


def _beach(rng: Generator, canvas: Canvas, horizon: float, difficulty: float) -> None:
    _, low = _sky(rng, canvas, horizon, difficulty)
    sea, sand = vary(rng, rgb_of("3f93a8"), 0.06), vary(rng, rgb_of("e2c896"), 0.04)
    shore = horizon + rng.uniform(0.04, 0.1)
    canvas.gradient(horizon, shore, _mix(sea, low, 0.3), sea)
    canvas.gradient(shore, 1, sand * 1.02, sand * 0.90)
    canvas.line([(step / 12, shore + 0.004 * math.sin(2.1 * step)) for step in range(13)], rgb_of("f4f6f2"), 0.010)
    for _ in range(_how_many(rng, 5 * difficulty)):  # sunshades
        x, foot, size = rng.uniform(0, 1), shore + rng.uniform(0.0, 0.08), rng.uniform(0.06, 0.16)
        cloth = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
        canvas.line([(x, foot), (x, foot - size)], rgb_of("f4f1ea"), 0.006)
        half = 0.75 * size * canvas.height / canvas.width
        canvas.polygon([(x - half, foot - 0.8 * size), (x + half, foot - 0.8 * size), (x, foot - 1.25 * size)], cloth)
        third = half / 3
        stripe = [(x - third, foot - 0.8 * size), (x + third, foot - 0.8 * size), (x, foot - 1.25 * size)]
        canvas.polygon(stripe, rgb_of("f7f3ea"))
    for _ in range(_how_many(rng, 40 * difficulty)):
        near = rng.random()
        size = 0.002 + 0.006 * near
        y = _mix(shore + 0.01, 1.0, near)
        canvas.ellipse(rng.random(), y, 1.5 * size, size, sand * rng.uniform(0.75, 0.92))


def _gym(rng: Generator, canvas: Canvas, horizon: float, difficulty: float) -> None:
    wall, trim = vary(rng, rgb_of(pick(rng, WALL_TONES)), 0.05), vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
    floor = vary(rng, rgb_of(pick(rng, FLOOR_TONES[:3])), 0.05)
    canvas.gradient(0, horizon, wall, wall * 0.94)
    canvas.rectangle(0, horizon * 0.7, 1, horizon, trim)
    canvas.rectangle(0, horizon * 0.66, 1, horizon * 0.68, trim)
    for _ in range(_how_many(rng, 3 * difficulty)):  # wall bars
        left, width = rng.uniform(0, 0.9), rng.uniform(0.08, 0.16)
        wood = rgb_of("b98d62")
        for bar in range(9):
            y = _mix(0.12 * horizon, 0.97 * horizon, bar / 8)
            canvas.line([(left, y), (left + width, y)], wood, 0.007)
        for x in (left, left + width):
            canvas.rectangle(x - 0.005, 0.06 * horizon, x + 0.005, horizon, wood * 0.85)
    for _ in range(_how_many(rng, 2 * difficulty)):
        _window(rng, canvas, horizon * 0.8)
    canvas.gradient(horizon, 1, floor * 0.92, floor * 1.08)
    line = rgb_of("f4f1ea") if rng.random() < 0.6 else trim
    for _ in range(1 + _how_many(rng, 3 * difficulty)):
        far, near = rng.uniform(-0.2, 1.2), rng.uniform(-0.5, 1.5)
        canvas.line([(far, horizon), (near, 1)], line, 0.008)
        y = _mix(horizon, 1.0, rng.uniform(0.1, 0.9))
        canvas.line([(0, y), (1, y)], line, 0.006)


# ---------------------------------------------------------------------------------------------------------- props


@dataclass(frozen=True)
class Prop:
    """A thing that stands on the ground at y = 0: shapes in metres, and colours (materials, 3) by their material."""

    shapes: list[Shape]
    colours: np.ndarray


def _point(x: float, y: float, z: float) -> np.ndarray:
    return np.array([x, y, z], float)


def _ball_of(x: float, y: float, z: float, radii: tuple[float, float, float], material: int, blend=0.02) -> Ellipsoid:
    return Ellipsoid(_point(x, y, z), np.eye(3), np.array(radii), material, blend)


def _bush(rng: Generator) -> Prop:
    size = rng.uniform(0.25, 0.55)
    shapes: list[Shape] = []
    for _ in range(9):
        radius = size * rng.uniform(0.35, 0.6)
        x, y, z = rng.normal(0, 0.55) * size, -size * rng.uniform(0.35, 1.1), rng.normal(0, 0.3) * size
        shapes.append(_ball_of(x, min(y, -radius), z, (radius, radius, radius), int(rng.integers(1, 3))))
    leaf = vary(rng, rgb_of(pick(rng, LEAF_TONES)), 0.08)
    return Prop(shapes, np.array([leaf, leaf, leaf * 1.1]))


def _potted_plant(rng: Generator) -> Prop:
    tall = rng.uniform(0.5, 1.3)
    pot = Cone(_point(0, -0.32, 0), _point(0, -0.16, 0), 0.19, 0.15, 1, 0.004)
    shapes: list[Shape] = [pot, _ball_of(0, -0.02, 0, (0.15, 0.02, 0.15), 1, 0.03)]
    for _ in range(9):
        lean_x, lean_z = rng.normal(0, 0.28) * tall, rng.normal(0, 0.15) * tall
        tip = _point(lean_x, -0.45 - tall * rng.uniform(0.5, 1.0), lean_z)
        shapes.append(Cone(_point(0.3 * lean_x, -0.48, 0.02), tip, 0.032 * tall, 0.007, int(rng.integers(2, 4)), 0.004))
    leaf = vary(rng, rgb_of(pick(rng, LEAF_TONES)), 0.08)
    pot_colour = vary(rng, rgb_of(pick(rng, ("b8674a", "d8d2c4", "6b7a80", "c98f72"))), 0.06)
    return Prop(shapes, np.array([leaf, pot_colour, leaf, leaf * 0.85]))


def _ball(rng: Generator) -> Prop:
    radius = rng.uniform(0.12, 0.38)
    colour = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
    return Prop([_ball_of(0, -radius, 0, (radius, radius, radius), 1)], np.array([colour, colour]))


def _balloon(rng: Generator) -> Prop:
    radius, up = rng.uniform(0.12, 0.2), rng.uniform(0.9, 2.0)
    string = Cone(_point(0, -up + radius, 0), _point(rng.normal(0, 0.05), -0.5 * up, 0), 0.004, 0.004, 2, 0.002)
    balloon = _ball_of(0, -up, 0, (0.9 * radius, 1.1 * radius, 0.9 * radius), 1)
    colour = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
    return Prop([string, balloon], np.array([colour, colour, rgb_of("d8d2c4")]))


def _lamp_post(rng: Generator) -> Prop:
    tall = rng.uniform(1.5, 3.0)
    shapes: list[Shape] = [
        Cone(_point(0, -0.06, 0), _point(0, -0.25, 0), 0.07, 0.04, 1),
        Cone(_point(0, -0.2, 0), _point(0, -tall, 0), 0.035, 0.028, 1),
        _ball_of(0, -tall - 0.12, 0, (0.16, 0.16, 0.16), 2, 0.004),
    ]
    return Prop(shapes, np.array([rgb_of("4a5058"), rgb_of("4a5058"), rgb_of("fff1c9")]))


def _traffic_cone(rng: Generator) -> Prop:
    tall, orange = rng.uniform(0.45, 0.8), vary(rng, rgb_of("ee6c2c"), 0.04)
    bands = []
    for step in range(5):
        low, high = step / 5, (step + 1) / 5
        radii = (0.30 - 0.24 * low) * tall, (0.30 - 0.24 * high) * tall
        bands.append(
            Cone(_point(0, -0.08 - low * tall, 0), _point(0, -0.08 - high * tall, 0), *radii, 1 + step % 2, 0.002)
        )
    base = _ball_of(0, -0.04, 0, (0.38 * tall, 0.04, 0.38 * tall), 1, 0.01)
    return Prop([base, *bands], np.array([orange, orange, rgb_of("f4f1ea")]))


def _bench(rng: Generator) -> Prop:
    half, wood = rng.uniform(0.6, 0.9), vary(rng, rgb_of(pick(rng, FLOOR_TONES[:3])), 0.06)
    shapes: list[Shape] = []
    for z in (-0.15, 0.0, 0.15):
        shapes.append(Cone(_point(-half, -0.45, z), _point(half, -0.45, z), 0.045, 0.045, 1, 0.003))
    for y in (-0.66, -0.80):
        shapes.append(Cone(_point(-half, y, -0.22), _point(half, y, -0.22), 0.045, 0.045, 1, 0.003))
    for x in (-0.8 * half, 0.8 * half):
        shapes.append(Cone(_point(x, -0.02, 0.14), _point(x, -0.42, 0.10), 0.025, 0.025, 2, 0.003))
        shapes.append(Cone(_point(x, -0.02, -0.16), _point(x, -0.84, -0.26), 0.025, 0.025, 2, 0.003))
    return Prop(shapes, np.array([wood, wood, rgb_of("3a3d42")]))


def _fence(rng: Generator) -> Prop:
    half, tall = rng.uniform(0.7, 1.4), rng.uniform(0.6, 1.0)
    wood = vary(rng, rgb_of(pick(rng, ("f1ece0", "a8845c", "7d6450", "6b7a80"))), 0.05)
    shapes: list[Shape] = [
        Cone(_point(-half, -share * tall, 0), _point(half, -share * tall, 0), 0.028, 0.028, 1, 0.003)
        for share in (0.35, 0.78)
    ]
    count = int(rng.integers(3, 7))
    for post in range(count):
        x = half * (2 * post / (count - 1) - 1) * 0.94
        shapes.append(Cone(_point(x, -0.03, 0.03), _point(x, -tall, 0.03), 0.04, 0.04, 1, 0.003))
    return Prop(shapes, np.array([wood, wood]))


def _beanbag(rng: Generator) -> Prop:
    cloth, size = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05), rng.uniform(0.32, 0.5)
    shapes: list[Shape] = [
        _ball_of(0, -0.55 * size, 0, (size, 0.55 * size, size), 1, 0.1),
        _ball_of(0.1 * size, -1.0 * size, -0.35 * size, (0.7 * size, 0.7 * size, 0.5 * size), 1, 0.1),
    ]
    return Prop(shapes, np.array([cloth, cloth]))


def _coat_stand(rng: Generator) -> Prop:
    """A pole with coats: limbs and clothes without a person."""
    shapes: list[Shape] = [
        Cone(_point(0, -0.03, 0), _point(0, -1.75, 0), 0.025, 0.022, 1, 0.003),
        _ball_of(0, -0.02, 0, (0.25, 0.03, 0.25), 1, 0.01),
    ]
    tones = [rgb_of("6b4d35"), rgb_of("6b4d35")]
    for coat in range(int(rng.integers(1, 4))):
        x, length, material = rng.uniform(-0.22, 0.22), rng.uniform(0.5, 0.95), 2 + coat
        top = _point(0.5 * x, -rng.uniform(1.45, 1.65), rng.uniform(-0.1, 0.1))
        shapes.append(Cone(top, top + _point(x, length, 0), 0.06, 0.15, material, 0.01, open_end=True))
        sleeve_end = top + _point(1.4 * x, 0.65 * length, 0.1)
        shapes.append(Cone(top, sleeve_end, 0.05, 0.04, material, 0.01))
        tones.append(vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05))
    return Prop(shapes, np.array(tones))


PROPS: tuple[Callable[[Generator], Prop], ...] = (
    _bush, _bush, _potted_plant, _potted_plant, _ball, _ball, _balloon, _balloon, _lamp_post, _traffic_cone, _bench,
    _fence, _beanbag, _coat_stand,
)  # fmt: skip


def sample_prop(rng: Generator) -> Prop:
    """A random thing to stand in front of, between or behind the people."""
    return pick(rng, PROPS)(rng)
