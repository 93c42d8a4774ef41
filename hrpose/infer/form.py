"""The form in which a network is applied at test time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hrpose.optimize import inference_dtype, optimize


def inference_form(model: nn.Module, precision: str = "fp32") -> Callable[[Tensor], Tensor]:
    """A function that does what a network does, as fast as this package can.

    Args:
        model: in eval mode. Networks of ``create_model`` are optimized, see ``hrpose.optimize``: a copy is made, and
            later changes of the model are not seen. Of another network nothing is known, and it is returned as it is.
        precision: "fp32": as the model is; "bf16": in bfloat16 throughout. A network that is optimized already is
            applied in its own dtype.
    Returns: float images (N, 3, H, W) on the model's device -> heatmaps, float32.
    """
    if not hasattr(model, "hrpose_config"):
        return model
    dtype = inference_dtype(model)  # one that is optimized keeps its own
    if dtype is None:
        dtype = torch.bfloat16 if precision == "bf16" else next(model.parameters()).dtype
    fast = optimize(model, dtype)
    return lambda images: fast(images.to(dtype)).float()
