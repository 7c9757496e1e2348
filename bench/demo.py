"""The main job, on real input: timm models and a photograph, before and after their attention is replaced by ours.

python -m bench.demo [--models xcit_nano_12_p8_384,edgenext_small] [--image photo.jpg] [--pretrained] [--threads 2]

For each model: the outputs with and without the replacement and their distance to the model in float64, then the time
of every kind of attention layer in it, of the whole forward and of forward and backward. Exits with 1 if they disagree.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import xformer_kernels as xk
from bench import machine, measure, modules
from xformer_kernels import dispatch
from xformer_kernels.integrations import is_replaced, replace_attention

MODELS = ("xcit_nano_12_p8_384", "edgenext_small")


def photograph(path: Path | None) -> Image.Image:
    """The image given, or the portrait that comes with matplotlib (Grace Hopper; US Navy, public domain)."""
    if path is None:
        from matplotlib import get_data_path

        path = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")


def prepare(model: nn.Module, image: Image.Image) -> Tensor:
    """The image as the model was trained to see it."""
    from timm.data import create_transform, resolve_data_config

    x: Tensor = create_transform(**resolve_data_config({}, model=model))(image)
    return x.unsqueeze(0)


def attention_inputs(model: nn.Module, x: Tensor) -> list[tuple[str, Any, Tensor]]:
    """A replaced layer of each size, with its name, and what goes into it when the model sees x."""
    seen: dict[torch.Size, tuple[str, Any, Tensor]] = {}

    def look(name: str, module: nn.Module, tokens: Tensor) -> None:
        seen.setdefault(tokens.shape, (name, module, tokens.detach()))

    layers = [(name, m) for name, m in model.named_modules() if is_replaced(m) and hasattr(m, "temperature")]
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: look(name, module, inputs[0]))
        for name, module in layers
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return list(seen.values())


class Operator(nn.Module):
    """What lies between the projections of a layer: the definition if `backend` is "reference", else ours."""

    def __init__(self, temperature: Tensor, backend: str) -> None:
        super().__init__()
        self.temperature = nn.Parameter(temperature.detach())
        self.backend = backend

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return xk.xfa(q, k, v, self.temperature, backend=self.backend)


def speed(table: Table, what: str, before: nn.Module, after: nn.Module, x: Tensor) -> None:
    """Rows with the times of forward, and of forward and backward to all parameters and to x."""

    def forward(module: nn.Module) -> object:
        with torch.no_grad():
            return module(x)

    leaf = x.detach().requires_grad_()

    def both(module: nn.Module) -> object:
        y = module(leaf)
        return torch.autograd.grad(y, (leaf, *module.parameters()), torch.ones_like(y))

    for label, run in (("forward", forward), ("forward+backward", both)):
        times = measure.interleaved({"before": partial(run, before), "after": partial(run, after)}, 5.0)
        b, a = times["before"].median, times["after"].median
        table.add_row(f"{what} {label}", f"{b * 1e3:.2f}", f"{a * 1e3:.2f}", f"{b / a:.2f}x")


def agree(before: nn.Module, after: nn.Module, x: Tensor, console: Console) -> bool:
    """Outputs beside the float64 model's; and gradients of all parameters by the rule of the tests."""
    wide = copy.deepcopy(before).double()

    def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = model(leaf)
        dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(y)
        return [y.detach(), *torch.autograd.grad(y, (leaf, *model.parameters()), dy)]

    with dispatch.record() as ran:
        ours = gradients(after, x)
    theirs, exact = gradients(before, x), gradients(wide, x.double())
    scale = exact[0].abs().max()
    errors = [((y[0].double() - exact[0]).abs().max() / scale).item() for y in (theirs, ours)]
    console.print(
        f"served by: {', '.join(sorted({backend for backend, _ in ran}))};  "
        f"top class before {theirs[0].argmax().item()}, after {ours[0].argmax().item()};  "
        f"output error relative to float64: before {errors[0]:.1e}, after {errors[1]:.1e}"
    )
    names = ["output", "dx", *(name for name, _ in before.named_parameters())]
    try:
        modules.check_gradients(names, ours, theirs, exact)
    except AssertionError as error:
        console.print(f"THE MODELS DISAGREE: {error}", style="bold red")
        return False
    console.print(f"output and the gradients of all {len(names) - 1} inputs and parameters agree", style="green")
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="timm models, comma-separated")
    parser.add_argument("--image", type=Path, help="any photograph")
    parser.add_argument("--pretrained", action="store_true", help="download trained weights; otherwise random ones")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    image = photograph(options.image)
    facts = machine.facts("cpu")
    console.print(f"{facts['machine']}, {options.threads} threads, torch {torch.__version__}, image {image.size}")
    good = True
    for name in options.models.split(","):
        before = modules.create_model(name, options.pretrained)
        after = copy.deepcopy(before)
        count = replace_attention(after)
        x = prepare(before, image)
        weights = "trained" if options.pretrained else "random"
        console.rule(f"{name}, {weights} weights, {tuple(x.shape)}: {count} attention layers replaced")
        if count == 0:
            console.print("nothing to replace in this model", style="bold red")
            good = False
            continue
        good &= agree(before, after, x, console)
        table = Table("", "before, ms", "after, ms", "speed-up")
        for path, layer, tokens in attention_inputs(after, x):
            N, C = tokens.shape[1:]
            with torch.no_grad():
                qkv = layer.qkv(tokens).view(1, N, 3, layer.num_heads, C // layer.num_heads)
            definition, ours = (Operator(layer.temperature, backend) for backend in ("reference", "auto"))
            speed(table, f"operator (1,{layer.num_heads},{N},{C // layer.num_heads})", definition, ours, qkv)
            speed(table, f"layer {tuple(tokens.shape)}", before.get_submodule(path), layer, tokens)
        speed(table, "model", before, after, x)
        console.print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
