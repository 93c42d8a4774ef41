"""`hrpose evaluate`: AP, AR and PCK of a network on a COCO keypoint file, PCKh on MPII; result files of test sets."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hrpose.cli.arguments import (
    PROVIDED,
    add_device_flag,
    add_ground_truth_flag,
    add_model_flags,
    add_protocol_flags,
    check_output_folder,
    default_workers,
    device_from,
    ground_truth_from,
    model_from,
    protocol_from,
    source_of,
    workers_from,
)
from hrpose.data.coco import Annotations, load_detections
from hrpose.data.formats import load_any
from hrpose.data.mpii import SPLITS, MpiiAnnotations
from hrpose.errors import check
from hrpose.eval.coco import METRICS, result_file_name, save_results
from hrpose.eval.mpii import GROUPS, LEGACY_01, THRESHOLDS, GroundTruth
from hrpose.eval.mpii_files import check_predictions_path, save_predictions
from hrpose.infer.evaluate import evaluate
from hrpose.ranks import Ranks, joined


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="score a network on a COCO keypoint file, or MPII")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="COCO keypoint annotations, with --boxes also image_info_test-dev2017.json; MPII's .json or original .mat",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="of MPII's original .mat (default test)")
    add_ground_truth_flag(parser, "--data")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of their images")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="checkpoint of hrpose; with --model also a bare state dict (default: the network that comes with hrpose)",
    )
    parser.add_argument("--boxes", metavar="DET.json", help="detections to look at (default: the annotated boxes)")
    parser.add_argument("--min-box-score", type=float, default=0.0, metavar="S", help="leave out detections below")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the keypoints: in COCO's result format (DIR/: a test set's, by the name its server wants), "
        "for MPII as .mat or .json",
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object, on the last line")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights of --model without --checkpoint")
    add_model_flags(parser, "default: that of the checkpoint")
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
        check_output_folder(Path(options.output).parent, "--output")
    annotations = load_any(options.data, options.split, or_images=options.boxes is not None)
    mpii = isinstance(annotations, MpiiAnnotations)
    truth = ground_truth_from(options, annotations)
    _check_output(options, annotations, truth)
    if mpii and annotations.left_out and ranks.first:
        print(f"hrpose: {annotations.left_out} persons left out, without scale or centre", file=sys.stderr)
    detections, source = None, source_of(annotations)
    if options.boxes:
        check(not mpii, "--boxes", "goes with COCO files; MPII's protocol looks at its file's centres and scales")
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
            truth,
        )
    if not ranks.first:
        return
    if options.output and mpii:
        save_predictions(options.output, annotations, found.keypoints, found.scores)
    elif options.output and _is_folder(options.output):
        name = getattr(model, "hrpose_config", {}).get("name", "hrpose")
        path = Path(options.output) / result_file_name(annotations, name)
        save_results(found.results, path)
        print(f"hrpose: {path}; the server takes it zipped", file=sys.stderr)
    elif options.output:
        save_results(found.results, options.output)
    print(json.dumps(found.metrics) if options.json else format_metrics(found.metrics))


def _check_output(options: argparse.Namespace, annotations: Annotations, truth: GroundTruth | None) -> None:
    """Raise an InputError, before any work, where --output could not be written or nothing would come of the work."""
    if not options.output:
        scored = truth is not None or any(person.joints for person in annotations.persons)
        check(scored, "--output", f"must be given: {options.data} holds no joints to score against")
        return
    if isinstance(annotations, MpiiAnnotations):
        check_predictions_path(options.output)
    fits = not annotations.persons or not _is_folder(options.output)
    advice = "is a folder, which goes with COCO's images without annotations"
    check(fits, "--output", f"must be a file, but {options.output} {advice}")


def _is_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def format_metrics(metrics: dict[str, Any]) -> str:
    """The scores in a line, in percent, and below them how they were measured."""
    names = [name for name in (*METRICS, "PCK@0.2") if metrics.get(name) is not None]
    scores = "  ".join(f"{name} {100 * metrics[name]:.1f}" for name in names)
    pckh = "PCKh@0.5" in metrics
    if metrics.get("PCK reference"):
        of = {"torso": "the torso's diagonal", "box": "the box's longer side"}[metrics["PCK reference"]]
        scores += f"  (PCK: within 0.2 of {of})"
    if pckh:
        scores = f"{_pckh_table(metrics)}\n{scores}"
    elif metrics["boxes"] == PROVIDED:
        scores += "\nno PCKh: it needs head boxes and joints, as --ground-truth gt_valid.mat"
    elif "AP50" not in metrics:
        scores += '\nno AP: it needs a sigma per joint, as "sigmas" in the category of the file, and labelled joints'
    size = "x".join(map(str, metrics["input"]))
    shift = ", shifted" if metrics["shift"] else ""
    return (
        f"{scores.strip()}\n"
        f"{metrics['persons']} persons ({metrics['skeleton']}), boxes: {metrics['boxes']}, input {size} (w x h), "
        f"flip test: {'yes' + shift if metrics['flip'] else 'no'}, decoder: {metrics['decoder']}, "
        f"crop: {metrics['crop']}, {metrics['precision']}"
    )


def _pckh_table(metrics: dict[str, Any]) -> str:
    """PCKh in percent: a line for each threshold, the columns of the papers' tables, and both means."""
    columns = ["Head", "Sho", "Elb", "Wri", "Hip", "Knee", "Ank", "Mean", "unweighted"]
    lines = [f"{'percent':9}" + "".join(f"{name:>7}" for name in columns[:-1]) + f"  {columns[-1]}"]
    for threshold in THRESHOLDS:
        name = f"PCKh@{threshold:g}"
        values = [metrics[f"{name} joints"][group] for group in GROUPS]
        values += [metrics[name], metrics[f"{name} unweighted"]]
        cells = "".join("      -" if value is None else f"{100 * value:7.2f}" for value in values)
        legacy = "  (what HRNet's code prints as Mean@0.1)" if threshold == LEGACY_01 else ""
        lines.append(f"{name:9}{cells}{legacy}")
    return "\n".join(lines)
