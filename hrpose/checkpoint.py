"""The checkpoint file: a network with everything needed to use it, and while training also to go on with it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hrpose.errors import InputError, check
from hrpose.files import write_atomically
from hrpose.geometry import as_size
from hrpose.models import create_model
from hrpose.models.weights import read_torch_file
from hrpose.skeleton import Skeleton

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """config: of ``create_model`` (name, num_keypoints, options). weights: the state dict. size: (width, height) of the
    input it was trained with. training: state of the trainer and what it reported, plain values and tensors."""

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


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint, whole or not at all, with the SHA-256 of its content. Raises: InputError naming the path."""
    content = {
        "hrpose_format": _FORMAT,
        "config": checkpoint.config,
        "model": checkpoint.weights,
        "skeleton": checkpoint.skeleton.to_dict(),
        "size": list(checkpoint.size),
        "training": checkpoint.training,
    }
    buffer = io.BytesIO()
    torch.save({**content, "sha256": digest(content)}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint written by ``save_checkpoint``, tensors on the CPU. No code in the file is run.

    Raises: InputError naming the file and what is wrong: missing, damaged (check sum), no checkpoint of hrpose, of a newer
        format, or of a network this version does not know.
    """
    where = f"checkpoint {path}"
    content = read_torch_file(path)
    known = isinstance(content, dict) and "hrpose_format" in content
    hint = "is not a checkpoint of hrpose; for a bare state dict use hrpose.load_weights(model, path)"
    check(known, where, hint)
    version = content["hrpose_format"]
    check(
        version == _FORMAT, where, f"must have format {_FORMAT}, got {version!r} (written by another version of hrpose)"
    )
    stated = content.pop("sha256", None)
    check(stated == digest(content), where, "is damaged: its SHA-256 check sum differs")
    try:
        size = as_size(content["size"], where)
        skeleton = Skeleton.from_dict(content["skeleton"])
        checkpoint = Checkpoint(content["config"], content["model"], skeleton, size, content["training"])
        with torch.device("meta"):
            config = checkpoint.config
            model = create_model(config["name"], config["num_keypoints"], **config["options"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: field {error} is missing or malformed") from None
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in checkpoint.weights.items()}
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    check(not different, where, f"its weights must be those of {config['name']}, different: {different[:4]}")
    return checkpoint


def digest(value: Any) -> str:
    """SHA-256 over a nest of dicts, lists, plain values and tensors: names, types, shapes and every byte."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    elif isinstance(value, Mapping):
        sha.update(f"dict {len(value)};".encode())
        for key, entry in value.items():
            _feed(sha, key)
            _feed(sha, entry)
    elif isinstance(value, (list, tuple)):
        sha.update(f"list {len(value)};".encode())
        for entry in value:
            _feed(sha, entry)
    else:
        sha.update(f"{type(value).__name__} {value!r};".encode())
