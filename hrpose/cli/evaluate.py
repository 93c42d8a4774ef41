"""`hrpose evaluate`: AP, AR and PCK of a network on a COCO keypoint file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hrpose.cli.arguments import (
    add_device_flag,
    add_model_flags,
    add_protocol_flags,
    check_output_folder,
    default_workers,
    device_from,
    model_from,
    protocol_from,
    workers_from,
)
from hrpose.data.coco import load_annotations, load_detections
from hrpose.errors import check
from hrpose.eval.coco import METRICS, save_results
from hrpose.infer.evaluate import GROUND_TRUTH, evaluate
from hrpose.ranks import Ranks, joined


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="score a network on a COCO keypoint file")
    parser.add_argument("--data", required=True, metavar="FILE.json", help="COCO keypoint annotations")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of their images")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="checkpoint of hrpose; with --model also a bare state dict"
    )
    parser.add_argument("--boxes", metavar="DET.json", help="detections to look at (default: the annotated boxes)")
    parser.add_argument("--min-box-score", type=float, default=0.0, metavar="S", help="leave out detections below")
    parser.add_argument("--output", metavar="FILE.json", help="write the keypoints in COCO's result format")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object, on the last line")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights used without --checkpoint")
    add_model_flags(parser)
    add_protocol_flags(parser)
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N", help="processes that read images"
    )
    add_device_flag(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    with joined() as ranks:
        _evaluate(options, ranks)


def _evaluate(options: argparse.Namespace, ranks: Ranks) -> None:
    protocol, device, workers = protocol_from(options), device_from(options), workers_from(options)
    check(math.isfinite(options.min_box_score), "--min-box-score", f"must be finite, got {options.min_box_score}")
    check(0 <= options.seed < 2**63, "--seed", f"must be >= 0 and < 2^63, got {options.seed}")
    if options.output:
        check(not Path(options.output).is_dir(), "--output", f"must be a file, but {options.output} is a folder")
        check_output_folder(Path(options.output).parent, "--output")
    annotations = load_annotations(options.data)
    detections, source = None, GROUND_TRUTH
    if options.boxes:
        source = Path(options.boxes).name
        detections, elsewhere = load_detections(options.boxes, annotations, options.min_box_score)
        if elsewhere:
            print(f"hrpose: {elsewhere} boxes left out, for images that {options.data} does not list", file=sys.stderr)
    torch.manual_seed(options.seed)
    model, size = model_from(options, annotations.skeleton)
    total = len(annotations.persons if detections is None else detections)
    quiet = None if ranks.first else True
    # Of several processes the first shows how far it is: so are the others.
    with tqdm(total=total // ranks.world, unit="person", disable=quiet, leave=False, dynamic_ncols=True) as bar:
        found = evaluate(
            model.to(device, memory_format=torch.channels_last),
            annotations,
            options.images,
            size,
            detections,
            source,
            protocol,
            options.batch_size,
            workers,
            bar.update,
            ranks,
        )
    if not ranks.first:
        return
    if options.output:
        save_results(found.results, options.output)
    print(json.dumps(found.metrics) if options.json else format_metrics(found.metrics))


def format_metrics(metrics: dict[str, Any]) -> str:
    """The scores in a line, in percent, and below them how they were measured."""
    names = [name for name in (*METRICS, "PCK@0.2") if metrics.get(name) is not None]
    scores = "  ".join(f"{name} {100 * metrics[name]:.1f}" for name in names)
    if metrics.get("PCK reference"):
        of = {"torso": "the torso's diagonal", "box": "the box's longer side"}[metrics["PCK reference"]]
        scores += f"  (PCK: within 0.2 of {of})"
    if "AP50" not in metrics:
        scores += '\nno AP: it needs a sigma per joint, as "sigmas" in the category of the annotation file'
    size = "x".join(map(str, metrics["input"]))
    shift = ", shifted" if metrics["shift"] else ""
    return (
        f"{scores.strip()}\n"
        f"{metrics['persons']} persons ({metrics['skeleton']}), boxes: {metrics['boxes']}, input {size} (w x h), "
        f"flip test: {'yes' + shift if metrics['flip'] else 'no'}, decoder: {metrics['decoder']}, "
        f"crop: {metrics['crop']}, {metrics['precision']}"
    )
