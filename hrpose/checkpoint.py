"""The checkpoint file: a network with everything needed to use it, and while training also to go on with it."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hrpose.errors import InputError, check, shown
from hrpose.files import write_atomically
from hrpose.geometry import as_size
from hrpose.models import create_model
from hrpose.models.weights import read_torch_file
from hrpose.skeleton import Skeleton

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A network as it is stored.

    config:   of ``create_model``: name, num_keypoints, options.
    weights:  the state dict.
    skeleton: what the heatmaps mean.
    size:     (width, height) of the input it was trained with.
    training: state of the trainer and what it reported: plain values and tensors.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    skeleton: Skeleton
    size: tuple[int, int]
    training: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with its weights, in eval mode."""
        model = create_model(self.config["name"], self.config["num_keypoints"], **self.config["options"])
        model.load_state_dict(self.weights)
        return model.eval()


def compact(checkpoint: Checkpoint, training: dict[str, Any]) -> Checkpoint:
    """The checkpoint for use alone, at half the size: weights of more than one dimension in float16 (the others, such
    as batch norm's, whose running variances may lie outside its range, as they are), with another note on the training.

    Raises: InputError naming a weight that float16 cannot hold.
    """
    weights = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in checkpoint.weights.items()}
    large = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    check(not large, "checkpoint", f"its weights must be within float16's +-65504, larger: {large[:4]}")
    return Checkpoint(checkpoint.config, weights, checkpoint.skeleton, checkpoint.size, training)


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint, whole or not at all, with the SHA-256 of its content.

    Raises: InputError naming the path if it cannot be written, or if ``load_checkpoint`` would refuse the content.
    """
    content = {
        "hrpose_format": _FORMAT,
        "config": checkpoint.config,
        "model": checkpoint.weights,
        "skeleton": checkpoint.skeleton.to_dict(),
        "size": list(checkpoint.size),
        "training": checkpoint.training,
    }
    where = f"checkpoint {path}"
    try:
        sha256 = digest(content)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    _checked(content, where)
    buffer = io.BytesIO()
    torch.save({**content, "sha256": sha256}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint written by ``save_checkpoint``, tensors on the CPU. No code in the file is run.

    Raises: InputError naming the file and what is wrong: missing, damaged (check sum), no checkpoint of hrpose, of
        another format, of a network this version does not know, weights that are not that network's or not finite.
    """
    where = f"checkpoint {path}"
    content = read_torch_file(path)
    known = isinstance(content, dict) and "hrpose_format" in content
    hint = "is not a checkpoint of hrpose; for a bare state dict use hrpose.load_weights(model, path)"
    check(known, where, hint)
    version = content["hrpose_format"]
    rule = f"must have format {_FORMAT}, got {shown(version)} (written by another version of hrpose)"
    check(type(version) is int and version == _FORMAT, where, rule)
    stated = content.pop("sha256", None)
    try:
        found = digest(content)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    check(isinstance(stated, str) and stated == found, where, "is damaged: its SHA-256 check sum differs")
    return _checked(content, where)


def _checked(content: dict[str, Any], where: str) -> Checkpoint:
    """The checkpoint in the content of a file. A file made by hand can hold any plain value anywhere."""
    missing = [key for key in ("config", "model", "skeleton", "size", "training") if key not in content]
    check(not missing, where, f"{missing} missing")
    config, weights, training = content["config"], content["model"], content["training"]
    valid = isinstance(config, dict) and isinstance(config.get("name"), str) and isinstance(config.get("options"), dict)
    check(valid, where, f"config must hold name, num_keypoints and options, got {shown(config)}")
    valid = isinstance(weights, dict) and all(isinstance(tensor, Tensor) for tensor in weights.values())
    check(valid, where, "model must be a state dict")
    check(isinstance(training, dict), where, f"training must be an object, got {shown(training)}")
    size = as_size(content["size"], f"{where}: size")
    try:
        skeleton = Skeleton.from_dict(content["skeleton"])
        with torch.device("meta"):  # no memory, no arithmetic: only names, shapes and types
            expected = create_model(config["name"], config.get("num_keypoints"), **config["options"]).state_dict()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:
        raise InputError(f"{where}: no network can be built from config {shown(config)} ({error})") from error
    joints = config["num_keypoints"]
    check(skeleton.num_joints == joints, where, f"skeleton must have {joints} joints, has {skeleton.num_joints}")
    different = sorted(str(name) for name in expected.keys() ^ weights.keys())
    different += [name for name in expected.keys() & weights.keys() if not _alike(expected[name], weights[name])]
    check(not different, where, f"its weights must be those of {config['name']}, different: {different[:4]}")
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    check(not bad, where, f"its weights must be finite, NaN or infinite: {bad[:4]}")
    return Checkpoint(config, weights, skeleton, size, training)


def _alike(expected: Tensor, found: Tensor) -> bool:
    return expected.shape == found.shape and expected.is_floating_point() == found.is_floating_point()


def digest(value: Any) -> str:
    """SHA-256 over a nest of dicts, lists, plain values and tensors: names, types, shapes and every byte.

    Raises: InputError naming the first value of another type, which ``load_checkpoint`` could not read back.
    """
    sha = hashlib.sha256()
    try:
        _feed(sha, value, "")
    except InputError:
        raise
    except (RecursionError, ValueError) as error:  # nesting without end, integers of thousands of digits
        raise InputError(f"holds a value out of all proportion ({type(error).__name__})") from None
    return sha.hexdigest()


def _feed(sha: Any, value: Any, at: str) -> None:
    if type(value) in (Tensor, nn.Parameter):
        dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        check(dense, at.lstrip("."), "must be a dense tensor")
        sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    elif type(value) in (dict, OrderedDict):
        sha.update(f"dict {len(value)};".encode())
        for key, entry in value.items():
            check(type(key) in (str, int), at.lstrip("."), f"keys must be texts or integers, got {shown(key)}")
            _feed(sha, key, at)
            _feed(sha, entry, f"{at}.{key}")
    elif type(value) in (list, tuple):
        sha.update(f"list {len(value)};".encode())
        for i, entry in enumerate(value):
            _feed(sha, entry, f"{at}[{i}]")
    else:
        plain = type(value) in (type(None), bool, int, float, str, bytes)
        check(plain, at.lstrip("."), f"must be a plain value or a tensor, got {type(value).__name__}")
        sha.update(f"{type(value).__name__} {value!r};".encode())
