"""`hrpose demo`: the whole job on drawn people: make data, train a small network, score it, look at the result."""

from __future__ import annotations

import argparse
import io
import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hrpose.cli.arguments import add_device_flag, default_workers, device_from
from hrpose.cli.doctor import diagnose, format_diagnosis
from hrpose.cli.evaluate import format_metrics
from hrpose.data.augment import Augmentation
from hrpose.data.coco import Annotations, load_annotations
from hrpose.data.dataset import PoseDataset
from hrpose.errors import check
from hrpose.eval.coco import save_results
from hrpose.files import write_atomically
from hrpose.image import read_image
from hrpose.infer.evaluate import evaluate
from hrpose.infer.predictor import Predictor
from hrpose.infer.protocol import Protocol
from hrpose.models import create_model
from hrpose.synth import SceneOptions, write_dataset
from hrpose.train.fit import BEST, LAST, fit
from hrpose.train.recipe import Recipe
from hrpose.train.step import resolve_precision
from hrpose.viz import contact_sheet, draw_poses

# Chosen so that two cores of 2024 train for about two minutes and the picture is worth looking at.
MODEL = "dpn1_32"
SIZE = (96, 128)
TRAIN_SCENES, VAL_SCENES, SHOWN = 1600, 160, 8
SCENES = SceneOptions(width=256, height=256, max_people=1, difficulty=0.3, size_range=(0.5, 0.95))
EPOCHS = 15


def demo_recipe(epochs: int, seed: int, device: torch.device) -> Recipe:
    return Recipe(
        epochs=epochs,
        batch_size=16,
        lr=3e-3,
        schedule="cosine",
        warmup_steps=50,
        sigma=1.5,
        augmentation=Augmentation(scale=0.2, rotation_deg=15.0, half_body_probability=0.0),
        precision=resolve_precision("auto", device),
        seed=seed,
    )


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("demo", help="draw people, train a small network on them, score it, show the result")
    parser.add_argument(
        "--out", default="hrpose-demo", metavar="DIR", help="folder for everything (default hrpose-demo)"
    )
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, metavar="N", help=f"passes over the data (default {EPOCHS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pictures, the weights and the order")
    add_device_flag(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check(options.epochs > 0, "--epochs", f"must be > 0, got {options.epochs}")
    check(options.seed >= 0, "--seed", f"must be >= 0, got {options.seed}")
    started = time.monotonic()
    out, device = Path(options.out), device_from(options)
    train_data = _scenes(out / "data", "train", TRAIN_SCENES, options.seed, 0)
    val_data = _scenes(out / "data", "val", VAL_SCENES, options.seed, TRAIN_SCENES)
    drawn = time.monotonic()

    recipe = demo_recipe(options.epochs, options.seed, device)
    torch.manual_seed(recipe.seed)
    model = create_model(MODEL)
    images, val_images = out / "data" / "train", out / "data" / "val"
    data = PoseDataset(train_data.persons, images, SIZE, train_data.skeleton, recipe.augmentation, recipe.seed)
    run_folder, resume = out / "run", (out / "run" / LAST).exists()
    print(
        f"training {MODEL} on {len(data)} persons, input {SIZE[0]}x{SIZE[1]}, {recipe.precision}, {device}", flush=True
    )
    quick = Protocol(flip=False)
    history = fit(
        model,
        data,
        recipe,
        run_folder,
        validate=lambda network: evaluate(network, val_data, val_images, SIZE, protocol=quick).metrics,
        device=device,
        workers=default_workers(),
        resume=resume,
        report=lambda line: print(line, flush=True),
    )
    trained = time.monotonic()

    predictor = Predictor(run_folder / BEST, device=device)
    found = evaluate(predictor.model, val_data, val_images, SIZE)
    save_results(found.results, out / "results.json")
    picture = _picture(predictor, val_data, val_images)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    write_atomically(out / "poses.jpg", buffer.getvalue())
    seconds = {"drawing": drawn - started, "training": trained - drawn, "evaluation": time.monotonic() - trained}
    report = _report(out, recipe, history, found.metrics, seconds, resume)
    write_atomically(out / "report.md", report.encode())
    write_atomically(out / "metrics.json", json.dumps(found.metrics).encode())
    print(format_metrics(found.metrics))
    print(f"{out / 'poses.jpg'}: look at it; {out / 'report.md'}: what was done; {run_folder / BEST}: the network")


def _scenes(root: Path, split: str, count: int, seed: int, start: int) -> Annotations:
    with tqdm(total=count, desc=f"drawing {split}", unit="scene", disable=None, leave=False) as bar:
        path = write_dataset(root, split, count, seed, SCENES, start=start, progress=bar.update)
    annotations = load_annotations(path)
    print(f"{split}: {count} scenes with {len(annotations.persons)} persons in {path.parent / split}", file=sys.stdout)
    return annotations


def _picture(predictor: Predictor, data: Annotations, folder: Path) -> Any:
    """The first scenes with what the network found in them."""
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for person in data.persons:
        boxes.setdefault(person.file_name, []).append(person.box)
    names = list(boxes)[:SHOWN]
    images = [read_image(folder / name) for name in names]
    found = predictor(images, [boxes[name] for name in names])
    pictures = [
        draw_poses(image, poses.keypoints, poses.scores, predictor.skeleton)
        for image, poses in zip(images, found, strict=True)
    ]
    return contact_sheet(pictures, columns=4, height=384)


def _report(
    out: Path,
    recipe: Recipe,
    history: list[dict[str, Any]],
    metrics: dict[str, Any],
    seconds: dict[str, float],
    resumed: bool,
) -> str:
    rows = "\n".join(_row(entry) for entry in history)
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    again = "\nThe training was resumed; the times are of the last start alone.\n" if resumed else ""
    return f"""# hrpose demo

Drawn people, no download: {TRAIN_SCENES} scenes to train on, {VAL_SCENES} others to score on. {MODEL}, input
{SIZE[0]}x{SIZE[1]} (width x height), {recipe.epochs} epochs, Adam with a cosine from {recipe.lr:g}, {recipe.precision}.

![poses](poses.jpg)

Left limbs are orange, right limbs blue: which is which follows from the way a person faces.

## Scores

{format_metrics(metrics)}

| epoch | loss | AP (no flip test) | PCK@0.2 (torso) | images/s |
|---|---|---|---|---|
{rows}

Times: {times}.
{again}
## The same by hand

    hrpose evaluate --data {out}/data/val.json --images {out}/data/val --checkpoint {out}/run/best.pt
    hrpose predict {out}/data/val --boxes {out}/data/val.json --checkpoint {out}/run/best.pt --out {out}/pictures
    hrpose train --data {out}/data/train.json --images {out}/data/train --model dpn4_32 --out runs/mine

## Where it ran

{textwrap.indent(format_diagnosis(diagnose()), "    ")}
""".replace("\n\n\n", "\n\n")


def _row(entry: dict[str, Any]) -> str:
    cells = [str(entry["epoch"] + 1), "-" if entry["loss"] is None else f"{entry['loss']:.6f}"]
    cells += ["-" if entry[name] is None else f"{100 * entry[name]:.1f}" for name in ("AP", "PCK@0.2")]
    return f"| {' | '.join(cells)} | {entry['images_per_s'] or '-'} |"
