"""Models as files that run without this package: ``python -m xformer export --weights w.safetensors --to model.onnx``.

pt2     a graph of torch.export: ``torch.export.load(path).module()(images)``
aoti    compiled by AOTInductor: ``torch._inductor.aoti_load_package(path)(images)``
onnx    standard operators of opset 18: ``onnxruntime.InferenceSession(path).run(None, {"images": images})``

Each carries its card (:class:`xformer.weights.Card`) as JSON by the name ``xformer``: in pt2's extra files, aoti's
metadata and onnx's metadata_props.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from xformer.errors import UsageError
from xformer.fuse import fuse_for_inference
from xformer.weights import KEY, Card, build_model, load_model, preparation
from xformer_kernels import XFA

FORMATS = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
OPSET = 18
TOLERANCE = 1e-4
"""Of the largest output, between a file's outputs and eager ones."""
Run = Callable[[Tensor], list[Tensor]]


class Differs(RuntimeError):
    """A file's outputs are not those of the model."""


class Exported(NamedTuple):
    """A file, the shape of its images ("B" and such where it is dynamic), and how it compares with the eager model."""

    path: Path
    format: str
    shape: tuple[int | str, ...]
    difference: float
    largest: float

    def __str__(self) -> str:
        what = self.format + (f" of opset {OPSET}" if self.format == "onnx" else "")
        return (
            f"{self.path}: {what}, images {' x '.join(map(str, self.shape))}, {self.path.stat().st_size / 1e6:.1f} MB\n"
            f"largest difference to eager: {self.difference:.2g}, of largest output {self.largest:.3g}: "
            f"{self.difference / max(self.largest, 1e-30):.2g}"
        )


def export(
    model: nn.Module,
    card: Card,
    to: str | Path,
    format: str = "",
    *,
    size: int | tuple[int, int] | str = 0,
    batch: int | str = "dynamic",
    fuse: bool = True,
    ops: str = "standard",
) -> Exported:
    """Write a model in eval mode as a file, and compare what the file computes with the model itself.

    Args:
        model: images (B, in_chans, H, W) float32 to a tensor or several; left as it is.
        card: of the model; it goes into the file.
        to: ends with ``.pt2`` or ``.onnx``. Under this name there is only ever a whole and compared file.
        format: "pt2", "aoti" or "onnx"; by default what the ending says.
        size: of images, or (H, W), or "dynamic"; 0: the card's.
        batch: how many images, or "dynamic".
        fuse: whether batch norms of this package's layers are folded first.
        ops: "standard", or "fused": attention stays the op of xformer_kernels, in pt2 alone.

    Raises:
        UsageError: other values; a model that torch.export does not take so; no C++ compiler for aoti.
        Differs: outputs differ by more than 1e-4 of their largest. No file is written.
    """
    to = Path(to)
    format = format or next((name for name, ending in FORMATS.items() if ending == to.suffix), "")
    _check(to, format, size, batch, ops)
    height, width = _sizes(size, card)
    card = replace(card, image_size=height) if height == width and size != "dynamic" else card
    step = _reduction(model)
    # a batch of 1 or equal sides would be taken for fixed
    shape = (2 if batch == "dynamic" else int(batch), card.in_chans, height, width + step * (size == "dynamic"))
    dims: dict[int, Any] = {} if batch != "dynamic" else {0: Dim("batch", min=1)}
    if size == "dynamic":
        dims |= {2: Dim("height", min=step + 1), 3: Dim("width", min=step + 1)}
    program = _trace(_prepared(model, fuse, ops), shape, dims, card.model)
    outputs = _names(model, len(program.graph_signature.user_outputs))

    images = tuple(dims[i].__name__ if i in dims else n for i, n in enumerate(shape))
    said = json.dumps(asdict(card) | {"input": images, "outputs": outputs})
    # under its own name, which goes into archives
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.stem}.") as folder:
        part = Path(folder) / to.name
        WRITERS[format](program, part, said, dims, outputs)
        difference, largest = _compare(model, LOADERS[format](part), _others(shape, dims, step))
        if not difference <= TOLERANCE * largest:
            raise Differs(
                f"{to} is not written: its outputs differ from the model's by {difference:.2g}, "
                f"and the largest of them is {largest:.2g}"
            )
        os.replace(part, to)
    return Exported(to, format, images, difference, largest)


def _check(to: Path, format: str, size: Any, batch: Any, ops: str) -> None:
    if format not in FORMATS or to.suffix != FORMATS[format]:
        endings = ", ".join(f"{ending} for {name}" for name, ending in FORMATS.items())
        raise UsageError(f"to must end with {endings}, got {to}{format and f' for {format}'}")
    if batch != "dynamic" and not (isinstance(batch, int) and batch > 0):
        raise UsageError(f"batch must be dynamic or 1 or more, got {batch}")
    if ops not in ("standard", "fused") or (ops == "fused" and format != "pt2"):
        raise UsageError(f"ops must be standard, or fused for pt2, got {ops} for {format}")
    if format == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UsageError("format aoti needs a C++ compiler: set CXX to one, or take pt2 or onnx") from error
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"to must be a file in a folder, got {to}: {error}") from error


def _sizes(size: Any, card: Card) -> tuple[int, int]:
    sides = (card.image_size,) if size in (0, "dynamic") else (size,) if isinstance(size, int) else tuple(size)
    if not (0 < len(sides) < 3 and all(isinstance(side, int) and side > 0 for side in sides)):
        raise UsageError(f"size must be dynamic, or one or two numbers of pixels, got {size}")
    return sides[0], sides[-1]


def _reduction(model: nn.Module) -> int:
    """Pixels of an image by those of the last feature map, along a side; 1 if the model does not say."""
    info = getattr(model, "feature_info", None) or [{}]
    return int(info[-1].get("reduction", 1))


def _names(model: nn.Module, outputs: int) -> list[str]:
    """Of outputs: what the model calls them, else logits, or features of several scales."""
    own = list(getattr(model, "output_names", ()))
    if len(own) == outputs:
        return own
    return ["logits"] if outputs == 1 else [f"features_{i}" for i in range(outputs)]


def _prepared(model: nn.Module, fuse: bool, ops: str) -> nn.Module:
    model = fuse_for_inference(model, kernels=False) if fuse else copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, XFA) and ops == "standard":
            module.backend, module.form = "reference", "direct"
    return model.requires_grad_(False)


def _trace(model: nn.Module, shape: tuple[int, ...], dims: dict[int, Any], name: str) -> ExportedProgram:
    try:
        with torch.no_grad():
            program = torch.export.export(model, (torch.zeros(shape),), dynamic_shapes=(dims,))
    except Exception as error:  # of many kinds: the model's own, and those of every stage of tracing
        fixed = [what for what, at in (("batch", 0), ("size", 2)) if at in dims]
        advice = f" with {' and '.join(fixed)} dynamic: fix one of them" if fixed else ""
        raise UsageError(f"model {name} cannot be traced{advice} ({str(error).strip().splitlines()[0]})") from error
    for part in program.graph_module.modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _others(shape: tuple[int, ...], dims: dict[int, Any], step: int) -> list[tuple[int, ...]]:
    """Shapes to compare on: other ones than traced where they are dynamic."""
    B, C, H, W = shape
    if 2 in dims:
        H, W = H + 2 * step + 1, W + step
    return [(b, C, H, W) for b in ((3, 1) if 0 in dims else (B,))]


@torch.no_grad()
def _compare(model: nn.Module, run: Run, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """The largest difference of outputs on random images, and the largest output."""
    difference = largest = torch.zeros(())
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model).eval()
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        for expected, got in zip(tree_leaves(model(images)), run(images), strict=True):
            if expected.shape != got.shape:
                raise Differs(f"outputs are {tuple(got.shape)}, the model's {tuple(expected.shape)}")
            difference = torch.maximum(difference, (got - expected).abs().max())  # of nan: nan
            largest = torch.maximum(largest, expected.abs().max())
    return difference.item(), largest.item()


def _write_pt2(program: ExportedProgram, path: Path, card: str, dims: dict[int, Any], names: list[str]) -> None:
    with warnings.catch_warnings():
        # weights in channels_last memory are whole
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, path, extra_files={KEY: card})


def _load_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: tree_leaves(module(images))


def _write_aoti(program: ExportedProgram, path: Path, card: str, dims: dict[int, Any], names: list[str]) -> None:
    metadata = {"aot_inductor.metadata": {KEY: card}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=metadata)


def _load_aoti(path: Path) -> Run:
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


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


WRITERS = {"pt2": _write_pt2, "aoti": _write_aoti, "onnx": _write_onnx}
LOADERS = {"pt2": _load_pt2, "aoti": _load_aoti, "onnx": _load_onnx}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help="a model as a file for inference elsewhere", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--weights", default="", help="safetensors; without them --model has random ones")
    parser.add_argument("--model", default="", help="a name of ours or timm's, where there is no file that says it")
    parser.add_argument("--num-classes", type=int, help="of --model")
    parser.add_argument("--model-options", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of --model")
    parser.add_argument("--to", required=True, metavar="FILE", help="ends with .pt2 or .onnx")
    parser.add_argument("--format", choices=FORMATS, default="", help="default: by the ending, pt2 or onnx")
    parser.add_argument(
        "--size", nargs="+", default=[], metavar="N", help="pixels, H W, or dynamic; default: the card's"
    )
    parser.add_argument("--batch", default="dynamic", help="images, or dynamic (default)")
    parser.add_argument(
        "--fuse", action=argparse.BooleanOptionalAction, default=True, help="fold batch norms (default), or not"
    )
    parser.add_argument(
        "--ops", choices=("standard", "fused"), default="standard",
        help="torch's operators (default), or attention as this package's op: pt2 only, and such a file loads "
        "after `import xformer_kernels`",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export and say how the file compares; 1 if it does not compute what the model does."""
    model, card = _model(options)
    size: Any = [_number(text) for text in options.size]
    try:
        result = export(
            model, card, options.to, options.format, size="dynamic" if size == ["dynamic"] else size or 0,
            batch=_number(options.batch), fuse=options.fuse, ops=options.ops,
        )  # fmt: skip
    except Differs as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(result)
    if options.ops == "fused":
        print("it has an op of this package: import xformer_kernels before torch.export.load")
    return 0


def _model(options: argparse.Namespace) -> tuple[nn.Module, Card]:
    from xformer.recipe import pairs

    changes: dict[str, Any] = {"options": pairs(options.model_options)} if options.model_options else {}
    if options.num_classes:
        changes["num_classes"] = options.num_classes
    if options.weights:
        return load_model(options.weights, options.model, **changes)
    if not options.model:
        raise UsageError("weights: give a safetensors file, or --model for a model with random weights")
    card = Card(options.model, **{"num_classes": 1000, **changes})
    model = build_model(card)
    print(f"{card.model} with random weights")
    return model.eval(), replace(card, **preparation(model))


def _number(text: str) -> Any:
    return int(text) if text.isdecimal() else text
