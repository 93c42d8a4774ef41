"""Pictures of skeletons on photographs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from hrpose.errors import check
from hrpose.geometry import as_boxes
from hrpose.skeleton import Skeleton, side_and_part

# Sides of the body as the person has them; the three hues stay apart for the colour-blind.
LEFT, RIGHT, MIDDLE = (255, 140, 0), (0, 170, 255), (240, 240, 90)
_FAR = 1e6  # pixels; Pillow's own coordinates overflow beyond 1e9


def draw_poses(
    image: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray | None = None,
    skeleton: Skeleton | None = None,
    min_score: float = 0.2,
    boxes: np.ndarray | None = None,
) -> Image.Image:
    """A copy of the image with a skeleton over each person: left limbs orange, right ones blue, the middle yellow.

    Args:
        image:     (H, W, 3) uint8 RGB.
        keypoints: (P, K, 2) x, y in image pixels; points that are not finite, or a million pixels away, are left out.
        scores:    (P, K); joints below `min_score` are left out. None draws all.
        skeleton:  K joints and the edges between them; None draws points only.
        boxes:     (P, 4) x, y, width, height to outline, if given.
    Returns: a Pillow image of the same size.
    Raises: InputError on an image of another kind, shapes that do not agree, or a box ``geometry.as_boxes`` refuses.
    """
    where = "draw_poses"
    image = np.asarray(image)
    valid = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size > 0
    check(valid, where, f"image must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
    keypoints = np.asarray(keypoints, np.float64)
    valid = keypoints.ndim == 3 and keypoints.shape[2] == 2
    check(valid, where, f"keypoints must be (P, K, 2), got {keypoints.shape}")
    persons, joints = keypoints.shape[:2]
    shown = (np.abs(keypoints) < _FAR).all(2)  # also leaves out what is not finite
    if scores is not None:
        scores = np.asarray(scores)
        check(scores.shape == shown.shape, where, f"scores must be {shown.shape}, got {scores.shape}")
        shown &= scores >= min_score
    if skeleton is not None:
        agrees = skeleton.num_joints == joints
        check(agrees, where, f"skeleton must have {joints} joints, has {skeleton.num_joints}")
    if boxes is not None:
        boxes = as_boxes(boxes, f"{where}: boxes").numpy()
        check(len(boxes) == persons, where, f"boxes must be {persons}, one per person, got {len(boxes)}")

    picture = Image.fromarray(np.ascontiguousarray(image))
    # Lines drawn on a layer twice as large and reduced are smooth; only their outline is blended, the photograph stays.
    zoom = 2
    layer = Image.new("RGBA", (picture.width * zoom, picture.height * zoom))
    draw = ImageDraw.Draw(layer)
    for person in range(persons):
        width = zoom * _line_width(keypoints[person][shown[person]], picture.size)
        # + 0.5: our pixel centres lie at integers, Pillow's half a pixel further
        points = [
            tuple((xy + 0.5) * zoom) if ok else None for xy, ok in zip(keypoints[person], shown[person], strict=True)
        ]
        if boxes is not None:
            x, y, w, h = np.clip(boxes[person], -_FAR, _FAR)
            corners = [(x + 0.5) * zoom, (y + 0.5) * zoom, (x + w + 0.5) * zoom, (y + h + 0.5) * zoom]
            draw.rectangle(corners, outline=(255, 255, 255, 160), width=max(1, int(width / 3)))
        _draw_skeleton(draw, points, skeleton, width)
    opacity = layer.getchannel("A").resize(picture.size, Image.Resampling.BOX)
    picture.paste(layer.resize(picture.size, Image.Resampling.BOX), mask=opacity)
    return picture


def _draw_skeleton(
    draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float] | None], skeleton: Skeleton | None, width: float
) -> None:
    of_side = {"left": LEFT, "right": RIGHT, "": MIDDLE}
    colors = [of_side[side_and_part(name)[0]] for name in skeleton.joints] if skeleton else [MIDDLE] * len(points)
    edges = [(a, b) for a, b in (skeleton.edges if skeleton else ()) if points[a] and points[b]]
    for outline in (True, False):  # all dark outlines first, so that none covers a limb
        extra = width * 0.5 if outline else 0.0
        for a, b in edges:
            color = (20, 20, 20) if outline else (colors[a] if colors[a] == colors[b] else MIDDLE)
            draw.line([points[a], points[b]], fill=(*color, 255), width=max(1, round(width + extra)))
        for point, color in zip(points, colors, strict=True):
            if point:
                radius = width * 0.9 + extra / 2
                box = [point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius]
                draw.ellipse(box, fill=(*((20, 20, 20) if outline else color), 255))


def _line_width(points: np.ndarray, size: tuple[int, int]) -> float:
    """Line width in image pixels: a fiftieth of the person, within what can be seen on the picture."""
    extent = float(np.ptp(points, axis=0).max()) if len(points) else 0.0
    return min(max(extent / 50, math.hypot(*size) / 500, 1.0), math.hypot(*size) / 60)


def contact_sheet(pictures: Sequence[Image.Image], columns: int, height: int, gap: int = 6) -> Image.Image:
    """Pictures in rows of `columns`, each scaled to `height` pixels, `gap` pixels apart on white."""
    check(len(pictures) > 0, "contact_sheet", "needs at least one picture")
    valid = columns > 0 and height > 0 and gap >= 0
    check(valid, "contact_sheet", f"columns and height must be > 0, gap >= 0, got {columns}, {height}, {gap}")
    scaled = [
        p.resize((max(1, round(p.width * height / p.height)), height), Image.Resampling.LANCZOS) for p in pictures
    ]
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    width = max(sum(p.width for p in row) + gap * (len(row) + 1) for row in rows)
    sheet = Image.new("RGB", (width, gap + len(rows) * (height + gap)), "white")
    for r, row in enumerate(rows):
        x = gap
        for picture in row:
            sheet.paste(picture, (x, gap + r * (height + gap)))
            x += picture.width + gap
    return sheet
