"""Reading weight files: nothing executed, nothing damaged accepted, nothing taken or left out unsaid."""

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hrpose.errors import InputError, check, check_choice

_ZIP_START = b"PK\x03\x04"
# The pickled magic number with which torch.save opened its files before it wrote zip archives (torch < 1.6).
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_ZIP_FOLDER = 0x10  # MS-DOS attribute
_NAMES_SHOWN = 8


def read_torch_file(path: str | Path) -> Any:
    """Object written by ``torch.save``, its tensors on the CPU.

    Only tensors and plain Python values are read; code in the file is never run. The file is read once, and in a zip
    archive, the format since torch 1.6, the CRC-32 of every record is verified first, so a changed bit is an error or
    lies where it has no effect. The older format has no check sums.

    Raises: InputError naming the file: missing, unreadable, damaged, not written by torch.save, or holding code.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    known = data.startswith((_ZIP_START, _LEGACY_START))
    check(known, str(path), "is not a file written by torch.save")
    # Both parsers meet arbitrary bytes here and answer them with errors of a dozen types.
    if data.startswith(_ZIP_START):
        try:
            archive = zipfile.ZipFile(io.BytesIO(data))
            damaged = archive.testzip()
        except Exception as error:
            raise InputError(f"{path}: is damaged or cut short (not a sound zip archive)") from error
        check(damaged is None, str(path), f"is damaged: check sum of record {damaged!r} differs")
        # torch.load would leave the tensor of such a record uninitialised, without an error.
        folder = any(record.external_attr & _ZIP_FOLDER for record in archive.infolist())
        check(not folder, str(path), "is damaged: a record is marked as a folder")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: holds something other than tensors and plain values, not loaded") from error
    except Exception as error:
        raise InputError(f"{path}: is damaged or not a checkpoint (torch.load cannot read it)") from error


@dataclass(frozen=True)
class LoadReport:
    """What a file of weights gave to a model, by state-dict names.

    taken:      entries that the model has from the file now.
    missing:    entries of the model that the file lacks; they are as they were.
    unexpected: entries of the file for which the model has no place.
    """

    taken: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} entries taken"]
        if self.missing:
            parts.append(f"{len(self.missing)} of the model missing and left as they were ({_first(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} of the file without a place ({_first(self.unexpected)})")
        return ", ".join(parts)


def load_weights(model: nn.Module, path: str | Path, part: str = "auto") -> LoadReport:
    """Load a state dict file into `model`, completely, or its trunk completely, or not at all.

    Official checkpoints of HRNet, SimpleBaseline and torchvision's ResNets load as they are. ImageNet checkpoints, and
    those of a network with another head on the same trunk, fill the trunk.

    Args:
        model: any module; changed only if the file fits. Its class may name the beginnings of its `trunk` entries,
            parts of the trunk that a file may lack (`trunk_may_lack`) or have in excess (`trunk_may_drop`).
        path: file of a state dict, or of a dict that holds one as "model" or "state_dict". Names may carry the prefix
            ``module.`` that DataParallel adds. Floating types are converted to the model's. Counters of batches
            (num_batches_tracked), which files of torch < 0.4.1 lack, may be missing.
        part: "all": names and shapes must be the model's. "trunk": the trunk is taken, the rest of the file ignored.
            "auto": all, or, with a warning, the trunk where the file has nothing of the model's head.
    Returns: what was taken, missing and unexpected.
    Raises: InputError for a file `read_torch_file` refuses or that has no state dict; for names or shapes that do not
        fit, listing them; for tensors of another kind than the model's, and for NaN or infinite values.
    """
    where = str(path)
    check_choice(part, ("auto", "all", "trunk"), "load_weights", "part")
    prefixes = getattr(model, "trunk", ())
    check(part != "trunk" or prefixes, "load_weights", f"part must be 'all', {type(model).__name__} has no trunk")
    given = _state_dict(read_torch_file(path), where)
    expected = model.state_dict()
    if part == "trunk":
        given = {name: tensor for name, tensor in given.items() if name.startswith(prefixes)}
    shared = [name for name in expected if name in given]
    fresh = [name for name in expected if name not in given and _batch_norm_weight(name) in given]
    missing = [name for name in expected if name not in given and name not in fresh]
    unexpected = [name for name in given if name not in expected]

    wrong_missing, wrong_unexpected = missing, unexpected
    head = [name for name in shared if not name.startswith(prefixes)] if prefixes else shared
    headless = prefixes and not head
    if prefixes and part != "all":
        wrong_missing = [name for name in missing if not _any_in(getattr(model, "trunk_may_lack", ()), name)]
        if headless:
            wrong_missing = [name for name in wrong_missing if name.startswith(prefixes)]
        wrong_unexpected = [name for name in unexpected if not _any_in(getattr(model, "trunk_may_drop", ()), name)]
        wrong_unexpected = [name for name in wrong_unexpected if name.startswith(prefixes) or not headless]
    differences = {
        "missing": wrong_missing,
        "unexpected": wrong_unexpected,
        "of another shape": [
            f"{name}: {tuple(given[name].shape)} in the file, {tuple(expected[name].shape)} in the model"
            for name in shared
            if given[name].shape != expected[name].shape
        ],
        "of another type": [
            f"{name}: {given[name].dtype} in the file, {expected[name].dtype} in the model"
            for name in shared
            if _kind(given[name]) != _kind(expected[name])
        ],
    }
    parts = [f"{len(names)} {what} ({_first(names)})" for what, names in differences.items() if names]
    check(not parts, where, f"the state dict must fit the model, got {', '.join(parts)}")
    bad = [name for name in shared if not torch.isfinite(given[name]).all()]
    check(not bad, where, f"weights must be finite, got NaN or infinity in {len(bad)} tensors ({_first(bad)})")
    started = {name: torch.zeros_like(expected[name]) for name in fresh}
    model.load_state_dict({**expected, **started, **{name: given[name] for name in shared}}, strict=True)
    report = LoadReport(tuple(shared), tuple(missing), tuple(unexpected))
    if part == "auto" and (missing or unexpected):
        warnings.warn(f"{path}: {report}; part='trunk' says that this is meant", stacklevel=2)
    return report


def _batch_norm_weight(name: str) -> str | None:
    """The weight beside a counter of batches."""
    stem = name.removesuffix("num_batches_tracked")
    return None if stem == name else f"{stem}weight"


def _any_in(fragments: Iterable[str], name: str) -> bool:
    return any(fragment in name for fragment in fragments)


def _state_dict(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict in the content of a file, without the prefix of DataParallel."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    usable = isinstance(content, Mapping) and len(content) > 0
    usable = usable and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    check(usable, where, "must hold a state dict (names and tensors), alone or as 'model' or 'state_dict'")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def _kind(tensor: Tensor) -> tuple:
    """What copying cannot convert; a meta tensor would be copied as nothing at all."""
    return "floating" if tensor.is_floating_point() else tensor.dtype, tensor.layout, tensor.is_meta


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
