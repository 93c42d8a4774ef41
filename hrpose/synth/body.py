"""The articulated person: proportions, joint limits, poses, and the 3-D joints that follow from them.

Body frame: metres, x to the image's right, y down, z towards the camera, origin between the hips. At yaw 0 the person
faces the camera, so its left side lies at +x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

SIDES = (("left", 1.0), ("right", -1.0))  # name and sign of x while facing the camera

HEIGHT_RANGE_M = (1.50, 1.95)

# Segment lengths as a share of standing height: Drillis and Contini (1966), as tabulated in Winter, "Biomechanics and
# Motor Control of Human Movement", fig. 4.1. The two half widths are of the joint centres, which lie inside the body.
SEGMENT_SHARE = {
    "trunk": 0.288,  # hip line to shoulder line: 0.818 - 0.530
    "upper_arm": 0.186,
    "forearm": 0.146,
    "thigh": 0.245,
    "shank": 0.246,
    "half_shoulders": 0.108,
    "half_hips": 0.052,
}
SEGMENT_SPREAD = 0.06  # each segment's share varies by up to this much; left and right stay equal

# A head a little larger than life (0.065, 0.050 and 0.056 of the height) keeps the face readable in small pictures.
HEAD_RADII_SHARE = np.array([0.052, 0.070, 0.059])
# Facial keypoints on the unit sphere that the head ellipsoid is an image of: right-left, down, forward.
EYE_ON_HEAD = np.array([0.36, -0.04, 0.93])
EAR_ON_HEAD = np.array([1.02, 0.04, -0.06])
NOSE_ON_HEAD = np.array([0.0, 0.24, 1.03])

# Degrees. Flexion swings a limb forward, abduction away from the body, negative twist turns the elbow crease inwards.
JOINT_LIMITS_DEG = {
    "shoulder_flex": (-50.0, 175.0),
    "shoulder_abduct": (-5.0, 165.0),
    "shoulder_twist": (-90.0, 90.0),
    "elbow_flex": (0.0, 145.0),
    "hip_flex": (-30.0, 115.0),
    "hip_abduct": (-8.0, 50.0),
    "knee_flex": (0.0, 140.0),
    "pelvis_pitch": (-15.0, 50.0),
    "spine_pitch": (-20.0, 45.0),
    "spine_roll": (-25.0, 25.0),
    "spine_twist": (-35.0, 35.0),
    "neck_pitch": (-30.0, 40.0),
    "neck_roll": (-20.0, 20.0),
    "neck_yaw": (-60.0, 60.0),
}
ANKLE_LIMITS_DEG = (-50.0, 30.0)  # toes down, toes up
TRUNK_ANGLES = tuple(name for name in JOINT_LIMITS_DEG if name.split("_")[0] in ("pelvis", "spine", "neck"))
LIMB_ANGLES = tuple(name for name in JOINT_LIMITS_DEG if name not in TRUNK_ANGLES)


@dataclass(frozen=True)
class Pose:
    """Joint angles in degrees, `left_` or `right_` before a limb's; `yaw` and `roll` turn the whole body."""

    name: str
    angles: dict[str, float]
    yaw_deg: float
    roll_deg: float
    lift_m: float = 0.0  # height of the lowest point above the ground
    seated: bool = False


@dataclass(frozen=True)
class Body:
    """Where everything is: points (3,) in metres of the body frame, frames (3, 3) with the part's axes as columns."""

    height: float
    segments: dict[str, float]  # metres
    joints: dict[str, np.ndarray]  # COCO-17's and LSP-14's keypoints, and head, pelvis, left_foot, right_foot
    frames: dict[str, np.ndarray]  # pelvis, chest, head, and each side's arm, forearm, thigh, shank, foot
    head_radii: np.ndarray  # (3,) metres: half width, half height, half depth


def rotation_x(angle_deg: float) -> np.ndarray:
    """Positive angles swing what hangs down forwards."""
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])


def rotation_y(angle_deg: float) -> np.ndarray:
    """Positive angles turn the front towards +x."""
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])


def rotation_z(angle_deg: float) -> np.ndarray:
    """Positive angles turn clockwise in the image."""
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


# ---------------------------------------------------------------------------------------------------------- poses


def _relaxed(rng: Generator) -> dict[str, float]:
    """Standing at ease: the base that every other pose changes."""
    angles = {
        "pelvis_pitch": 0.0,
        "spine_pitch": rng.normal(2, 4),
        "spine_roll": rng.normal(0, 4),
        "spine_twist": rng.normal(0, 6),
        "neck_pitch": rng.normal(2, 8),
        "neck_roll": rng.normal(0, 5),
        "neck_yaw": rng.normal(0, 20),
    }
    for side, _ in SIDES:
        angles[f"{side}_shoulder_flex"] = rng.normal(2, 9)
        angles[f"{side}_shoulder_abduct"] = rng.uniform(6, 20)
        angles[f"{side}_shoulder_twist"] = rng.uniform(-45, 10)
        angles[f"{side}_elbow_flex"] = rng.uniform(3, 30)
        angles[f"{side}_hip_flex"] = rng.normal(2, 3)
        angles[f"{side}_hip_abduct"] = rng.uniform(2, 9)
        angles[f"{side}_knee_flex"] = rng.uniform(0, 8)
    return angles


def _some_sides(rng: Generator, both: float) -> list[str]:
    """Both sides with probability `both`, else one of them."""
    if rng.random() < both:
        return ["left", "right"]
    return ["left"] if rng.random() < 0.5 else ["right"]


def _front_and_back(rng: Generator) -> tuple[str, str]:
    return ("left", "right") if rng.random() < 0.5 else ("right", "left")


def _stand(rng: Generator, angles: dict[str, float]) -> dict:
    for side in _some_sides(rng, 0.3) if rng.random() < 0.5 else ():
        _hand_on_hip(rng, angles, side)
    return {}


def _hand_on_hip(rng: Generator, angles: dict[str, float], side: str) -> None:
    angles[f"{side}_shoulder_flex"] = rng.uniform(-28, -12)
    angles[f"{side}_shoulder_abduct"] = rng.uniform(36, 50)
    angles[f"{side}_shoulder_twist"] = rng.uniform(-75, -55)
    angles[f"{side}_elbow_flex"] = rng.uniform(85, 105)


def _walk(rng: Generator, angles: dict[str, float]) -> dict:
    front, back = _front_and_back(rng)
    stride = rng.uniform(14, 32)
    angles[f"{front}_hip_flex"], angles[f"{back}_hip_flex"] = stride, -0.7 * stride
    angles[f"{front}_knee_flex"], angles[f"{back}_knee_flex"] = rng.uniform(2, 12), rng.uniform(8, 35)
    swing = stride * rng.uniform(0.6, 1.2)
    angles[f"{front}_shoulder_flex"], angles[f"{back}_shoulder_flex"] = -swing, swing
    for side, _ in SIDES:
        angles[f"{side}_elbow_flex"] = rng.uniform(10, 45)
        angles[f"{side}_hip_abduct"] = rng.uniform(0, 4)
    return {}


def _run(rng: Generator, angles: dict[str, float]) -> dict:
    front, back = _front_and_back(rng)
    stride = rng.uniform(30, 60)
    angles[f"{front}_hip_flex"], angles[f"{back}_hip_flex"] = stride, -0.45 * stride
    angles[f"{front}_knee_flex"], angles[f"{back}_knee_flex"] = rng.uniform(15, 70), rng.uniform(35, 100)
    angles[f"{front}_shoulder_flex"], angles[f"{back}_shoulder_flex"] = rng.uniform(-50, -30), rng.uniform(25, 55)
    angles["spine_pitch"] = rng.uniform(4, 18)
    for side, _ in SIDES:
        angles[f"{side}_elbow_flex"] = rng.uniform(70, 115)
        angles[f"{side}_hip_abduct"] = rng.uniform(0, 4)
    return {"lift_m": rng.uniform(0, 0.08)}


def _reach(rng: Generator, angles: dict[str, float]) -> dict:
    for side in _some_sides(rng, 0.35):
        angles[f"{side}_shoulder_twist"] = rng.uniform(-40, 40)
        angles[f"{side}_elbow_flex"] = rng.uniform(0, 45)
        if rng.random() < 0.5:
            angles[f"{side}_shoulder_flex"] = rng.uniform(70, 170)
            angles[f"{side}_shoulder_abduct"] = rng.uniform(0, 30)
        else:
            angles[f"{side}_shoulder_abduct"] = rng.uniform(60, 155)
    return {}


def _wave(rng: Generator, angles: dict[str, float]) -> dict:
    waving = _some_sides(rng, 0.15)
    for side in waving:
        angles[f"{side}_shoulder_flex"] = rng.uniform(0, 20)
        angles[f"{side}_shoulder_abduct"] = rng.uniform(65, 105)
        angles[f"{side}_shoulder_twist"] = rng.uniform(65, 90)
        angles[f"{side}_elbow_flex"] = rng.uniform(60, 120)
    if len(waving) == 1 and rng.random() < 0.4:
        _hand_on_hip(rng, angles, "right" if waving[0] == "left" else "left")
    return {}


def _hold(rng: Generator, angles: dict[str, float]) -> dict:
    """Hands in front of the body, as with a phone or a book."""
    for side in _some_sides(rng, 0.6):
        angles[f"{side}_shoulder_flex"] = rng.uniform(15, 55)
        angles[f"{side}_shoulder_abduct"] = rng.uniform(5, 20)
        angles[f"{side}_shoulder_twist"] = rng.uniform(-45, -15)
        angles[f"{side}_elbow_flex"] = rng.uniform(60, 125)
    angles["neck_pitch"] = rng.uniform(0, 25)
    return {}


def _cheer(rng: Generator, angles: dict[str, float]) -> dict:
    for side, _ in SIDES:
        angles[f"{side}_shoulder_abduct"] = rng.uniform(95, 160)
        angles[f"{side}_elbow_flex"] = rng.uniform(0, 60)
        angles[f"{side}_shoulder_twist"] = rng.uniform(30, 90)
        angles[f"{side}_hip_abduct"] = rng.uniform(4, 18)
    if rng.random() < 0.5:
        return {}
    for side, _ in SIDES:
        angles[f"{side}_hip_flex"] = rng.uniform(0, 40)
        angles[f"{side}_knee_flex"] = rng.uniform(10, 95)
    return {"lift_m": rng.uniform(0.1, 0.35)}


def _sit(rng: Generator, angles: dict[str, float]) -> dict:
    for side, _ in SIDES:
        angles[f"{side}_hip_flex"] = rng.uniform(78, 96)
        angles[f"{side}_hip_abduct"] = rng.uniform(4, 20)
        angles[f"{side}_knee_flex"] = rng.uniform(72, 100)
        angles[f"{side}_shoulder_flex"] = rng.uniform(12, 45)
        angles[f"{side}_shoulder_twist"] = rng.uniform(-50, -10)
        angles[f"{side}_elbow_flex"] = rng.uniform(25, 80)
    angles["spine_pitch"] = rng.uniform(-5, 22)
    if rng.random() < 0.3:
        _wave(rng, angles)
    return {"seated": True}


def _squat(rng: Generator, angles: dict[str, float]) -> dict:
    knee = rng.uniform(70, 135)
    for side, _ in SIDES:
        angles[f"{side}_knee_flex"] = knee + rng.normal(0, 4)
        angles[f"{side}_hip_flex"] = 0.80 * knee + rng.normal(0, 4)
        angles[f"{side}_hip_abduct"] = rng.uniform(6, 25)
        angles[f"{side}_shoulder_flex"] = rng.uniform(30, 95)
        angles[f"{side}_elbow_flex"] = rng.uniform(5, 60)
    angles["spine_pitch"] = rng.uniform(15, 40)
    angles["neck_pitch"] = rng.uniform(-25, 0)
    return {}


def _kick(rng: Generator, angles: dict[str, float]) -> dict:
    kicking, _ = _front_and_back(rng)
    angles[f"{kicking}_hip_flex"] = rng.uniform(35, 95)
    angles[f"{kicking}_hip_abduct"] = rng.uniform(0, 35)
    angles[f"{kicking}_knee_flex"] = rng.uniform(5, 80)
    angles["spine_pitch"] = rng.uniform(-15, 5)
    for side, _ in SIDES:
        angles[f"{side}_shoulder_abduct"] = rng.uniform(20, 90)
        angles[f"{side}_elbow_flex"] = rng.uniform(10, 70)
    return {}


def _dance(rng: Generator, angles: dict[str, float]) -> dict:
    """Anything within reason: every limb on its own."""
    angles["spine_roll"], angles["spine_twist"] = rng.normal(0, 10), rng.normal(0, 14)
    for side, _ in SIDES:
        angles[f"{side}_shoulder_flex"] = rng.uniform(-40, 130)
        angles[f"{side}_shoulder_abduct"] = rng.uniform(0, 140)
        angles[f"{side}_shoulder_twist"] = rng.uniform(-80, 80)
        angles[f"{side}_elbow_flex"] = rng.uniform(0, 130)
        angles[f"{side}_hip_flex"] = rng.normal(15, 22)
        angles[f"{side}_hip_abduct"] = rng.uniform(0, 32)
        angles[f"{side}_knee_flex"] = rng.uniform(0, 70)
    return {}


# name: (function, weight at difficulty 0, weight at difficulty 1). The function changes the relaxed angles in place and
# returns further fields of Pose.
POSES: dict[str, tuple[Callable[[Generator, dict[str, float]], dict], float, float]] = {
    "stand": (_stand, 4, 3),
    "walk": (_walk, 2, 3),
    "run": (_run, 0, 2),
    "reach": (_reach, 2, 3),
    "wave": (_wave, 2, 2),
    "hold": (_hold, 1, 2),
    "cheer": (_cheer, 1, 2),
    "sit": (_sit, 0, 2),
    "squat": (_squat, 0, 1),
    "kick": (_kick, 0, 1),
    "dance": (_dance, 0, 3),
}


def sample_pose(rng: Generator, difficulty: float) -> Pose:
    """A random pose within JOINT_LIMITS_DEG.

    Difficulty 0 stands upright and turns at most 35 degrees from the camera; 1 turns all around, sits, runs, dances,
    and now and then tumbles.
    """
    weights = np.array([easy + (hard - easy) * difficulty for _, easy, hard in POSES.values()])
    name = list(POSES)[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum()))]
    angles = _relaxed(rng)
    fields = POSES[name][0](rng, angles)
    for key, value in angles.items():
        low, high = JOINT_LIMITS_DEG[key.removeprefix("left_").removeprefix("right_")]
        angles[key] = min(max(float(value), low), high)
    yaw_deg = rng.uniform(-1, 1) * (35 + 145 * difficulty)
    roll_deg = rng.normal(0, 1) * (1 + 3 * difficulty)
    if rng.random() < 0.07 * difficulty and not fields.get("seated"):
        upside_down = rng.uniform(50, 180)
        roll_deg = upside_down * (1 if rng.random() < 0.5 else -1)
        fields["lift_m"] = rng.uniform(0.3, 0.7) if upside_down > 110 else rng.uniform(0, 0.2)
    return Pose(name, angles, yaw_deg, roll_deg, **fields)


# ----------------------------------------------------------------------------------------------------- kinematics


def sample_segments(rng: Generator, height: float) -> dict[str, float]:
    """Segment lengths in metres of a person `height` metres tall."""
    return {
        name: height * share * rng.uniform(1 - SEGMENT_SPREAD, 1 + SEGMENT_SPREAD)
        for name, share in SEGMENT_SHARE.items()
    }


def pose_body(pose: Pose, segments: dict[str, float], height: float) -> Body:
    """Forward kinematics: joints and part frames of the person in this pose."""
    angle = pose.angles
    pelvis_frame = rotation_z(pose.roll_deg) @ rotation_y(pose.yaw_deg) @ rotation_x(-angle["pelvis_pitch"])
    chest_frame = (
        pelvis_frame
        @ rotation_x(-angle["spine_pitch"])
        @ rotation_z(angle["spine_roll"])
        @ rotation_y(angle["spine_twist"])
    )
    head_frame = (
        chest_frame @ rotation_y(angle["neck_yaw"]) @ rotation_x(-angle["neck_pitch"]) @ rotation_z(angle["neck_roll"])
    )
    frames = {"pelvis": pelvis_frame, "chest": chest_frame, "head": head_frame}

    joints = {"pelvis": np.zeros(3)}
    joints["neck"] = chest_frame @ (0.0, -segments["trunk"] - 0.010 * height, 0.0)
    # 0.818 (shoulders) to 0.935 (middle of the head) of the height, less the 0.010 above; half bends with the neck
    joints["head"] = joints["neck"] + height * (chest_frame @ (0, -0.048, 0.008) + head_frame @ (0, -0.060, 0.010))
    head_radii = HEAD_RADII_SHARE * height
    joints["nose"] = joints["head"] + head_frame @ (NOSE_ON_HEAD * head_radii)
    joints["head_top"] = joints["head"] + head_frame @ (0.0, -head_radii[1], 0.0)

    for side, sign in SIDES:
        mirror = np.array([sign, 1.0, 1.0])
        joints[f"{side}_eye"] = joints["head"] + head_frame @ (EYE_ON_HEAD * mirror * head_radii)
        joints[f"{side}_ear"] = joints["head"] + head_frame @ (EAR_ON_HEAD * mirror * head_radii)

        joints[f"{side}_shoulder"] = chest_frame @ (sign * segments["half_shoulders"], -segments["trunk"], 0.0)
        arm = (
            chest_frame
            @ rotation_x(angle[f"{side}_shoulder_flex"])
            @ rotation_z(-sign * angle[f"{side}_shoulder_abduct"])
            @ rotation_y(sign * angle[f"{side}_shoulder_twist"])
        )
        forearm = arm @ rotation_x(angle[f"{side}_elbow_flex"])
        joints[f"{side}_elbow"] = joints[f"{side}_shoulder"] + arm @ (0.0, segments["upper_arm"], 0.0)
        joints[f"{side}_wrist"] = joints[f"{side}_elbow"] + forearm @ (0.0, segments["forearm"], 0.0)

        joints[f"{side}_hip"] = pelvis_frame @ (sign * segments["half_hips"], 0.0, 0.0)
        hip_flex, knee_flex = angle[f"{side}_hip_flex"], angle[f"{side}_knee_flex"]
        thigh = (
            pelvis_frame
            @ rotation_x(hip_flex)
            @ rotation_z(-sign * angle[f"{side}_hip_abduct"])
            @ rotation_y(sign * 8.0)  # toes point slightly outwards
        )
        shank = thigh @ rotation_x(-knee_flex)
        # the ankle lays the sole flat, as far as it can
        ankle_flex = min(max(angle["pelvis_pitch"] + knee_flex - hip_flex, ANKLE_LIMITS_DEG[0]), ANKLE_LIMITS_DEG[1])
        foot = shank @ rotation_x(ankle_flex)
        joints[f"{side}_knee"] = joints[f"{side}_hip"] + thigh @ (0.0, segments["thigh"], 0.0)
        joints[f"{side}_ankle"] = joints[f"{side}_knee"] + shank @ (0.0, segments["shank"], 0.0)
        joints[f"{side}_foot"] = joints[f"{side}_ankle"] + foot @ (0.0, 0.021 * height, 0.038 * height)
        frames |= {f"{side}_arm": arm, f"{side}_forearm": forearm, f"{side}_thigh": thigh}
        frames |= {f"{side}_shank": shank, f"{side}_foot": foot}

    # Rounding hides the last-bit differences between platforms' sine, cosine and matrix products.
    joints = {name: np.round(point, 5) for name, point in joints.items()}
    frames = {name: np.round(frame, 6) for name, frame in frames.items()}
    return Body(height, segments, joints, frames, head_radii)


def sample_body(rng: Generator, difficulty: float) -> tuple[Body, Pose]:
    """A random person in a random pose."""
    height = rng.uniform(*HEIGHT_RANGE_M)
    segments = sample_segments(rng, height)
    pose = sample_pose(rng, difficulty)
    return pose_body(pose, segments, height), pose
