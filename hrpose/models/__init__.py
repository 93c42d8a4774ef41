"""The table of networks, and how one is made by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from hrpose.errors import InputError
from hrpose.models import dpn
from hrpose.models.weights import load_weights

__all__ = ["MODELS", "create_model", "list_models", "load_weights", "model_options"]

# A builder takes num_keypoints and options and is annotated with the class it returns, whose options it passes on.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "dpn1_32": dpn.dpn1_32,
    "dpn2_32": dpn.dpn2_32,
    "dpn3_32": dpn.dpn3_32,
    "dpn4_32": dpn.dpn4_32,
    "dpn1_64": dpn.dpn1_64,
    "dpn2_64": dpn.dpn2_64,
    "dpn3_64": dpn.dpn3_64,
    "dpn4_64": dpn.dpn4_64,
}


def list_models() -> list[str]:
    """Names that `create_model` knows, in the order of the table."""
    return list(MODELS)


def model_options(name: str) -> dict[str, Any]:
    """Options of a model and their defaults: the keyword-only arguments of its class that the builder leaves open.

    Raises: InputError for an unknown name.
    """
    network = inspect.signature(_builder(name)).return_annotation
    parameters = inspect.signature(network).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def create_model(name: str, num_keypoints: int = 17, **options: Any) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global generator.

    The module carries `hrpose_config`, {"name", "num_keypoints", "options"} with every option spelled out, such that
    ``create_model(c["name"], c["num_keypoints"], **c["options"])`` builds the same network again.

    Args:
        name: one of `list_models()`.
        num_keypoints: heatmaps per image.
        options: those of `model_options(name)`.
    Returns: a module: images (N, 3, H, W) -> heatmaps (N, num_keypoints, h, w).
    Raises: InputError for an unknown name, an unknown option or a value outside an option's choices.
    """
    build = _builder(name)
    defaults = model_options(name)
    for option in options:
        if option not in defaults:
            raise InputError(f"create_model: option of {name} must be one of {', '.join(defaults)}, got {option!r}")
    options = defaults | options
    model = build(num_keypoints, **options)
    model.hrpose_config = {"name": name, "num_keypoints": num_keypoints, "options": options}
    return model


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(str(name), MODELS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"create_model: name must be one of {', '.join(MODELS)}, got {name!r}{hint}")
