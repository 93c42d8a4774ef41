"""Annotation files, augmentation, targets and samples."""

from hrpose.data import targets
from hrpose.data.cache import cache_pixels
from hrpose.data.coco import load_annotations, load_detections
from hrpose.data.dataset import PoseDataset
from hrpose.data.formats import load_any
from hrpose.data.mpii import load_mpii, load_mpii_mat

__all__ = [
    "PoseDataset",
    "cache_pixels",
    "load_annotations",
    "load_any",
    "load_detections",
    "load_mpii",
    "load_mpii_mat",
    "targets",
]
