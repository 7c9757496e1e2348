"""Write torch.export programs to files, and run such files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from xformer.recipes.weights import KEY

FORMATS = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
OPSET = 18
Runner = Callable[[Tensor], list[Tensor]]


def _write_pt2(program: ExportedProgram, path: Path, card: str, dims: dict[int, Any], names: list[str]) -> None:
    with warnings.catch_warnings():
        # a false alarm: weights in channels_last memory format are complete
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, path, extra_files={KEY: card})


def _load_pt2(path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda images: tree_leaves(module(images))


def _write_aoti(program: ExportedProgram, path: Path, card: str, dims: dict[int, Any], names: list[str]) -> None:
    metadata = {"aot_inductor.metadata": {KEY: card}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=metadata)


def _load_aoti(path: Path) -> Runner:
    loaded = torch._inductor.aoti_load_package(str(path))
    return lambda images: tree_leaves(loaded(images))


def _write_onnx(program: ExportedProgram, path: Path, card: str, dims: dict[int, Any], names: list[str]) -> None:
    import onnx

    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=(dims,),
        input_names=["images"],
        output_names=names,
        verbose=False,
    )
    assert written is not None
    for node in written.model.graph:
        node.metadata_props.clear()
    written.model.metadata_props[KEY] = card
    written.save(path)
    onnx.checker.check_model(str(path), full_check=True)


def _load_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


WRITERS = {"pt2": _write_pt2, "aoti": _write_aoti, "onnx": _write_onnx}
LOADERS = {"pt2": _load_pt2, "aoti": _load_aoti, "onnx": _load_onnx}
