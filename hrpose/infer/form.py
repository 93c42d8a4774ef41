"""The form in which a network is applied at test time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrpose.ops.crop import DTYPES
from hrpose.optimize import inference_dtype, optimize


@dataclass(frozen=True)
class InferenceForm:
    """An optimized network: float images (N, 3, H, W) on its device -> heatmaps, float32."""

    network: nn.Module
    dtype: torch.dtype

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype)).float()


def crop_dtype(network: Callable[[Tensor], Tensor]) -> torch.dtype:
    """What to crop in for a network of `inference_form`: its own dtype where crops can be that, to round once."""
    dtype = network.dtype if isinstance(network, InferenceForm) else torch.float32
    return dtype if dtype in DTYPES else torch.float32


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
    return InferenceForm(optimize(model, dtype), dtype)
