"""A small depth-buffer renderer: round cones and ellipsoids, melted together where they meet, softly lit.

Everything is seen along z by a distant camera (no perspective inside one object), so a pixel holds one depth and one
material: z(x, y) in metres towards the camera. Normals are taken from the finished depths.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

EMPTY_DEPTH = np.float32(-8.0)  # metres; behind anything drawn, near enough to keep float32 exact to a micrometre
SPARE_BORDER = 1  # empty sub-pixels around the window, so that every drawn pixel has four neighbours


@dataclass(frozen=True)
class Cone:
    """Spheres of radius `start_radius` to `end_radius` swept from `start` to `end`; metres in the body frame."""

    start: np.ndarray
    end: np.ndarray
    start_radius: float
    end_radius: float
    material: int
    blend: float = 0.010  # metres over which the surface melts into what it meets
    open_end: bool = False  # without the cap at `end`, as a sleeve

    @cached_property
    def extent(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner, each (3,) metres."""
        return (
            np.minimum(self.start - self.start_radius, self.end - self.end_radius),
            np.maximum(self.start + self.start_radius, self.end + self.end_radius),
        )


@dataclass(frozen=True)
class Ellipsoid:
    """Half axes `radii` along the columns of `frame`, around `centre`; metres in the body frame."""

    centre: np.ndarray
    frame: np.ndarray
    radii: np.ndarray
    material: int
    blend: float = 0.010

    @cached_property
    def extent(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner, each (3,) metres."""
        reach = np.sqrt(((self.frame * self.radii) ** 2).sum(1))
        return self.centre - reach, self.centre + reach


Shape = Cone | Ellipsoid


def extent_of(shapes: list[Shape]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner of all shapes together, each (3,) metres."""
    corners = [shape.extent for shape in shapes]
    return np.min([low for low, _ in corners], 0), np.max([high for _, high in corners], 0)


@dataclass(frozen=True)
class View:
    """Where a body frame lands in the image: x_img = x * scale + origin_x, pixel centres at integers."""

    scale: float  # image pixels per metre
    origin_x: float
    origin_y: float

    def project(self, point: np.ndarray) -> tuple[float, float]:
        """(x, y) in image pixels of a point in metres."""
        return float(point[0]) * self.scale + self.origin_x, float(point[1]) * self.scale + self.origin_y


@dataclass(frozen=True)
class Light:
    """A soft lamp: unit direction towards it (x right, y down, z to the camera); `ambient` is the light everywhere."""

    direction: tuple[float, float, float]
    ambient: float


@dataclass(frozen=True)
class Layer:
    """A finished object at image resolution: colours already multiplied by coverage.

    left, top: image pixel of the first column and row.
    rgb, coverage: (h, w, 3) float32 0..255 and (h, w) float32 0..1.
    solid: (h, w) bool, what belongs to the object proper (a seat is drawn with its person but is not solid).
    """

    left: int
    top: int
    rgb: np.ndarray
    coverage: np.ndarray
    solid: np.ndarray

    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image that the layer covers."""
        height, width = self.coverage.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


class Relief:
    """The depth buffer of one object, `supersample` samples per image pixel and direction, cut to the image.

    depth: (h, w) float32 metres; material: (h, w) uint8, 0 where nothing is.
    """

    def __init__(self, shapes: list[Shape], view: View, width: int, height: int, supersample: int):
        low, high = extent_of(shapes)
        left, top = view.project(low)
        right, bottom = view.project(high)
        self.left, self.right = max(math.floor(left), 0), min(math.ceil(right) + 1, width)
        self.top, self.bottom = max(math.floor(top), 0), min(math.ceil(bottom) + 1, height)
        self.supersample = supersample
        self.empty = self.left >= self.right or self.top >= self.bottom
        if self.empty:
            return
        columns = (self.right - self.left) * supersample + 2 * SPARE_BORDER
        rows = (self.bottom - self.top) * supersample + 2 * SPARE_BORDER
        self.step = 1.0 / (view.scale * supersample)  # metres between samples
        self.x_first = (self.left - 0.5 - view.origin_x) / view.scale + (0.5 - SPARE_BORDER) * self.step
        self.y_first = (self.top - 0.5 - view.origin_y) / view.scale + (0.5 - SPARE_BORDER) * self.step
        self.xs = (self.x_first + self.step * np.arange(columns)).astype(np.float32)
        self.ys = (self.y_first + self.step * np.arange(rows)).astype(np.float32)
        self.depth = np.full((rows, columns), EMPTY_DEPTH, np.float32)
        self.material = np.zeros((rows, columns), np.uint8)
        for shape in shapes:
            self._add(shape)

    def depth_at(self, point: np.ndarray) -> float:
        """Depth in metres of the surface in front of or behind a point; EMPTY_DEPTH where there is none."""
        column = round((float(point[0]) - self.x_first) / self.step)
        row = round((float(point[1]) - self.y_first) / self.step)
        if not (0 <= row < self.depth.shape[0] and 0 <= column < self.depth.shape[1]):
            return float(EMPTY_DEPTH)
        return float(self.depth[row, column])

    def _add(self, shape: Shape) -> None:
        low, high = shape.extent
        # first and past-the-last sample inside the extent, never on the spare border
        columns, rows = len(self.xs) - SPARE_BORDER, len(self.ys) - SPARE_BORDER
        left = max(math.ceil((low[0] - self.x_first) / self.step), SPARE_BORDER)
        right = min(math.floor((high[0] - self.x_first) / self.step) + 1, columns)
        top = max(math.ceil((low[1] - self.y_first) / self.step), SPARE_BORDER)
        bottom = min(math.floor((high[1] - self.y_first) / self.step) + 1, rows)
        if left >= right or top >= bottom:
            return
        window = slice(top, bottom), slice(left, right)
        surface = _cone_depth if isinstance(shape, Cone) else _ellipsoid_depth
        self._melt(window, surface(shape, self.xs[left:right], self.ys[top:bottom]), shape)

    def _melt(self, window: tuple[slice, slice], depth: np.ndarray, shape: Shape) -> None:
        """Smooth maximum: w = clip(1/2 + (new - old) / 2b, 0, 1), z = (1 - w) old + w new + b w (1 - w)."""
        old = self.depth[window]
        depth -= old
        weight = depth * np.float32(0.5 / shape.blend)
        weight += np.float32(0.5)
        np.clip(weight, 0, 1, out=weight)
        np.copyto(self.material[window], np.uint8(shape.material), where=weight > np.float32(0.5))
        depth += np.float32(shape.blend)
        depth *= weight
        weight *= weight
        weight *= np.float32(shape.blend)
        depth -= weight
        old += depth

    def points(self, material: int) -> tuple[np.ndarray, np.ndarray]:
        """Flat indices (n,) of the samples of a material, and their positions (n, 3) in metres."""
        index = np.flatnonzero(self.material == material)
        row, column = np.divmod(index, len(self.xs))
        return index, np.stack([self.xs[column], self.ys[row], self.depth.ravel()[index]], 1)

    def shade(self, colours: np.ndarray, paint: dict[int, np.ndarray], light: Light, solid_below: int) -> Layer:
        """Light the surface and reduce it to image resolution.

        colours: (materials, 3) RGB 0..255 by material.
        paint: by material, (n, 3) colours of its `points`, in place of the one colour.
        solid_below: materials from this number on are scenery drawn along with the object.
        """
        index = np.flatnonzero(self.material)
        material = self.material.ravel()[index]
        albedo = colours.astype(np.float32)[material]
        for painted, values in paint.items():
            albedo[material == painted] = values
        lit = self._brightness(index, light)[:, None] * albedo
        rgba = np.zeros((*self.material.shape, 4), np.uint8)
        flat = rgba.reshape(-1, 4)
        flat[index, :3] = np.clip(lit + np.float32(0.5), 0, 255)
        flat[index, 3] = 255
        solid = np.where((self.material > 0) & (self.material < solid_below), np.uint8(255), np.uint8(0))
        inner = slice(SPARE_BORDER, -SPARE_BORDER)
        # RGB is zero outside, so the plain mean over samples is the colour multiplied by the coverage
        reduced = [Image.fromarray(rgba[inner, inner, channel]).reduce(self.supersample) for channel in range(4)]
        reduced_solid = np.asarray(Image.fromarray(solid[inner, inner]).reduce(self.supersample))
        rgb = np.stack([np.asarray(channel) for channel in reduced[:3]], 2).astype(np.float32)
        coverage = np.asarray(reduced[3]).astype(np.float32) / np.float32(255)
        return Layer(self.left, self.top, rgb, coverage, reduced_solid >= 128)

    def _brightness(self, index: np.ndarray, light: Light) -> np.ndarray:
        """Half-Lambert shading, (n,) about 0.5..1.1, of the samples at these flat indices."""
        depth, columns = self.depth.ravel(), len(self.xs)
        here = depth[index]
        slope_x = _smaller(depth[index + 1] - here, here - depth[index - 1]) / np.float32(self.step)
        slope_y = _smaller(depth[index + columns] - here, here - depth[index - columns]) / np.float32(self.step)
        length = np.sqrt(slope_x * slope_x + slope_y * slope_y + np.float32(1))
        light_x, light_y, light_z = (np.float32(value) for value in light.direction)
        facing = (light_z - slope_x * light_x - slope_y * light_y) / length
        wrapped = facing * np.float32(0.5) + np.float32(0.5)
        wrapped *= wrapped
        sky = slope_y / length  # -1..1, how much the surface looks up
        return np.float32(light.ambient) + np.float32(1.08 - light.ambient) * wrapped + np.float32(0.06) * sky


def _smaller(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """The one-sided difference that does not jump over an edge of the surface."""
    return np.where(np.abs(forward) < np.abs(backward), forward, backward)


def _cone_depth(cone: Cone, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Depth (h, w) of the cone's front, 2 * EMPTY_DEPTH beside it.

    In the image the axis runs from 0 to `length`; a pixel lies at `along` and `across` of it. Of all spheres on the
    axis, the one in front at this pixel has its centre at along + sqrt(r^2 - across^2) * dz / |axis| (exact for equal
    radii).
    """
    axis = (cone.end - cone.start).astype(float)
    length = max(math.hypot(axis[0], axis[1]), 1e-6)
    unit_x, unit_y = axis[0] / length, axis[1] / length
    tilt = np.float32(axis[2] / max(math.sqrt(float((axis * axis).sum())), 1e-6))
    from_x, from_y = xs - np.float32(cone.start[0]), ys - np.float32(cone.start[1])
    along = (from_x * np.float32(unit_x))[None] + (from_y * np.float32(unit_y))[:, None]
    across = (from_x * np.float32(-unit_y))[None] + (from_y * np.float32(unit_x))[:, None]
    across *= across
    growth = np.float32((cone.end_radius - cone.start_radius) / length)
    start_radius, length = np.float32(cone.start_radius), np.float32(length)

    nearest = np.clip(along, 0, length)
    nearest *= growth
    nearest += start_radius
    nearest *= nearest
    nearest -= across
    np.maximum(nearest, 0, out=nearest)
    np.sqrt(nearest, out=nearest)
    nearest *= tilt
    nearest += along
    beyond = nearest > length if cone.open_end else None
    np.clip(nearest, 0, length, out=nearest)

    along -= nearest
    along *= along
    rise = nearest * growth
    rise += start_radius
    rise *= rise
    rise -= across
    rise -= along
    outside = rise <= 0
    np.maximum(rise, 0, out=rise)
    np.sqrt(rise, out=rise)
    nearest *= np.float32(axis[2]) / length
    rise += nearest
    rise += np.float32(cone.start[2])
    if beyond is not None:
        outside |= beyond
    np.copyto(rise, 2 * EMPTY_DEPTH, where=outside)
    return rise


def _ellipsoid_depth(ellipsoid: Ellipsoid, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Depth (h, w) of the ellipsoid's front, 2 * EMPTY_DEPTH beside it.

    With p' Q p = 1 and Q = F diag(1/r^2) F', depth solves Q_zz z^2 + 2 (Q_xz x + Q_yz y) z + ... = 0; its discriminant
    is a quadratic form in x and y.
    """
    scaled = ellipsoid.frame / ellipsoid.radii
    form = [[float((scaled[i] * scaled[j]).sum()) for j in range(3)] for i in range(3)]
    (q_xx, q_xy, q_xz), (_, q_yy, q_yz), (_, _, q_zz) = form
    x, y = xs - np.float32(ellipsoid.centre[0]), ys - np.float32(ellipsoid.centre[1])
    root = (x * x * np.float32(q_xz * q_xz - q_zz * q_xx) + np.float32(q_zz))[None] + (
        y * y * np.float32(q_yz * q_yz - q_zz * q_yy)
    )[:, None]
    root += (x * np.float32(2 * (q_xz * q_yz - q_zz * q_xy)))[None] * y[:, None]
    outside = root <= 0
    np.maximum(root, 0, out=root)
    np.sqrt(root, out=root)
    root -= (x * np.float32(q_xz))[None]
    root -= (y * np.float32(q_yz))[:, None]
    root *= np.float32(1 / q_zz)
    root += np.float32(ellipsoid.centre[2])
    np.copyto(root, 2 * EMPTY_DEPTH, where=outside)
    return root
