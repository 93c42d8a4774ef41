"""`hrpose demo --train`: the whole job on drawn people: data, a small network, its training, scores, a picture."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

from hrpose.cli.arguments import default_workers
from hrpose.cli.demo_scenes import draw_scenes, save_picture
from hrpose.cli.doctor import diagnose, format_diagnosis
from hrpose.cli.evaluate import format_metrics
from hrpose.data.augment import Augmentation
from hrpose.data.dataset import PoseDataset
from hrpose.eval.coco import save_results
from hrpose.files import write_atomically
from hrpose.infer.evaluate import evaluate
from hrpose.infer.predictor import Predictor
from hrpose.infer.protocol import Protocol
from hrpose.models import create_model
from hrpose.skeleton import COCO17
from hrpose.synth import SceneOptions
from hrpose.train.fit import BEST, LAST, fit
from hrpose.train.recipe import Recipe
from hrpose.train.step import resolve_precision

# Chosen so that two cores of 2024 train for about two minutes and the picture is worth looking at.
MODEL = "dpn1_32"
SIZE = (96, 128)
TRAIN_SCENES, VAL_SCENES = 1600, 160
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


def train_demo(out: Path, epochs: int, seed: int, device: torch.device) -> None:
    """Everything into the folder `out`; a training that was interrupted there goes on."""
    started = time.monotonic()
    train_data = draw_scenes(out / "data", "train", TRAIN_SCENES, seed, 0, SCENES, COCO17)
    val_data = draw_scenes(out / "data", "val", VAL_SCENES, seed, TRAIN_SCENES, SCENES, COCO17)
    drawn = time.monotonic()

    recipe = demo_recipe(epochs, seed, device)
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
    save_picture(predictor, val_data, val_images, out / "poses.jpg")
    seconds = {"drawing": drawn - started, "training": trained - drawn, "evaluation": time.monotonic() - trained}
    report = _report(out, recipe, history, found.metrics, seconds, resume)
    write_atomically(out / "report.md", report.encode())
    write_atomically(out / "metrics.json", json.dumps(found.metrics).encode())
    print(format_metrics(found.metrics))
    print(f"{out / 'poses.jpg'}: look at it; {out / 'report.md'}: what was done; {run_folder / BEST}: the network")


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
