"""Make the checkpoint that ships with the package from one of a training: scored, at half the size.

python benchmarks/ship.py runs/lsp/best.pt --data lspet/val.json --images lspet/val --commit 0123abc
"""

import argparse
import dataclasses

import numpy as np

from hrpose import shipped_checkpoint
from hrpose.checkpoint import compact, load_checkpoint, save_checkpoint
from hrpose.data import load_annotations
from hrpose.eval.pck import pck
from hrpose.infer.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="best.pt of the training")
    parser.add_argument("--data", required=True, help="annotations to score it on, which it was not trained on")
    parser.add_argument("--images", required=True, help="folder of their images")
    parser.add_argument("--commit", required=True, help="of the code that trained it")
    options = parser.parse_args()
    trained = load_checkpoint(options.checkpoint)
    half = compact(trained, {})
    annotations = load_annotations(options.data)
    found = evaluate(half.build(), annotations, options.images, trained.size)
    metrics = {name: value for name, value in found.metrics.items() if isinstance(value, (int, float, str, bool))}
    note = {"scores": metrics, "recipe": trained.training["recipe"], "commit": options.commit}
    save_checkpoint(dataclasses.replace(half, training=note), shipped_checkpoint())
    print(f"{shipped_checkpoint()}: {shipped_checkpoint().stat().st_size / 1e6:.2f} MB")
    print(", ".join(f"{name} {100 * metrics[name]:.1f}" for name in ("PCK@0.2", "AP", "AP50", "AP75", "AR")))
    persons = annotations.persons
    joints, visible = np.array([p.joints for p in persons]), np.array([p.visible for p in persons])
    shares = pck(found.keypoints, joints, visible, np.array([p.box for p in persons]), annotations.skeleton).per_joint
    names = [name.removeprefix("left_").removeprefix("right_") for name in annotations.skeleton.joints]
    for part in dict.fromkeys(names):
        share = np.mean([share for share, name in zip(shares, names, strict=True) if name == part])
        print(f"| {part.replace('_', ' ')} | {100 * share:.1f} |")


if __name__ == "__main__":
    main()
