"""Scores of predicted keypoints: COCO AP and AR, PCK."""

from hrpose.eval import coco
from hrpose.eval.pck import pck

__all__ = ["coco", "pck"]
