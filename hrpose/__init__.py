"""hrpose: human pose estimation on PyTorch with its own C++/CUDA kernels."""

from hrpose import checkpoint, data, eval, geometry, infer, ops, receptive_field, viz
from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.infer import Poses, Predictor, Protocol
from hrpose.models import create_model, list_models, load_weights
from hrpose.optimize import optimize
from hrpose.shipped import shipped_checkpoint
from hrpose.skeleton import COCO17, LSP14, Skeleton

__version__ = "0.1.0"

__all__ = [
    "COCO17", "LSP14", "InputError", "Poses", "Predictor", "Protocol", "Skeleton", "checkpoint", "count_cost",
    "create_model", "data", "eval", "geometry", "infer", "list_models", "load_weights", "ops", "optimize",
    "receptive_field", "shipped_checkpoint", "viz",
]  # fmt: skip
