"""Flags that several subcommands share, and what they stand for."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hrpose.checkpoint import load_checkpoint
from hrpose.data.coco import Annotations
from hrpose.data.mpii import MpiiAnnotations
from hrpose.errors import InputError, check
from hrpose.eval.mpii import GroundTruth, check_same_persons, ground_truth_of, load_ground_truth
from hrpose.infer.evaluate import GROUND_TRUTH
from hrpose.infer.protocol import CROPS, PRECISIONS, REFINEMENTS, Protocol
from hrpose.models import create_model, load_weights
from hrpose.ranks import local_rank, local_world
from hrpose.shipped import shipped_checkpoint
from hrpose.skeleton import MPII16, Skeleton
from hrpose.train.recipe import Recipe, get_recipe

PROVIDED = "MPII's centres and scales"


def source_of(annotations: Annotations) -> str:
    """What to call the boxes of an annotation file in results."""
    return PROVIDED if isinstance(annotations, MpiiAnnotations) else GROUND_TRUTH


def add_model_flags(parser: argparse.ArgumentParser, default_model: str) -> None:
    parser.add_argument("--model", metavar="NAME", help=f"network by name, see `hrpose models` ({default_model})")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the network, e.g. dilation=reversed",
    )
    default = "of the network's input (default {}, with a hrpose checkpoint what it was trained with)"
    parser.add_argument("--width", type=int, metavar="PX", help=default.format("192, for MPII 256"))
    parser.add_argument("--height", type=int, metavar="PX", help=default.format(256))


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE.toml", help="values of the recipe; recipe = NAME in it stands for --recipe"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="shorten or stretch the recipe, drops in proportion")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a value of the recipe, e.g. lr=5e-4; an unknown name lists all; batch_size is that of all "
        "processes together where torchrun starts several",
    )


def recipe_from(options: argparse.Namespace, name: str | None) -> Recipe:
    """The recipe `name` with the values of --config, of --epochs and of --set, in this order.

    Raises: InputError naming the flag, or the file and its value.
    """
    values = read_toml(options.config) if options.config else {}
    named = values.pop("recipe", "dpn")
    recipe = get_recipe(named if name is None else name).with_values(values, f"--config {options.config}")
    if options.epochs is not None:
        check(options.epochs > 0, "--epochs", f"must be > 0, got {options.epochs}")
        recipe = recipe.with_epochs(options.epochs)
    return recipe.with_settings(options.set)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file. Raises: InputError naming it, also where Python is too old to read any."""
    where = f"--config {path}"
    try:
        import tomllib
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        raise InputError(
            f"{where}: TOML is read from Python 3.11 on, this is {version}; --set takes the same values"
        ) from None
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise InputError(f"{where}: must be TOML ({error})") from error


def add_ground_truth_flag(parser: argparse.ArgumentParser, whose: str) -> None:
    what = "MPII's head boxes and joints, for PCKh (default: those in its original .mat)"
    parser.add_argument("--ground-truth", metavar="gt_valid.mat", help=f"of {whose}: {what}")


def ground_truth_from(options: argparse.Namespace, annotations: Annotations) -> GroundTruth | None:
    """What PCKh compares with: the file named, or the annotations' own; checked to be of the persons annotated."""
    if options.ground_truth is None:
        return ground_truth_of(annotations) if isinstance(annotations, MpiiAnnotations) else None
    rule = f"goes with the joints of {MPII16.name}, {annotations.path} has those of {annotations.skeleton.name}"
    check(annotations.skeleton.joints == MPII16.joints, "--ground-truth", rule)
    truth = load_ground_truth(options.ground_truth)
    check_same_persons(truth, annotations.persons)
    return truth


def add_protocol_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-flip", action="store_true", help="do not average with the mirrored image's heatmaps")
    parser.add_argument("--no-shift", action="store_true", help="do not shift the mirrored heatmaps by one pixel")
    parser.add_argument("--refine", choices=REFINEMENTS, default="quarter", help="sub-pixel step of the decoder")
    parser.add_argument("--blur", type=int, default=11, metavar="PX",
                        help="for --refine dark: 11 for networks trained with sigma 2, 17 for sigma 3")  # fmt: skip
    parser.add_argument("--crop", choices=CROPS, default="exact", help="opencv4: the arithmetic of published APs")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="persons per forward pass")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def protocol_from(options: argparse.Namespace) -> Protocol:
    check(options.batch_size > 0, "--batch-size", f"must be > 0, got {options.batch_size}")
    return Protocol(
        flip=not options.no_flip,
        shift=not options.no_shift,
        refine=options.refine,
        blur=options.blur,
        crop=options.crop,
        precision=options.precision,
    )


def device_from(options: argparse.Namespace) -> torch.device:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if local_rank() is not None:
        check(name in ("cpu", "cuda"), "--device", f"must be cpu or cuda where torchrun deals out cards, got {name!r}")
        name = f"cuda:{local_rank()}" if name == "cuda" else name
    rule = f"must be cpu, or cuda or cuda:N where there is such a card, got {name!r}"
    check(name.partition(":")[0] in ("cpu", "cuda"), "--device", rule)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {rule} ({str(error).splitlines()[0]})") from None
    return device


def workers_from(options: argparse.Namespace) -> int:
    check(options.workers >= 0, "--workers", f"must be >= 0, got {options.workers}")
    return options.workers


def default_size(skeleton: Skeleton) -> tuple[int, int]:
    """(width, height) of the papers' smaller input: MPII's persons are given by squares."""
    return (256, 256) if skeleton == MPII16 else (192, 256)


def size_from(options: argparse.Namespace, default: tuple[int, int]) -> tuple[int, int]:
    given = options.width, options.height
    size = tuple(other if side is None else side for side, other in zip(given, default, strict=True))
    check(min(size) > 0, "--width, --height", f"must be > 0, got {size[0]}, {size[1]}")
    return size


def check_output_folder(folder: str | Path, flag: str) -> None:
    """Raise an InputError if files cannot be written to the folder, which need not exist yet; nothing is made."""
    existing = next(
        path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if os.path.lexists(path)
    )
    check(existing.is_dir(), flag, f"must be a folder, but {existing} is a file")
    check(os.access(existing, os.W_OK | os.X_OK), flag, f"must be a folder to write to, but {existing} is not writable")


def model_from(options: argparse.Namespace, skeleton: Skeleton) -> tuple[nn.Module, tuple[int, int]]:
    """The network and its input size from --checkpoint, from --model with a state dict as --checkpoint, from --model
    alone (random weights), or with neither of them the one that comes with the package."""
    if not options.model:
        check(not options.option, "--option", "goes with --model; the network of a checkpoint has its own options")
        path = options.checkpoint or shipped_checkpoint()
        checkpoint = load_checkpoint(path)
        same = checkpoint.skeleton.joints == skeleton.joints
        theirs = f"{checkpoint.skeleton.name} ({', '.join(checkpoint.skeleton.joints)})"
        mine = f"{skeleton.name} ({', '.join(skeleton.joints)})"
        where = f"checkpoint {options.checkpoint or f'{path.name} of the package (no --checkpoint)'}"
        check(same, where, f"was trained for the joints of {theirs}; the data has {mine}")
        return checkpoint.build(), size_from(options, checkpoint.size)
    name = options.model
    model = create_model(name, skeleton.num_joints, **model_options_from(options.option))
    if options.checkpoint:
        load_weights(model, options.checkpoint, part="all")
    else:
        print(f"hrpose: no --checkpoint: {name} with random weights", file=sys.stderr)
    return model.eval(), size_from(options, default_size(skeleton))


def model_options_from(settings: list[str]) -> dict[str, str | int | bool]:
    """NAME=VALUE settings as keyword arguments of ``create_model``; whole numbers become integers, true and false
    truth values."""
    options: dict[str, str | int | bool] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        check(bool(name and equals), "--option", f"must be NAME=VALUE, got {setting!r}")
        try:
            options[name] = int(value)
        except ValueError:
            options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def default_workers() -> int:
    """Processes that read images for this one: none on small machines, where they would fight with the network for the
    cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= local_world()
    return 0 if cores <= 4 else min(8, cores // 2)
