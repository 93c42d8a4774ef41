"""Annotation files, augmentation, targets and samples."""

from hrpose.data import targets
from hrpose.data.coco import load_annotations, load_detections
from hrpose.data.dataset import PoseDataset

__all__ = ["PoseDataset", "load_annotations", "load_detections", "targets"]
