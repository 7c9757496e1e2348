"""Export models for use without this package: ``python -m xformer export --weights w.safetensors --to model.onnx``.

pt2     a torch.export program: ``torch.export.load(path).module()(images)``
aoti    compiled by AOTInductor: ``torch._inductor.aoti_load_package(path)(images)``
onnx    standard operators of opset 18: ``onnxruntime.InferenceSession(path).run(None, {"images": images})``

Each file contains its card (:class:`xformer.recipes.card.Card`) as JSON under the key ``xformer``: in the extra files
(pt2), metadata (aoti) or metadata_props (onnx).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from xformer.errors import UsageError
from xformer.fuse import fuse_for_inference
from xformer.recipes.card import Card
from xformer.recipes.export_files import FORMATS, LOADERS, OPSET, WRITERS, Runner
from xformer.recipes.preprocessing import Preprocessed
from xformer.recipes.settings import pairs
from xformer.recipes.tasks import find_task
from xformer.recipes.weights import build_model, load_model, preprocessing_of
from xformer_kernels import XFA

TOLERANCE = 1e-4
"""Largest accepted difference between exported and eager outputs, relative to the largest output."""


class Differs(RuntimeError):
    """The outputs of an exported file differ from those of the model."""


class Exported(NamedTuple):
    """An exported file, its input shape (with names for dynamic dimensions), and its difference to the eager model."""

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
    preprocessing: bool = False,
    input_size: tuple[int, int] | str = "dynamic",
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export a model in eval mode to a file, and compare the outputs of the file with those of the model.

    Args:
        model: images (B, in_chans, H, W) float32 to one or several tensors; not modified.
        card: card of the model; stored in the file.
        to: path that ends with ``.pt2`` or ``.onnx``. Written atomically, after the comparison.
        format: "pt2", "aoti" or "onnx"; determined by the extension by default.
        size: image size, (H, W) or "dynamic"; 0 for the card's.
        batch: batch size, or "dynamic".
        fuse: fold the batch norms of this package's layers first.
        ops: "standard", or "fused" to keep attention as the operator of xformer_kernels (pt2 only).
        preprocessing: include the card's preprocessing in the file, which then takes (B, H, W, 3) uint8, RGB, see
            :class:`xformer.recipes.preprocessing.Preprocessed`. `size` is then the size after resizing.
        input_size: (H, W) of images before preprocessing, or "dynamic"; segmenters do not resize: use `size`.
        say: called with a message and its duration after each step.

    Raises:
        UsageError: invalid arguments, preprocessing not supported for the card, a model that torch.export cannot trace,
            or no C++ compiler for aoti.
        Differs: outputs differ by more than 1e-4 of the largest output. No file is written.
    """
    to = Path(os.path.expanduser(to))
    format = format or next((name for name, ending in FORMATS.items() if ending == to.suffix.lower()), "")
    _check(to, format, size, batch, ops)
    height, width = _sizes(size, card)
    card = replace(card, image_size=height) if height == width and size != "dynamic" else card
    traced, expected = _prepared(model, fuse, ops), copy.deepcopy(model).eval()
    if preprocessing:
        _check_preprocessing(card, size, input_size)
        traced, expected = Preprocessed(traced, card), Preprocessed(expected, card)
    elif input_size != "dynamic":
        raise UsageError(f"input-size needs preprocessing in the file, got {input_size} without it")
    shapes = _shapes(model, card, size, batch, input_size if preprocessing else None)
    say = _timed(say)
    program = _trace(traced, shapes, card.model)
    say("traced")
    outputs = _names(model, len(program.graph_signature.user_outputs))

    said = json.dumps(asdict(card) | {"input": shapes.said, "preprocessing": preprocessing, "outputs": outputs})
    # with its final file name, which is stored in archives
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.stem}.") as folder:
        part = Path(folder) / f"{to.stem}{FORMATS[format]}"
        WRITERS[format](program, part, said, shapes.dims, outputs)
        say("written")
        difference, largest = _compare(expected, LOADERS[format](part), shapes)
        say("compared")
        if not difference <= TOLERANCE * largest:
            raise Differs(
                f"{to} is not written: its outputs differ from the model's by {difference:.2g}, "
                f"and the largest of them is {largest:.2g}"
            )
        os.replace(part, to)
    return Exported(to, format, shapes.said, difference, largest)


class Shapes(NamedTuple):
    """Input shapes: the traced one, its dynamic dimensions, other shapes for the comparison, and the dtype."""

    traced: tuple[int, ...]
    dims: dict[int, Any]
    others: list[tuple[int, ...]]
    dtype: torch.dtype

    @property
    def said(self) -> tuple[int | str, ...]:
        """The traced shape, with the names of dynamic dimensions."""
        return tuple(self.dims[i].__name__ if i in self.dims else n for i, n in enumerate(self.traced))


def _shapes(
    model: nn.Module, card: Card, size: Any, batch: int | str, input_size: tuple[int, int] | str | None
) -> Shapes:
    """`input_size`: None without preprocessing."""
    (height, width), step = _sizes(size, card), _reduction(model)
    pixels, least, is_open = input_size is not None, step + 1, size == "dynamic"
    if input_size is not None and find_task(card.task).resize != "none":
        least, is_open = 2, input_size == "dynamic"
        height, width = (height + 7, width + 30) if isinstance(input_size, str) else input_size
    # torch.export would specialise a batch of 1 or equal sides
    images, width = (2 if batch == "dynamic" else int(batch)), width + step * is_open
    dims: dict[int, Any] = {} if batch != "dynamic" else {0: Dim("batch", min=1)}
    rows = 1 if pixels else 2
    if is_open:
        dims |= {rows: Dim("height", min=least), rows + 1: Dim("width", min=least)}

    def shape(count: int, *sides: int) -> tuple[int, ...]:
        return (count, *sides, 3) if pixels else (count, card.in_chans, *sides)

    other = (height + 2 * step + 1, width + step) if is_open else (height, width)
    others = [shape(count, *other) for count in ((3, 1) if 0 in dims else (images,))]
    return Shapes(shape(images, height, width), dims, others, torch.uint8 if pixels else torch.float32)


def _timed(say: Callable[[str], None]) -> Callable[[str], None]:
    """Wrap `say` to append the seconds since the last call."""
    last = time.perf_counter()

    def timed(text: str) -> None:
        nonlocal last
        now = time.perf_counter()
        say(f"{text} in {now - last:.1f} s")
        last = now

    return timed


def _check_preprocessing(card: Card, size: Any, input_size: Any) -> None:
    fixed = not isinstance(input_size, str)
    if input_size != "dynamic" and not (
        fixed and len(input_size) == 2 and all(isinstance(side, int) and side > 1 for side in input_size)
    ):
        raise UsageError(f"input-size must be dynamic or H W, two numbers above 1, got {input_size}")
    if find_task(card.task).resize == "none":
        if fixed:
            raise UsageError(f"input-size is of models that resize: a segmenter's is its size, got {input_size}")
    elif size == "dynamic" or (not isinstance(size, int) and len(set(size)) > 1):
        raise UsageError(f"size must be one number where images are resized to it in the file, got {size}")


def _check(to: Path, format: str, size: Any, batch: Any, ops: str) -> None:
    if format not in FORMATS or to.suffix.lower() != FORMATS[format]:
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
    """Stride of the last feature map; 1 if the model has no ``feature_info``."""
    info = getattr(model, "feature_info", None) or [{}]
    return int(info[-1].get("reduction", 1))


def _names(model: nn.Module, outputs: int) -> list[str]:
    """Output names: the model's ``output_names``, else "logits", or "features_i" for several outputs."""
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


def _trace(model: nn.Module, shapes: Shapes, name: str) -> ExportedProgram:
    dims = shapes.dims
    try:
        with torch.no_grad():
            images = torch.zeros(shapes.traced, dtype=shapes.dtype)
            program = torch.export.export(model, (images,), dynamic_shapes=(dims,))
    except Exception as error:  # errors of the model and of every stage of tracing
        fixed = [what for what, at in (("batch", 0), ("size", 2)) if at in dims]
        advice = f" with {' and '.join(fixed)} dynamic: fix one of them" if fixed else ""
        raise UsageError(f"model {name} cannot be traced{advice} ({str(error).strip().splitlines()[0]})") from error
    for part in program.graph_module.modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # contains local paths
    return program


@torch.no_grad()
def _compare(model: nn.Module, run: Runner, shapes: Shapes) -> tuple[float, float]:
    """Return the largest output difference on random images, and the largest output."""
    difference = largest = torch.zeros(())
    generator = torch.Generator().manual_seed(0)
    for shape in shapes.others:
        images = torch.randn(shape, generator=generator)
        if shapes.dtype is torch.uint8:
            images = (60 * images + 128).clamp(0, 255).byte()
        for expected, got in zip(tree_leaves(model(images)), run(images), strict=True):
            if expected.shape != got.shape:
                raise Differs(f"outputs are {tuple(got.shape)}, the model's {tuple(expected.shape)}")
            difference = torch.maximum(difference, (got - expected).abs().max())  # propagates nan
            largest = torch.maximum(largest, expected.abs().max())
    return difference.item(), largest.item()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__.partition("\n")[0]
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
    parser.add_argument(
        "--with-preprocessing", action="store_true",
        help="resize, crop and normalisation of the card go into the file, which takes (B, H, W, 3) uint8, RGB",
    )  # fmt: skip
    parser.add_argument(
        "--input-size", nargs="+", default=["dynamic"], metavar="N",
        help="H W of images before preprocessing, or dynamic (default)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Export and print the comparison; returns 1 if the outputs differ from those of the model."""
    model, card = _model(options)
    size: Any = [_number(text) for text in options.size]
    input_size: Any = tuple(_number(text) for text in options.input_size)
    try:
        result = export(
            model, card, options.to, options.format, size="dynamic" if size == ["dynamic"] else size or 0,
            batch=_number(options.batch), fuse=options.fuse, ops=options.ops,
            preprocessing=options.with_preprocessing,
            input_size="dynamic" if input_size == ("dynamic",) else input_size, say=_say,
        )  # fmt: skip
    except Differs as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(result)
    if options.ops == "fused":
        print("it has an op of this package: import xformer_kernels before torch.export.load")
    return 0


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def _model(options: argparse.Namespace) -> tuple[nn.Module, Card]:
    changes: dict[str, Any] = {"options": pairs(options.model_options)} if options.model_options else {}
    if options.num_classes:
        changes["num_classes"] = options.num_classes
    if options.weights:
        return load_model(os.path.expanduser(options.weights), options.model, **changes)
    if not options.model:
        raise UsageError("weights: give a safetensors file, or --model for a model with random weights")
    model, card = random_model(Card(options.model, **{"num_classes": 1000, **changes}))
    print(f"{card.model} with random weights")
    return model, card


def random_model(card: Card) -> tuple[nn.Module, Card]:
    """A model with random weights in eval mode, and its card with the preprocessing that the model asks for.

    No batch norm has weight 0, as ``zero_init_last`` sets it: errors in that branch would not change the outputs.
    """
    model = build_model(card)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.ones_(module.weight)
    return model.eval(), replace(card, **preprocessing_of(model))


def _number(text: str) -> Any:
    return int(text) if text.isdecimal() else text
