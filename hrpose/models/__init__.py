"""The table of networks, and how one is made by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from hrpose.errors import InputError, check
from hrpose.models import cpn, dpn, dpn_hrnet, hourglass, hrnet, hrnet_heads, ram_gpr, resnet, simple_baseline
from hrpose.models.weights import LoadReport, load_weights

__all__ = ["MODELS", "LoadReport", "create_model", "is_pose_model", "list_models", "load_weights", "model_options"]

# A builder is annotated with the class it returns, whose options it passes on; those of pose networks take
# num_keypoints.
_BUILDERS: tuple[Callable[..., nn.Module], ...] = (
    dpn.dpn1_32,
    dpn.dpn2_32,
    dpn.dpn3_32,
    dpn.dpn4_32,
    dpn.dpn1_64,
    dpn.dpn2_64,
    dpn.dpn3_64,
    dpn.dpn4_64,
    dpn_hrnet.dpn2_hrnet_w32,
    ram_gpr.ram_gpr_w32,
    ram_gpr.ram_gpr_w48,
    hrnet.hrnet_w18,
    hrnet.hrnet_w30,
    hrnet.hrnet_w32,
    hrnet.hrnet_w40,
    hrnet.hrnet_w48,
    simple_baseline.simple_baseline_r50,
    simple_baseline.simple_baseline_r101,
    simple_baseline.simple_baseline_r152,
    hourglass.hourglass1,
    hourglass.hourglass2,
    hourglass.hourglass4,
    hourglass.hourglass8,
    cpn.cpn_r50,
    hrnet_heads.hrnet_w18_cls,
    hrnet_heads.hrnet_w30_cls,
    hrnet_heads.hrnet_w32_cls,
    hrnet_heads.hrnet_w40_cls,
    hrnet_heads.hrnet_w48_cls,
    hrnet_heads.hrnet_w44_cls,
    hrnet_heads.hrnet_w76_cls,
    hrnet_heads.hrnet_w96_cls,
    resnet.resnet50_cls,
    resnet.resnet101_cls,
    resnet.resnet152_cls,
    hrnet_heads.hrnetv2_w40_seg,
    hrnet_heads.hrnetv2_w48_seg,
    hrnet_heads.hrnetv2p_w18,
    hrnet_heads.hrnetv2p_w32,
    hrnet_heads.hrnetv2p_w40,
    hrnet_heads.hrnetv2p_w48,
)
MODELS: dict[str, Callable[..., nn.Module]] = {build.__name__: build for build in _BUILDERS}


def list_models(*, pose: bool | None = None) -> list[str]:
    """Names that `create_model` knows, in the order of the table.

    Args:
        pose: True for the networks that emit heatmaps of keypoints, False for the others: classification (`_cls`),
            segmentation (`_seg`) and feature pyramids (`hrnetv2p_`).
    """
    return [name for name in MODELS if pose is None or is_pose_model(name) == pose]


def is_pose_model(name: str) -> bool:
    """Does this network emit heatmaps of keypoints? Raises: InputError for an unknown name."""
    return "num_keypoints" in inspect.signature(_builder(name)).parameters


def model_options(name: str) -> dict[str, Any]:
    """Options of a model and their defaults: the keyword-only arguments of its class that the builder leaves open.

    Raises: InputError for an unknown name.
    """
    network = inspect.signature(_builder(name)).return_annotation
    parameters = inspect.signature(network).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def create_model(name: str, num_keypoints: int | None = None, **options: Any) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global generator.

    The module carries `hrpose_config`, {"name", "num_keypoints", "options"} with every option spelled out, such that
    ``create_model(c["name"], c["num_keypoints"], **c["options"])`` builds the same network again.

    Args:
        name: one of `list_models()`.
        num_keypoints: heatmaps per image, 17 unless told; None for a network that has none.
        options: those of `model_options(name)`.
    Returns: a module. Pose networks: images (N, 3, H, W) -> heatmaps (N, num_keypoints, h, w); those with intermediate
        supervision (`hourglass`, `cpn`) return a tuple of such maps in training mode, the final ones last.
    Raises: InputError for an unknown name, an unknown option or a value outside an option's choices.
    """
    build = _builder(name)
    defaults = model_options(name)
    for option in options:
        if option not in defaults:
            valid = ", ".join(defaults) or "left out, it has none"
            raise InputError(f"create_model: option of {name} must be one of {valid}, got {option!r}")
    options = defaults | options
    if is_pose_model(name):
        num_keypoints = 17 if num_keypoints is None else num_keypoints
        model = build(num_keypoints, **options)
    else:
        rule = f"{name} emits no heatmaps of keypoints, num_keypoints must be left out, got {num_keypoints!r}"
        check(num_keypoints is None, "create_model", rule)
        model = build(**options)
    model.hrpose_config = {"name": name, "num_keypoints": num_keypoints, "options": options}
    return model


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(str(name), MODELS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"create_model: name must be one of {', '.join(MODELS)}, got {name!r}{hint}")
