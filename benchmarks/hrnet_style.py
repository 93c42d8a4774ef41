"""Training as HRNet's published code does it, from its description: for train_throughput.py.

Each sample is warped by OpenCV, normalised, and its targets drawn, joint by joint in numpy, by the loading processes.
The network runs eagerly in float32 and NCHW; the loss is summed joint by joint; Adam as torch makes it by default.
"""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hrpose.data.appearance import MEAN, STD
from hrpose.data.augment import Augmentation
from hrpose.data.coco import Person
from hrpose.skeleton import Skeleton

STRIDE, SIGMA = 4, 2


class HRNetStyleDataset(Dataset):
    """image (3, H, W), target (K, H/4, W/4), weight (K, 1) of a person, augmented by numpy's global generator."""

    def __init__(self, persons: list[Person], folder: Path, size: tuple[int, int], skeleton: Skeleton) -> None:
        self.persons, self.folder, self.size, self.skeleton = persons, folder, size, skeleton
        self.augmentation = Augmentation()
        self.lower = set(skeleton.lower_body)

    def __len__(self) -> int:
        return len(self.persons)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        person, drawn = self.persons[index], self.augmentation
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.cvtColor(cv2.imread(str(self.folder / person.file_name), flags), cv2.COLOR_BGR2RGB)
        joints, visible = np.array(person.joints), np.array(person.visible) > 0
        x, y, w, h = person.box
        center, scale = np.array([x + w / 2, y + h / 2]), self.fitted(w, h) * 1.25
        if visible.sum() > drawn.half_body_min_joints and np.random.rand() < drawn.half_body_probability:
            half = self.half_body(joints, visible)
            if half is not None:
                center, scale = half
        scale = scale * np.clip(np.random.randn() * drawn.scale + 1, 1 - drawn.scale, 1 + drawn.scale)
        angle = 0.0
        if np.random.rand() < drawn.rotation_probability:
            angle = np.clip(np.random.randn() * drawn.rotation_deg, -2 * drawn.rotation_deg, 2 * drawn.rotation_deg)
        if np.random.rand() < drawn.flip_probability:
            image = image[:, ::-1, :]
            joints[:, 0] = image.shape[1] - joints[:, 0] - 1
            for left, right in self.skeleton.flip_pairs:
                joints[[left, right]], visible[[left, right]] = joints[[right, left]], visible[[right, left]]
            center[0] = image.shape[1] - center[0] - 1

        transform = self.transform(center, scale, angle)
        warped = cv2.warpAffine(image, transform, self.size, flags=cv2.INTER_LINEAR)
        pixels = torch.from_numpy(warped.transpose(2, 0, 1)).contiguous().float().div(255)
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        for joint in range(len(joints)):
            if visible[joint]:
                joints[joint] = np.dot(transform, np.array([*joints[joint], 1.0]))
        target, weight = self.targets(joints, visible)
        return pixels.clone().sub_(mean).div_(std), torch.from_numpy(target), torch.from_numpy(weight)

    def fitted(self, w: float, h: float) -> np.ndarray:
        aspect = self.size[0] / self.size[1]
        return np.array([max(w, h * aspect), max(h, w / aspect)])

    def half_body(self, joints: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        upper, lower = [], []
        for joint in range(len(joints)):
            if visible[joint]:
                (lower if joint in self.lower else upper).append(joints[joint])
        chosen = upper if np.random.randn() < 0.5 and len(upper) > 2 else lower if len(lower) > 2 else upper
        if len(chosen) < 2:
            return None
        points = np.array(chosen)
        return points.mean(0), self.fitted(*(points.max(0) - points.min(0))) * 1.5

    def transform(self, center: np.ndarray, scale: np.ndarray, angle: float) -> np.ndarray:
        """Of three points: centre, the middle of the upper edge, and the corner of the right angle between the two."""
        w, h = self.size
        rad = np.deg2rad(angle)
        up = np.array([np.sin(rad), -np.cos(rad)]) * scale[0] * 0.5
        source, wanted = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32)
        source[0], source[1] = center, center + up
        wanted[0], wanted[1] = (w * 0.5, h * 0.5), (w * 0.5, h * 0.5 - w * 0.5)
        for points in (source, wanted):
            edge = points[0] - points[1]
            points[2] = points[1] + np.array([-edge[1], edge[0]])
        return cv2.getAffineTransform(source, wanted)

    def targets(self, joints: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w, h = self.size[0] // STRIDE, self.size[1] // STRIDE
        target, weight = np.zeros((len(joints), h, w), np.float32), np.ones((len(joints), 1), np.float32)
        weight[:, 0] = visible
        reach = SIGMA * 3
        for joint in range(len(joints)):
            mx, my = (int(value / STRIDE + 0.5) for value in joints[joint])
            left, top, right, bottom = mx - reach, my - reach, mx + reach + 1, my + reach + 1
            if left >= w or top >= h or right < 0 or bottom < 0:
                weight[joint] = 0
                continue
            if weight[joint] > 0.5:
                side = np.arange(0, 2 * reach + 1, 1, np.float32)
                patch = np.exp(-((side - reach) ** 2 + (side[:, None] - reach) ** 2) / (2 * SIGMA**2))
                rows, columns = slice(max(0, top), min(bottom, h)), slice(max(0, left), min(right, w))
                target[joint, rows, columns] = patch[
                    rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
                ]
        return target, weight


def joint_loss(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    joints = output.size(1)
    predicted = output.reshape(len(output), joints, -1).split(1, 1)
    wanted = target.reshape(len(target), joints, -1).split(1, 1)
    loss = 0
    for joint in range(joints):
        mask = weight[:, joint]
        loss += 0.5 * nn.functional.mse_loss(predicted[joint].squeeze(1) * mask, wanted[joint].squeeze(1) * mask)
    return loss / joints


def images_per_second(model: nn.Module, data: HRNetStyleDataset, batch_size: int, workers: int, epochs: int) -> float:
    """Train; the speed of the last epoch, loading included."""
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, num_workers=workers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    seconds = 0.0
    for _ in range(epochs):
        started = time.perf_counter()
        for images, target, weight in loader:
            loss = joint_loss(model(images), target, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        seconds = time.perf_counter() - started
    return len(loader) * batch_size / seconds
