"""Times both forms of layers, and shows which one ``form="auto"`` chooses: ``python -m bench layer --shapes grid``.

Results are not checked, and no other providers are measured. A time is the minimum of the samples, since other work on
the machine only adds to it; with one thread, it is CPU time. The regret is the time of the chosen form over that of the
faster one, minus 1.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import xformer_kernels as xk
from bench import measure
from bench.modules import FORMS
from bench.terminal import Line, Terminal
from bench.workloads import LayerShape
from xformer_kernels.layer import timing

SECONDS = 3.0
"""Default measuring time per layer and direction."""


@dataclass(frozen=True)
class Row:
    workload: str
    direction: str
    gram_ms: float
    direct_ms: float
    spread: float
    """Interquartile range over the median; the larger one of the two forms."""
    auto: str
    regret: float


def rows_of(shape: LayerShape, dtype: torch.dtype, seconds: float, device: str) -> list[Row]:
    """Rows for the forward without gradients, and for forward with backward."""
    torch.manual_seed(0)
    layer = xk.XFA(shape.C, shape.heads, True).to(device, dtype)
    x = torch.randn(shape.B, shape.N, shape.C).to(device, dtype)
    dy = torch.randn(x.shape).to(x)
    leaf = x.detach().requires_grad_()

    def forward(form: str) -> Tensor:
        layer.form = form
        with torch.no_grad():
            result: Tensor = layer(x)
        return result

    def both(form: str) -> object:
        layer.form = form
        return torch.autograd.grad(layer(leaf), (leaf, *layer.parameters()), dy)

    rows = []
    for direction, call, given in (("forward", forward, x), ("forward+backward", both, leaf)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # above 512 features torch computes the Gram form
            call("auto")
            calls: dict[str, measure.Call] = {form: partial(call, form) for form in FORMS}
            times = measure.interleaved(calls, seconds, device, timing.clock())
            with torch.set_grad_enabled(given is leaf):
                auto = xk.explain_layer(given, *layer.weights()).form
        least = {form: min(taken.samples) for form, taken in times.items()}
        spread = max(taken.spread for taken in times.values())
        regret = least[auto] / min(least.values()) - 1
        rows.append(Row(str(shape), direction, 1e3 * least["gram"], 1e3 * least["direct"], spread, auto, regret))
    return rows


def run(shapes: tuple[LayerShape, ...], options: argparse.Namespace, terminal: Terminal) -> list[Row]:
    """Measures the shapes; prints the table and the worst and mean regret."""
    rows: list[Row] = []
    seconds = (options.seconds or SECONDS) / (10 if options.quick else 1)
    with terminal.progress(len(shapes)) as begin:
        for shape in shapes:
            begin(f"forms of layer {shape}")
            rows += rows_of(shape, getattr(torch, options.dtype), seconds, options.device)
    lines = [
        Line(
            (
                row.workload, row.direction, row.auto, f"{row.gram_ms:.3f}", f"{row.direct_ms:.3f}",
                f"{row.spread:.0%}", f"{row.regret:.1%}",
            ),
            row.direction == "forward",
            False,
        )
        for row in rows
    ]  # fmt: skip
    headings = ("workload", "direction", "auto", "gram ms", "direct ms", "spread", "regret")
    terminal.table(f"forms of layers, {options.dtype}", headings, 3, lines)
    worst = max(rows, key=lambda row: row.regret)
    mean = statistics.fmean(row.regret for row in rows)
    terminal.print(
        f"regret of auto: worst {worst.regret:.1%}, at {worst.workload} {worst.direction}; mean {mean:.2%}; median "
        f"spread {statistics.median(row.spread for row in rows):.0%}"
    )
    return rows
