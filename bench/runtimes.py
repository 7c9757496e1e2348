"""Inference runtimes other than PyTorch: each runs the ONNX file that :mod:`xformer.recipes.export` writes of a model.

Both get as many threads as PyTorch has, images of one fixed shape, and float32.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xformer.recipes.card import Card
from xformer.recipes.export import export

RUNTIMES = {
    "onnxruntime": "ONNX Runtime, CPU execution provider, of the file that xformer.recipes.export writes",
    "openvino": "OpenVINO, CPU plugin, performance hint LATENCY, inference precision f32, of the same file",
}
EXPORTER = ("onnx", "onnxscript")
"""Packages without which no file can be written."""

Run = Callable[[Tensor], Tensor]
"""From contiguous images (B, C, H, W) to the output."""


def missing(runtime: str) -> list[str]:
    """Packages that `runtime` needs here and that are not installed."""
    return [package for package in (*EXPORTER, runtime) if importlib.util.find_spec(package) is None]


def load(model: Any, name: str, shape: tuple[int, ...], runtimes: Sequence[str]) -> dict[str, Run]:
    """`model`, a classifier of timm's registry by this name, in each of `runtimes`, for images of this shape."""
    if not runtimes:
        return {}
    images, channels, height, width = shape
    card = Card(name, model.num_classes, in_chans=channels)
    with tempfile.TemporaryDirectory() as folder:
        path = export(model, card, Path(folder) / "model.onnx", size=(height, width), batch=images).path
        return {runtime: LOADERS[runtime](path) for runtime in runtimes}


def _load_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # its threads spin while they wait for work: not beyond a call, into the time of others
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _load_openvino(path: Path) -> Run:
    import openvino

    config: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(str(path), "CPU", config).create_infer_request()
    return lambda images: torch.from_numpy(request.infer({"images": images.numpy()}, share_inputs=True)[0])


LOADERS: dict[str, Callable[[Path], Run]] = {"onnxruntime": _load_onnxruntime, "openvino": _load_openvino}
