"""`hrpose demo`: the network that comes with the package on drawn people, in seconds; with --train the whole job."""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from pathlib import Path
from typing import Any

from hrpose.cli.arguments import add_device_flag, check_output_folder, device_from
from hrpose.cli.demo_scenes import draw_scenes, save_picture
from hrpose.cli.demo_train import EPOCHS, train_demo
from hrpose.cli.doctor import diagnose, format_diagnosis
from hrpose.cli.evaluate import format_metrics
from hrpose.errors import check
from hrpose.eval.coco import save_results
from hrpose.files import write_atomically
from hrpose.infer.evaluate import evaluate
from hrpose.infer.predictor import Predictor
from hrpose.shipped import shipped_checkpoint
from hrpose.synth import SceneOptions

# None of these scenes is among those it was trained on, whatever the seed.
COUNT, FIRST = 48, 500_000
SCENES = SceneOptions(width=320, height=320, max_people=2, difficulty=0.3, size_range=(0.5, 0.95))


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="draw people, find their joints with the network that comes with hrpose, score it, show the result"
    )
    parser.add_argument(
        "--out", default="hrpose-demo", metavar="DIR", help="folder for everything (default hrpose-demo)"
    )
    parser.add_argument("--train", action="store_true", help="train a small network first, about two minutes")
    parser.add_argument("--epochs", type=int, metavar="N", help=f"of --train: passes over the data (default {EPOCHS})")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures; with --train also of weights and order")
    add_device_flag(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check(options.epochs is None or options.epochs > 0, "--epochs", f"must be > 0, got {options.epochs}")
    check(options.epochs is None or options.train, "--epochs", "goes with --train")
    check(options.seed >= 0, "--seed", f"must be >= 0, got {options.seed}")
    check_output_folder(options.out, "--out")
    out, device = Path(options.out), device_from(options)
    if options.train:
        return train_demo(out, EPOCHS if options.epochs is None else options.epochs, options.seed, device)

    started = time.monotonic()
    predictor = Predictor(device=device)
    people = draw_scenes(out / "data", "people", COUNT, options.seed, FIRST, SCENES, predictor.skeleton)
    drawn = time.monotonic()
    found = evaluate(predictor.model, people, out / "data" / "people", predictor.size)
    scored = time.monotonic()
    save_results(found.results, out / "results.json")
    write_atomically(out / "metrics.json", json.dumps(found.metrics).encode())
    save_picture(predictor, people, out / "data" / "people", out / "poses.jpg")
    seconds = {"drawing": drawn - started, "evaluation": scored - drawn, "picture": time.monotonic() - scored}
    write_atomically(out / "report.md", _report(out, found.metrics, seconds).encode())
    print(format_metrics(found.metrics))
    print(f"{out / 'poses.jpg'}: look at it; {out / 'report.md'}: what was done")


def _report(out: Path, metrics: dict[str, Any], seconds: dict[str, float]) -> str:
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return f"""# hrpose demo

{COUNT} drawn scenes, no download, and the network that comes with the package. What it was trained on, how good it is
on photographs and what it cannot do: `{shipped_checkpoint().with_suffix(".md")}`.

![poses](poses.jpg)

Left limbs are orange, right limbs blue: which is which follows from the way a person faces.

## Scores

{format_metrics(metrics)}

Times: {times}.

## The same by hand

    hrpose evaluate --data {out}/data/people.json --images {out}/data/people
    hrpose predict {out}/data/people --boxes {out}/data/people.json --out {out}/pictures

The whole job, with a network that is trained here on drawn people:

    hrpose demo --train

## Where it ran

{textwrap.indent(format_diagnosis(diagnose()), "    ")}
"""
