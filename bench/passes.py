"""Compares the passes of layers in Gram form with torch's matrix products.

python -m bench.passes [--out bench/results]

The shapes are those of the main layers of :mod:`bench.workloads`. ``torch`` is the replacement for ``cpp``: one product
for x^T x (all of it) and for dy^T x, one with a bias for M x, two for M^T dy + R x.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import machine, measure, report
from bench.workloads import LAYER_SHAPES, LayerShape
from xformer_kernels.layer import passes


def calls(shape: LayerShape) -> dict[str, dict[str, measure.Call]]:
    """Calls by pass, then by provider."""
    numbers = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape.B, shape.N, shape.C, generator=numbers) for _ in range(2))
    M, R = (torch.randn(shape.B, shape.C, shape.C, generator=numbers) for _ in range(2))
    m = torch.randn(shape.B, shape.C, generator=numbers)
    kernels = passes.of("cpp", torch.float32, shape.C)
    gram, mix = kernels.gram, kernels.mix
    heads, dheads = passes.with_head(x, dy)
    none = (None, None, None)
    return {
        "x^T x": {
            "torch": lambda: x.mT @ x,
            "cpp": lambda: gram(heads, heads, True, *none)[0],
        },
        "dy^T x": {
            "torch": lambda: dy.mT @ x,
            "cpp": lambda: gram(dheads, heads, False, *none)[0],
        },
        "M x + m": {
            "torch": lambda: torch.baddbmm(m.unsqueeze(1), x, M.mT),
            "cpp": lambda: mix(*passes.with_head(x, M, m, *none), None, None, False),
        },
        "M^T dy + R x + m": {
            "torch": lambda: torch.baddbmm(m.unsqueeze(1), dy, M).baddbmm_(x, R),
            "cpp": lambda: mix(*passes.with_head(dy, M.mT, m, None, x, R.mT), None, None, True),
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.passes", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time per pass")
    parser.add_argument("--out", type=Path, help="also write JSON and CSV to OUT/<machine>/")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for shape in LAYER_SHAPES["main"]:
        for what, providers in calls(shape).items():
            ours, theirs = providers["cpp"](), providers["torch"]()
            assert isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
            scale = theirs.abs().max()
            assert (ours - theirs).abs().max() <= 1e-4 * scale, f"{what} at {shape}"
            times = measure.interleaved(providers, options.seconds)
            for name, timing in times.items():
                speedup = times["torch"].median / timing.median
                print(f"{shape!s:20} {what:18} {name:6} {timing.median * 1e3:8.3f} ms  {speedup:5.2f} x torch")
                rows.append(
                    report.Row(
                        workload=str(shape),
                        direction=what,
                        provider=name,
                        ms=timing.median * 1e3,
                        spread=timing.spread,
                        samples=len(timing.samples),
                        gb_per_s=None,
                        limit_ms=None,
                        fraction_of_limit=None,
                        speedup_over_eager=speedup,
                        speedup_over_compile=None,
                        speedup_over_graphs=None,
                        peak_extra_mb=None,
                    )
                )
    if options.out:
        stem = options.out / machine.slug("cpu") / "passes-cpu-float32"
        facts = {**machine.facts("cpu"), "device": "cpu", "dtype": "float32"}
        for path in report.save(stem, facts, rows):
            print(f"written: {path}")


if __name__ == "__main__":
    main()
