"""The inference engines a network is compared with, each as a function without arguments that runs it once."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hrpose.bench.case import LIBRARY, PYTORCH, Case
from hrpose.models.fold import fold_batch_norms

COMPILE = "torch.compile"
ONNX_RUNTIME = "ONNX Runtime"
OPENVINO = "OpenVINO"


def compiled(function: Callable[..., Any], device: torch.device, fixed: Sequence[Tensor] = ()) -> Callable[..., Any]:
    """`torch.compile` at its best for inference: on a CPU with frozen weights, on CUDA tuned and in a CUDA graph.

    fixed: inputs that are the same tensors in every call. The graph reads them where they are, as ours does, instead of
        copying them first.
    """
    if device.type == "cuda":
        for tensor in fixed:
            torch._dynamo.mark_static_address(tensor)
        return torch.compile(function, mode="max-autotune", dynamic=False)
    return torch.compile(function, options={"freezing": True}, dynamic=False)


def invite_engines(case: Case, model: nn.Module, images: Tensor, dtype: torch.dtype, threads: int) -> None:
    """Enter everybody a network competes with.

    PyTorch: compiled, batch norm folded, channels_last; on CUDA also eager. On a CPU also ONNX Runtime and OpenVINO.

    Args:
        model:  float32, in eval mode; it is not changed.
        images: (N, 3, H, W) float32 on the device to compute on.
        dtype:  float32 or bfloat16, of everybody's arithmetic.
    """
    device = images.device
    folded = copy.deepcopy(model)
    fold_batch_norms(folded)
    fitted = copy.deepcopy(folded).to(dtype).to(memory_format=torch.channels_last)
    inputs = images.to(dtype).to(memory_format=torch.channels_last)
    fast = compiled(fitted, device, [inputs])
    case.invite(COMPILE, PYTORCH, lambda: lambda: fast(inputs))
    if device.type == "cuda":
        case.invite("eager, channels_last", PYTORCH, lambda: lambda: fitted(inputs))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        array = images.numpy()

        def exported() -> Path:
            if not file.exists():
                export_onnx(folded, images, file)
            return file

        if dtype == torch.float32:
            case.invite(ONNX_RUNTIME, LIBRARY, lambda: onnx_runtime(exported(), array, threads))
        else:
            case.absent[ONNX_RUNTIME] = "has no bfloat16 on CPUs"
        case.invite(OPENVINO, LIBRARY, lambda: openvino(exported(), array, threads, dtype))


def export_onnx(model: nn.Module, images: Tensor, file: Path) -> None:
    """Write the network for inputs of the shape of `images`."""
    with _quiet():
        torch.onnx.export(model, (images,), str(file), input_names=["images"], dynamo=True, verbose=False)


def onnx_runtime(file: Path, images: np.ndarray, threads: int) -> Callable[[], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images})


def openvino(file: Path, images: np.ndarray, threads: int, dtype: torch.dtype) -> Callable[[], list[np.ndarray]]:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",  # one request at a time, with all threads
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    request = core.compile_model(core.read_model(str(file)), "CPU", settings).create_infer_request()

    def call() -> list[np.ndarray]:
        results = request.infer([images], share_inputs=True, share_outputs=True)
        return [results[output] for output in request.model_outputs]

    return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about itself and about packages it does without."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
