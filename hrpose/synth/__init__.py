"""Drawn people with exact COCO keypoints, made on the spot: hrpose's own data set, nothing to download."""

from hrpose.synth.dataset import write_dataset
from hrpose.synth.scene import Scene, SceneOptions, compose_scene, render_scene

__all__ = ["Scene", "SceneOptions", "compose_scene", "render_scene", "write_dataset"]
