"""`hrpose train`: a network on annotation files of COCO's or MPII's form."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hrpose.cli.arguments import (
    add_device_flag,
    add_ground_truth_flag,
    add_model_flags,
    add_recipe_flags,
    check_output_folder,
    default_size,
    default_workers,
    device_from,
    ground_truth_from,
    model_options_from,
    recipe_from,
    size_from,
    source_of,
    workers_from,
)
from hrpose.data.cache import cache_pixels
from hrpose.data.coco import Annotations, check_images
from hrpose.data.dataset import PoseDataset
from hrpose.data.formats import load_any
from hrpose.data.mixture import load_mixture
from hrpose.errors import InputError, check
from hrpose.eval.mpii import GroundTruth
from hrpose.files import write_atomically
from hrpose.infer.evaluate import evaluate
from hrpose.infer.protocol import Protocol, check_model
from hrpose.models import create_model, load_weights
from hrpose.ranks import Ranks, joined, launch, local_rank, restarts
from hrpose.train.fit import BEST, LAST, fit
from hrpose.train.loss import joint_weights
from hrpose.train.recipe import RECIPES
from hrpose.train.step import resolve_precision

RUN = "run.json"
_CACHING = timedelta(days=1)  # how long processes wait for one that decodes a data set


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a network on a COCO keypoint file, or MPII")
    add_flags(parser)
    parser.set_defaults(run=run)


def add_flags(parser: argparse.ArgumentParser) -> None:
    several = "; several: repeat --data and --images, the first decides on the joints"
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="FILE",
        help=f"COCO keypoints or MPII's .json or .mat to train on{several}",
    )
    parser.add_argument("--images", required=True, action="append", metavar="DIR", help="folder of their images")
    parser.add_argument("--val", metavar="FILE", help="annotations to score after each epoch (ground-truth boxes)")
    add_ground_truth_flag(parser, "--val")
    parser.add_argument("--val-images", metavar="DIR", help="folder of their images (default: the first --images)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the log and the checkpoints")
    add_model_flags(parser, "default dpn4_32")
    parser.add_argument("--weights", metavar="FILE", help="start from the weights of a checkpoint or state dict")
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"one of {', '.join(RECIPES)} (default dpn); see `hrpose recipe`"
    )
    add_recipe_flags(parser)
    parser.add_argument(
        "--sync-bn", action="store_true", help="batch norm over the batch of all processes (--set sync_bn=true)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N", help="processes that read images"
    )
    parser.add_argument("--cache", metavar="DIR", help="decode every person once into a file there, for fast epochs")
    parser.add_argument("--cache-gb", type=float, metavar="N", help="keep at most so much there (default: no limit)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")
    parser.add_argument("--checkpoint-seconds", type=float, default=300, metavar="S", help="save at least this often")
    parser.add_argument(
        "--keep",
        type=int,
        default=0,
        metavar="K",
        help="keep the networks of the last K epochs too, as epoch-001.pt ...",
    )
    parser.add_argument("--no-flip-test", action="store_true", help="validate without the flip test, in half the time")
    add_device_flag(parser)


def run(options: argparse.Namespace) -> None:
    with joined() as ranks:
        _train(options, ranks)


def _train(options: argparse.Namespace, ranks: Ranks) -> None:
    say = _say if ranks.first else _keep_quiet
    recipe = recipe_from(options, options.recipe).with_settings(["sync_bn=true"] * options.sync_bn)
    workers, seconds = workers_from(options), options.checkpoint_seconds
    check(math.isfinite(seconds) and seconds >= 0, "--checkpoint-seconds", f"must be finite and >= 0, got {seconds}")
    check(options.keep >= 0, "--keep", f"must be >= 0, got {options.keep}")
    if options.threads is not None:
        check(options.threads > 0, "--threads", f"must be > 0, got {options.threads}")
        torch.set_num_threads(options.threads)
    gigabytes = options.cache_gb
    valid = gigabytes is None or (math.isfinite(gigabytes) and gigabytes > 0)
    check(valid, "--cache-gb", f"must be finite and > 0, got {gigabytes}")
    check(gigabytes is None or bool(options.cache), "--cache-gb", "goes with --cache")
    device, out = device_from(options), Path(options.out)
    recipe = replace(recipe, precision=resolve_precision(recipe.precision, device))
    resume = ranks.on_first(lambda: _goes_on(out, options.resume))
    if options.cache:
        check_output_folder(options.cache, "--cache")
    given = len(options.data), len(options.images)
    rule = "must be given equally often, each file with its folder, got {} and {}"
    check(given[0] == given[1], "--data, --images", rule.format(*given))
    mixture = load_mixture(options.data, options.images)
    skeleton = mixture.skeleton
    size = size_from(options, default_size(skeleton))
    validation, truth = None, None
    val_images = options.val_images or options.images[0]
    if options.val:
        validation = load_any(options.val)
        labelled = all(person.joints for person in validation.persons)
        check(labelled, f"--val {options.val}", "must hold joints, is the file of a test set")
        same = validation.skeleton.joints == skeleton.joints
        check(same, f"--val {options.val}", f"must have the joints of {options.data[0]}")
        truth = ground_truth_from(options, validation)
        check_images((p.file_name for p in validation.persons), val_images)
    check(bool(options.val) or not options.ground_truth, "--ground-truth", "goes with --val, which it is of")
    torch.manual_seed(recipe.seed)
    model = create_model(options.model or "dpn4_32", skeleton.num_joints, **model_options_from(options.option))
    check_model(model, size, skeleton)
    if recipe.weighted_joints:
        joint_weights(skeleton.joints)  # raises before anything is written
    if options.weights:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a trunk taken alone: the report says it
            say(f"{options.weights}: {load_weights(model, options.weights)}")
    elif recipe.pretrained_trunk and not resume:
        say(
            "the paper of this recipe starts from a trunk trained on ImageNet: give it by --weights (HRNet's official "
            "hrnet_w32-36af842e.pth, torchvision's resnet50); this run starts from random weights"
        )
    data = PoseDataset(mixture.persons, mixture.folder, size, skeleton, recipe.augmentation, recipe.seed)
    if not resume and ranks.first:
        settings = {"model": model.hrpose_config, "size": list(size), "recipe": recipe.to_dict(), "data": options.data}
        settings["launch"] = launch()
        write_atomically(out / RUN, json.dumps(settings, indent=1).encode())
    if skeleton.flip_pairs is None:
        say("no left/right pairs in the joint names and no flip_pairs in the category: mirroring is off")
    say(f"{mixture.summary}, {skeleton.name}, {recipe.precision}, {device}")
    if options.cache:
        limit = None if gigabytes is None else int(gigabytes * 1e9)
        _cache(data, ranks, lambda: cache_pixels(data, options.cache, workers, limit, say))
    precision = "fp32" if recipe.precision == "fp16" else recipe.precision
    protocol = Protocol(flip=not options.no_flip_test, precision=precision)

    def validate(network: nn.Module) -> dict[str, Any]:
        return score(network, validation, val_images, size, protocol, workers, ranks, truth)

    has_sigmas = validation is not None and validation.skeleton.sigmas is not None
    name = "PCKh@0.5" if truth is not None else "AP" if has_sigmas else "PCK@0.2"
    entries = fit(
        model,
        data,
        recipe,
        out,
        validate=validate if validation else None,
        score=name,
        device=device,
        workers=workers,
        resume=resume,
        checkpoint_seconds=seconds,
        report=say,
        ranks=ranks,
        keep=options.keep,
    )
    scored = [entry for entry in entries if entry.get(name) is not None]
    if scored:
        best = max(reversed(scored), key=lambda entry: entry[name])  # of equals the last, as in fit
        say(f"best: epoch {best['epoch'] + 1}, {name} {100 * best[name]:.1f}, in {out / BEST}")
    else:
        say(f"the network is in {out / LAST}" + ("" if validation else "; with --val the best epoch would be kept too"))


def _cache(data: PoseDataset, ranks: Ranks, work: Callable[[], None]) -> None:
    """Rank 0 makes the cache, then one process of each machine, which may find it there, then the rest, who do."""

    def take(turn: bool) -> None:
        if turn and data.windows is None:
            work()

    for turn in (ranks.first, local_rank() in (None, 0), True):
        ranks.on_all(partial(take, turn), _CACHING)


def _goes_on(out: Path, resume: bool) -> bool:
    """Whether to go on with the run in `out`: if asked to, or if torchrun has started this again after a failure.

    Raises: InputError if that is impossible, or if a new run would replace one.
    """
    check_output_folder(out, "--out")
    held = [name for name in (LAST, BEST) if (out / name).exists()]
    if restarts() > 0 and _launch_of(out) == launch():
        return LAST in held  # else it failed before there was anything to go on with
    if resume:
        check((out / LAST).is_file(), "--resume", f"{out} holds no run ({LAST}); without --resume a new one is started")
    elif held:
        advice = "--resume goes on with it, another folder starts anew"
        raise InputError(f"--out: {out} holds a run already ({' '.join(held)}); {advice}")
    return resume


def _launch_of(out: Path) -> str | None:
    """What started the run in `out`: another one's run is not gone on with, however often torchrun tries."""
    try:
        return json.loads((out / RUN).read_bytes()).get("launch")
    except (OSError, ValueError, AttributeError):
        return None


def _keep_quiet(line: str) -> None:
    pass


def _say(line: str) -> None:
    with suppress(BrokenPipeError):  # whoever was reading has gone (`| head`); the training goes on
        print(line, flush=True)


def score(
    model: nn.Module,
    annotations: Annotations,
    folder: str | Path,
    size: tuple[int, int],
    protocol: Protocol,
    workers: int,
    ranks: Ranks,
    truth: GroundTruth | None,
) -> dict[str, Any]:
    source = source_of(annotations)
    found = evaluate(
        model, annotations, folder, size, None, source, protocol, workers=workers, ranks=ranks, ground_truth=truth
    )
    return found.metrics
