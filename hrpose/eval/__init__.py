"""Scores of predicted keypoints: COCO AP and AR, PCK, MPII's PCKh."""

from hrpose.eval import coco, mpii
from hrpose.eval.pck import pck

__all__ = ["coco", "mpii", "pck"]
