"""Dresses a posed body: flesh, clothes, hair and face as relief shapes, with the colours painted on them.

Left and right limbs look the same, and whatever is worn sits on the middle line, so that only the facing direction
(face, hair, print on the chest, toes) tells left from right.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.random import Generator

from hrpose.synth.body import EYE_ON_HEAD, SIDES, Body, Pose
from hrpose.synth.relief import Cone, Ellipsoid, Layer, Light, Relief, Shape, extent_of


class Material(IntEnum):
    """What a sample of the relief shows; materials from SEAT on are not part of the person."""

    SKIN = 1
    HEAD = 2
    HAIR = 3
    TOP = 4
    BOTTOM = 5
    SHOE = 6
    SOCK = 7
    HAT = 8
    SLEEVE = 9
    SEAT = 10


SKIN_TONES = ("ffe0c7", "f6cfae", "eebd97", "dda67b", "c98d62", "b0754c", "93603c", "774a2d", "5b3621", "452818")
HAIR_TONES = ("17120f", "2a1c14", "3d2817", "5a3a21", "7a4f2b", "a8763e", "d2a860", "e4c98c", "8d3b1f", "8c8a89")
GARMENT_TONES = (
    "f4f1ea", "e9dcc3", "2f3a4a", "24292f", "8b98a6", "d94f45", "b23a48", "ef8354", "f2b134", "f7d774", "7fb069",
    "3f8f6b", "2a6f6b", "52b4b0", "4f9bd9", "2e6fb7", "27476e", "6c5b9e", "a077b5", "e392a9", "c9617f",
)  # fmt: skip
TROUSER_TONES = (
    "2b3a55", "3e5577", "5d7ba3", "1f2328", "3a3d42", "6b6f73", "8a7a5f", "b8a27a", "4b3d30", "5a6446", "d8d2c4",
    "7a3f4a",
)  # fmt: skip
SHOE_TONES = ("f5f5f2", "24262b", "7b4b2a", "c43d3d", "2f62a8", "d9a441", "4a8f6d", "b9bcc0")
SEAT_TONES = ("c9836a", "7d95a8", "b7a58c", "8aa07b", "a3809c", "d8b46a")

# Half thicknesses as a share of height, at the two ends of a limb; tuned by eye, and scaled by the build.
BUILD_RANGE = (0.86, 1.18)
UPPER_ARM_RADII, FOREARM_RADII = (0.029, 0.023), (0.024, 0.016)
THIGH_RADII, SHANK_RADII = (0.050, 0.034), (0.034, 0.021)
NECK_RADIUS = 0.030
CLOTH = 1.10  # loose cloth over the limb's radius

# How far, as a share of height, the surface may lie before the joint's centre for the keypoint to count as visible.
# About the flesh over the joint, times 1.5 for seams where shapes melt together; facial points lie on the surface.
FLESH_SHARE = {"eye": 0.012, "ear": 0.024, "nose": 0.012, "shoulder": 0.062, "elbow": 0.042, "wrist": 0.034}
FLESH_SHARE |= {"hip": 0.095, "knee": 0.058, "ankle": 0.055, "neck": 0.050, "head_top": 0.030}


@dataclass(frozen=True)
class Outfit:
    """What a person looks like, apart from the pose. Lengths of sleeves and legs are shares of the whole limb."""

    build: float
    colours: np.ndarray  # (materials, 3) RGB
    sleeve: float  # 0 none, 1 to the elbow, 2 to the wrist
    trouser: float  # 1 to the knee, 2 to the ankle; under a skirt, what fills it up
    skirt: bool
    hair: str
    beard: bool
    hat: str
    pattern: str
    pattern_colour: np.ndarray
    pattern_pitch: float  # stripes' period as a share of height
    sole_colour: np.ndarray


def rgb_of(code: str) -> np.ndarray:
    """(3,) float RGB of a hexadecimal colour."""
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], float)


def pick(rng: Generator, items: tuple):
    """One of the items, all equally likely."""
    return items[int(rng.integers(len(items)))]


def vary(rng: Generator, colour: np.ndarray, spread: float) -> np.ndarray:
    """The colour a little darker or lighter and shifted in hue, by at most twice `spread` of its value."""
    brightness, hue = rng.uniform(-1.5, 1.5), rng.uniform(-0.5, 0.5, 3)
    return np.clip(colour * (1 + spread * brightness) * (1 + spread * hue), 8, 250)


def sample_outfit(rng: Generator) -> Outfit:
    """Random clothes, hair and skin from the palettes."""
    skin = vary(rng, rgb_of(pick(rng, SKIN_TONES)), 0.03)
    hair = vary(rng, rgb_of(pick(rng, HAIR_TONES)), 0.08)
    unlike_skin = tuple(tone for tone in GARMENT_TONES if np.abs(rgb_of(tone) - skin).sum() > 120)
    top = vary(rng, rgb_of(pick(rng, unlike_skin)), 0.05)
    skirt = rng.random() < 0.14
    bottom = vary(rng, rgb_of(pick(rng, GARMENT_TONES if skirt else TROUSER_TONES)), 0.06)
    if np.abs(top - bottom).sum() < 60:  # tell shirt from trousers
        bottom = np.clip(bottom * 0.6, 8, 250) if bottom.sum() > 250 else np.clip(bottom + 90, 8, 250)
    hat = vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05)
    shoe = vary(rng, rgb_of(pick(rng, SHOE_TONES)), 0.05)
    colours = np.zeros((len(Material) + 1, 3))
    colours[Material.SKIN] = skin
    colours[Material.HEAD] = skin
    colours[Material.HAIR] = hair
    colours[Material.TOP] = top
    colours[Material.SLEEVE] = top
    colours[Material.BOTTOM] = bottom
    colours[Material.SHOE] = shoe
    colours[Material.SOCK] = rgb_of("eceae4") if rng.random() < 0.6 else shoe * 0.8
    colours[Material.HAT] = hat
    colours[Material.SEAT] = vary(rng, rgb_of(pick(rng, SEAT_TONES)), 0.06)
    hair_style = pick(rng, ("short", "short", "short", "long", "long", "bun", "ponytail", "afro", "bald"))
    pattern = pick(rng, ("plain", "plain", "logo", "logo", "stripes", "yoke", "band"))
    contrast = rgb_of("f4f1ea") if top.sum() < 380 else vary(rng, rgb_of(pick(rng, TROUSER_TONES)), 0.05)
    return Outfit(
        build=rng.uniform(*BUILD_RANGE),
        colours=colours,
        sleeve=pick(rng, (0.0, 0.5, 0.6, 0.7, 2.0, 2.0, 2.0)),
        trouser=0.5 if skirt else pick(rng, (0.75, 0.9, 2.0, 2.0, 2.0, 2.0)),
        skirt=skirt,
        hair=hair_style,
        beard=hair_style in ("short", "bald") and rng.random() < 0.35,
        hat=pick(rng, ("cap", "beanie")) if hair_style != "afro" and rng.random() < 0.16 else "",
        pattern=pattern,
        pattern_colour=contrast if rng.random() < 0.6 else vary(rng, rgb_of(pick(rng, GARMENT_TONES)), 0.05),
        pattern_pitch=rng.uniform(0.028, 0.05),
        sole_colour=rgb_of("f2f0ea") if rng.random() < 0.7 else shoe * 0.5,
    )


# --------------------------------------------------------------------------------------------------------- shapes


def dress(body: Body, outfit: Outfit, pose: Pose) -> list[Shape]:
    """The person as shapes; a sitting one with its seat last."""
    shapes = _torso(body, outfit)
    for side, sign in SIDES:
        shapes += _arm(body, outfit, side)
        shapes += _leg(body, outfit, side, sign)
    if outfit.skirt:
        shapes.append(_skirt(body, outfit))
    shapes += _head(body, outfit)
    if pose.seated:
        shapes.append(_seat(body, extent_of(shapes)[1][1]))
    return shapes


def _torso(body: Body, outfit: Outfit) -> list[Shape]:
    height, joints = body.height, body.joints
    pelvis, chest = body.frames["pelvis"], body.frames["chest"]
    build = outfit.build
    trunk = body.segments["trunk"]
    ribs = chest @ (0.0, -0.70 * trunk, 0.004 * height)
    belly = 0.5 * (chest + pelvis) @ (0.0, -0.34 * trunk, 0.004 * height)
    hips = pelvis @ (0.0, -0.012 * height, 0.0)
    melt = 0.020 * height
    shapes: list[Shape] = [
        Ellipsoid(hips, pelvis, height * build * np.array([0.092, 0.075, 0.066]), Material.BOTTOM, melt),
        Ellipsoid(belly, chest, height * build * np.array([0.084, 0.115, 0.060]), Material.TOP, melt),
        Ellipsoid(ribs, chest, height * build * np.array([0.102, 0.120, 0.064]), Material.TOP, melt),
    ]
    shoulder_radius = 0.030 * height * build
    for side, _ in SIDES:
        slope = joints["neck"] + chest @ (0.0, -0.002 * height, -0.006 * height)
        shapes.append(
            Cone(slope, joints[f"{side}_shoulder"], 0.032 * height, shoulder_radius, Material.TOP, 0.014 * height)
        )
    collar = joints["neck"] + chest @ (0.0, -0.012 * height, 0.002 * height)
    shapes.append(Cone(collar, joints["head"], *2 * (NECK_RADIUS * height,), Material.SKIN, 0.003 * height))
    return shapes


def _limb(start, end, radii: tuple[float, float], until: float, bare: int, worn: int, melt: float) -> list[Shape]:
    """A limb segment, clothed over the first `until` (0..1) of its length."""
    shapes: list[Shape] = []
    if until < 1:
        shapes.append(Cone(start, end, *radii, bare, melt))
    if until > 0:
        until = min(until, 1.0)
        end_radius = radii[0] + (radii[1] - radii[0]) * until
        cuff = start + (end - start) * until
        loose = 1.0 + (CLOTH - 1.0) * (1.0 if until == 1 else 2.0)
        shapes.append(Cone(start, cuff, radii[0] * CLOTH, end_radius * loose, worn, melt, open_end=until < 1))
    return shapes


def _arm(body: Body, outfit: Outfit, side: str) -> list[Shape]:
    height, joints = body.height, body.joints
    shoulder, elbow, wrist = (joints[f"{side}_{joint}"] for joint in ("shoulder", "elbow", "wrist"))
    thickness, melt = height * outfit.build, 0.008 * height
    upper = UPPER_ARM_RADII[0] * thickness, UPPER_ARM_RADII[1] * thickness
    lower = FOREARM_RADII[0] * thickness, FOREARM_RADII[1] * thickness
    forearm = body.frames[f"{side}_forearm"]
    palm = wrist + forearm @ (0.0, 0.036 * height, 0.002 * height)
    thumb = wrist + forearm @ (0.0, 0.022 * height, 0.004 * height)
    cuff = 0.94 if outfit.sleeve == 2 else max(outfit.sleeve - 1, 0.0)
    return [
        *_limb(shoulder, elbow, upper, outfit.sleeve, Material.SKIN, Material.SLEEVE, melt),
        *_limb(elbow, wrist, lower, cuff, Material.SKIN, Material.SLEEVE, melt),
        Ellipsoid(palm, forearm, height * np.array([0.013, 0.040, 0.022]), Material.SKIN, 0.006 * height),
        Cone(
            thumb,
            thumb + forearm @ (0.0, 0.020 * height, 0.018 * height),
            0.009 * height,
            0.007 * height,
            Material.SKIN,
            0.005 * height,
        ),
    ]


def _leg(body: Body, outfit: Outfit, side: str, sign: float) -> list[Shape]:
    height, joints = body.height, body.joints
    hip, knee, ankle = (joints[f"{side}_{joint}"] for joint in ("hip", "knee", "ankle"))
    thickness, melt = height * outfit.build, 0.010 * height
    upper = THIGH_RADII[0] * thickness, THIGH_RADII[1] * thickness
    lower = SHANK_RADII[0] * thickness, SHANK_RADII[1] * thickness
    foot = body.frames[f"{side}_foot"]
    shapes = _limb(hip, knee, upper, outfit.trouser, Material.SKIN, Material.BOTTOM, melt)
    calf = knee + (ankle - knee) * 0.32 + body.frames[f"{side}_shank"] @ (0.0, 0.0, -0.010 * height)
    hem = 0.93 if outfit.trouser == 2 else max(outfit.trouser - 1, 0.0)
    shapes += _limb(knee, ankle, lower, hem, Material.SKIN, Material.BOTTOM, melt)
    if hem == 0:
        calf_radii = thickness * np.array([0.030, 0.062, 0.030])
        shapes.append(Ellipsoid(calf, body.frames[f"{side}_shank"], calf_radii, Material.SKIN, melt))
        sock_top = knee + (ankle - knee) * 0.72
        shapes.append(Cone(ankle, sock_top, lower[1] * 1.12, lower[1] * 1.25, Material.SOCK, 0.003 * height, True))
    shapes.append(
        Cone(
            joints[f"{side}_ankle"] + foot @ (0.0, 0.004 * height, 0.0),
            joints[f"{side}_foot"] + foot @ (0.0, 0.000, 0.010 * height),
            0.024 * height,
            0.020 * height,
            Material.SHOE,
            0.006 * height,
        )
    )
    shapes.append(
        Ellipsoid(joints[f"{side}_foot"], foot, height * np.array([0.028, 0.019, 0.080]), Material.SHOE, 0.008 * height)
    )
    return shapes


def _skirt(body: Body, outfit: Outfit) -> Cone:
    """A bell from the waist to above the knees, wide enough for them."""
    joints, height = body.joints, body.height
    thighs = [joints[f"{side}_knee"] - joints[f"{side}_hip"] for side, _ in SIDES]
    spread = float(np.linalg.norm(thighs[0] - thighs[1]))
    waist = body.frames["pelvis"] @ (0.0, -0.030 * height, 0.0)
    hem = waist + 0.5 * (thighs[0] + thighs[1]) * 0.82 + body.frames["pelvis"] @ (0.0, 0.03 * height, 0.0)
    hem_radius = 0.100 * height * outfit.build + 0.40 * spread
    return Cone(waist, hem, 0.074 * height * outfit.build, hem_radius, Material.BOTTOM, 0.008 * height, open_end=True)


def _head(body: Body, outfit: Outfit) -> list[Shape]:
    height, frame, radii = body.height, body.frames["head"], body.head_radii
    centre = body.joints["head"]

    def on_head(x: float, y: float, z: float) -> np.ndarray:
        return centre + frame @ (radii * (x, y, z))

    shapes: list[Shape] = [Ellipsoid(centre, frame, radii, Material.HEAD, 0.004 * height)]
    shapes.append(  # jaw and chin
        Ellipsoid(on_head(0, 0.42, 0.22), frame, radii * (0.74, 0.62, 0.72), Material.HEAD, 0.012 * height)
    )
    nose = Cone(on_head(0, -0.02, 0.93), on_head(0, 0.22, 1.02), 0.004 * height, 0.0085 * height, Material.HEAD)
    shapes.append(nose)
    for side, _ in SIDES:
        shapes.append(
            Ellipsoid(body.joints[f"{side}_ear"], frame, height * np.array([0.006, 0.017, 0.011]), Material.SKIN, 0.002)
        )
    shapes += _hair(outfit, on_head, frame, radii, height)
    if outfit.hat:
        shapes.append(Ellipsoid(on_head(0, -0.30, -0.12), frame, radii * (1.14, 0.88, 1.14), Material.HAT, 0.002))
    if outfit.hat == "cap":
        shapes.append(Ellipsoid(on_head(0, -0.42, 1.05), frame, radii * (0.80, 0.07, 0.62), Material.HAT, 0.004))
    return shapes


def _hair(outfit: Outfit, on_head, frame: np.ndarray, radii: np.ndarray, height: float) -> list[Shape]:
    """A shell set back and up from the skull, so that the face comes out of it in front; and what hangs from it."""
    if outfit.hair == "bald":
        return []
    crisp = 0.003 * height
    if outfit.hair == "afro":
        return [Ellipsoid(on_head(0, -0.34, -0.32), frame, radii * (1.42, 1.10, 1.22), Material.HAIR, crisp)]
    shapes: list[Shape] = [Ellipsoid(on_head(0, -0.20, -0.20), frame, radii * (1.06, 0.98, 1.00), Material.HAIR, crisp)]
    if outfit.hair == "long":
        shapes += [
            Ellipsoid(on_head(0, 0.30, -0.42), frame, radii * (1.10, 1.05, 0.72), Material.HAIR, 0.010 * height),
            Ellipsoid(on_head(0, 1.00, -0.55), frame, radii * (0.98, 0.85, 0.42), Material.HAIR, 0.010 * height),
        ]
    elif outfit.hair == "bun":
        shapes.append(Ellipsoid(on_head(0, -0.98, -0.62), frame, radii * (0.42, 0.34, 0.40), Material.HAIR, crisp))
    elif outfit.hair == "ponytail":
        tail = Cone(
            on_head(0, -0.30, -1.12), on_head(0, 0.95, -1.30), 0.022 * height, 0.010 * height, Material.HAIR, crisp
        )
        shapes.append(tail)
    return shapes


def _seat(body: Body, ground_y: float) -> Ellipsoid:
    """An upright pouf between the hips and the ground."""
    hips = body.joints["pelvis"]
    top = float(hips[1]) + 0.045 * body.height
    half = max(0.5 * (ground_y - top), 0.05)
    backwards = body.frames["pelvis"] @ (0.0, 0.0, -0.02 * body.height)
    centre = np.array([hips[0] + backwards[0], top + half, hips[2] + backwards[2]])
    return Ellipsoid(centre, np.eye(3), np.array([0.27, half, 0.27]), Material.SEAT, 0.004)


# ------------------------------------------------------------------------------------------------------- painting


def paint_figure(relief: Relief, body: Body, outfit: Outfit, light: Light) -> Layer:
    """Face, prints and soles on the finished relief, then light."""
    paint = {
        Material.HEAD: _paint_face(relief, body, outfit),
        Material.TOP: _paint_top(relief, body, outfit),
        Material.SHOE: _paint_soles(relief, body, outfit),
    }
    return relief.shade(outfit.colours, paint, light, solid_below=Material.SEAT)


def _local(points: np.ndarray, origin: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates (n,), (n,), (n,) of points (n, 3) in a part's frame. Written out: BLAS may differ in the last bit."""
    x, y, z = (points[:, axis] - np.float32(origin[axis]) for axis in range(3))
    return tuple(
        x * np.float32(frame[0, axis]) + y * np.float32(frame[1, axis]) + z * np.float32(frame[2, axis])
        for axis in range(3)
    )


def _paint_face(relief: Relief, body: Body, outfit: Outfit) -> np.ndarray:
    """Eyes, brows, mouth, cheeks, beard; coordinates in units of the head's radii."""
    index, points = relief.points(Material.HEAD)
    skin, hair = outfit.colours[Material.HEAD], outfit.colours[Material.HAIR]
    colours = np.repeat(skin.astype(np.float32)[None], len(index), 0)
    if len(index) == 0:
        return colours
    across, down, ahead = _local(points, body.joints["head"], body.frames["head"])
    across = np.abs(across) / np.float32(body.head_radii[0])  # the face is symmetric
    down, ahead = down / np.float32(body.head_radii[1]), ahead / np.float32(body.head_radii[2])
    front = ahead > 0.1

    def spot(x: float, y: float, half_width: float, half_height: float, sag: float = 0.0) -> np.ndarray:
        """Inside an ellipse at (+-x, y), its middle bent down by sag * across^2."""
        left_right = (across - np.float32(x)) / np.float32(half_width)
        up_down = (down - np.float32(y) + np.float32(sag) * across * across) / np.float32(half_height)
        return front & (left_right * left_right + up_down * up_down < 1)

    eye_x, eye_y = float(EYE_ON_HEAD[0]), float(EYE_ON_HEAD[1])
    cheeks = spot(0.52, 0.32, 0.19, 0.15)
    colours[cheeks] = skin * 0.82 + np.array([225, 90, 80]) * 0.18
    if outfit.beard:
        colours[
            front & (down > 0.50 - 0.55 * np.maximum(across - 0.45, 0)) & (across * across + down * down > 0.34)
        ] = hair
    colours[spot(0.0, 0.60, 0.30, 0.055, sag=0.9)] = skin * 0.45 + np.array([150, 40, 45]) * 0.45
    colours[spot(eye_x, eye_y, 0.17, 0.095)] = (248, 246, 242)
    colours[spot(eye_x, eye_y + 0.005, 0.090, 0.090)] = (38, 27, 22)
    brow = hair if outfit.hair != "bald" else skin * 0.45
    colours[spot(eye_x, eye_y - 0.20, 0.21, 0.038)] = brow * 0.8
    return colours


def _paint_top(relief: Relief, body: Body, outfit: Outfit) -> np.ndarray:
    """The neckline, and a print on the chest, stripes, a yoke or a band; in the chest's frame, in shares of height."""
    index, points = relief.points(Material.TOP)
    colours = np.repeat(outfit.colours[Material.TOP].astype(np.float32)[None], len(index), 0)
    across, down, ahead = _local(points, body.joints["neck"], body.frames["chest"])
    scale = np.float32(1 / body.height)
    across, down = across * scale, down * scale
    if outfit.pattern == "stripes":
        chosen = np.floor(down / np.float32(outfit.pattern_pitch)).astype(np.int64) % 2 == 0
    elif outfit.pattern == "yoke":
        chosen = down < np.float32(0.085)
    elif outfit.pattern == "band":
        chosen = np.abs(down - np.float32(0.135)) < np.float32(0.022)
    elif outfit.pattern == "logo":
        chosen = (_square(across) + _square(down - np.float32(0.105)) < np.float32(0.040 * 0.040)) & (ahead > 0)
    else:
        chosen = np.zeros(len(index), bool)
    colours[chosen] = outfit.pattern_colour
    neckline = _square(across * np.float32(1.3)) + _square(down + np.float32(0.004)) < np.float32(0.036 * 0.036)
    colours[neckline & (ahead > 0)] = outfit.colours[Material.SKIN]
    return colours


def _square(values: np.ndarray) -> np.ndarray:
    return values * values


def _paint_soles(relief: Relief, body: Body, outfit: Outfit) -> np.ndarray:
    """The lowest part of each shoe in the colour of the sole."""
    index, points = relief.points(Material.SHOE)
    colours = np.repeat(outfit.colours[Material.SHOE].astype(np.float32)[None], len(index), 0)
    for side, _ in SIDES:
        across, down, ahead = _local(points, body.joints[f"{side}_foot"], body.frames[f"{side}_foot"])
        near = across * across + ahead * ahead < np.float32((0.11 * body.height) ** 2)
        colours[near & (down > np.float32(0.010 * body.height))] = outfit.sole_colour
    return colours


def flesh_over(keypoint: str, height: float) -> float:
    """Metres of flesh that may cover the keypoint of a person of this height and leave it visible."""
    return FLESH_SHARE[keypoint.removeprefix("left_").removeprefix("right_")] * height
