"""Count parameters and multiply-adds of models with fvcore: ``python -m xformer.counts``.

A multiply-add counts as one (GMACs); fvcore counts 2 per element for batch norm, 5 for layer norm, and nothing for
activations and softmax. XFA is counted in its direct form by default: the Gram form takes fewer multiply-adds for large
numbers of tokens, and the form that runs is chosen at run time.
"""

from __future__ import annotations

import argparse
import copy
import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from xformer.backbone import VARIANTS
from xformer.errors import UsageError
from xformer.registry import build
from xformer_kernels import XFA, XFABlock
from xformer_kernels.flops import fvcore_handlers

FORMS = ("direct", "gram", "auto")
OTHERS = (
    "mobilevit_xxs",
    "mobilevit_xs",
    "mobilevit_s",
    "edgenext_xx_small",
    "edgenext_x_small",
    "edgenext_small",
    "efficientnet_b0",
    "deit_tiny_patch16_224",
)
SIZES = {"deit_tiny_patch16_224": 224}
SIZE = 256


class _Whole(nn.Module):
    """Hides a module's children from fvcore, which adds hooks to all it finds: XFA with hooks runs the direct form."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.hidden = (module,)

    def forward(self, *args: Any) -> Any:
        return self.hidden[0](*args)


class Counts(NamedTuple):
    parameters: int
    macs: int
    by_op: dict[str, int]
    unknown: dict[str, int]

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.2f}M parameters, {self.macs / 1e9:.3f} GMACs"


def _sdpa(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of scaled dot product attention (q k^T, and its map times v), which fvcore does not support."""
    (*heads, N, D), (*_, M, _), (*_, E) = (v.type().sizes() for v in inputs[:3])
    tokens: int = torch.Size(heads).numel() * N * M
    return tokens * (D + E)


def count(model: nn.Module, size: int | tuple[int, int] = SIZE, form: str = "direct", in_chans: int = 3) -> Counts:
    """Count one forward of a single image in eval mode. `model` is not modified.

    Args:
        model: any model; its XFA layers are counted in `form`.
        size: size of the image, or (H, W).
        form: "direct", "gram", or "auto" for the form that each layer selects for this image.
        in_chans: number of image channels.

    ``unknown`` has the number of calls of operators that fvcore does not support: activations and the like.
    """
    from fvcore.nn import FlopCountAnalysis

    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    parameters = sum(p.numel() for p in model.parameters())
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, XFA) and not (form == "gram" and module.spec.norm == "feature"):
            module.form = form
        if isinstance(module, (XFA, XFABlock)) and name:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _Whole(module))
    height, width = (size, size) if isinstance(size, int) else size
    like = next(model.parameters(), torch.empty(0))
    x = torch.zeros(1, in_chans, height, width, dtype=like.dtype, device=like.device)
    handlers = {**fvcore_handlers(), "aten::scaled_dot_product_attention": _sdpa}
    analysis = FlopCountAnalysis(model, x).set_op_handle(**handlers)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():  # the form selected in inference
        by_op = {name: int(macs) for name, macs in analysis.by_operator().items()}
        unknown = {name.rstrip("_"): number for name, number in analysis.unsupported_ops().items()}  # in place or not
    return Counts(parameters, sum(by_op.values()), by_op, unknown)


def table(names: list[str], size: int = SIZE) -> str:
    """Markdown table; our models in both forms."""
    lines = ["| model | image | parameters | GMACs | GMACs, Gram form |", "|---|---:|---:|---:|---:|"]
    for name in names:
        ours = name in VARIANTS
        at = size if ours else SIZES.get(name, size)
        model = build(name) if ours else _timm(name)
        counts = count(model, at)
        gram = f"{count(model, at, 'gram').macs / 1e9:.3f}" if ours else ""
        lines.append(f"| {name} | {at} | {counts.parameters / 1e6:.2f}M | {counts.macs / 1e9:.3f} | {gram} |")
    return "\n".join(lines)


def _timm(name: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise UsageError(f"models must be {', '.join(VARIANTS)} or names of timm.list_models(), got {name!r}")
    model: nn.Module = timm.create_model(name)
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m xformer.counts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="ours or timm's; by default ours and the usual others")
    parser.add_argument("--size", type=int, default=SIZE, help="of the image")
    options = parser.parse_args(arguments)
    if options.size < 1:
        parser.error(f"--size must be 1 or more, got {options.size}")
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    try:
        print(table(options.models or [*VARIANTS, *OTHERS], options.size))
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
