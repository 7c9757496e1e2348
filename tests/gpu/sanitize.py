"""Every kernel once at small, odd sizes, for ``make gpu-sanitize`` to watch: python tests/gpu/sanitize.py

A script, since a tool that watches every access would otherwise watch a test runner too. What is compared with is
computed on the CPU for the same reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import CONFIGS, Config, make_problem, randn

import xformer_kernels as xk
from xformer_kernels import dispatch, reference
from xformer_kernels.testing import assert_close

# One launch; two launches over three parts. WIDE: a map of more than one tile, and norms of tokens over tiles; not for
# cuda.
SHAPES = ((2, 77, 3, 37), (1, 601, 1, 37))
WIDE = (1, 300, 1, 131)
DTYPES = (torch.float32, torch.bfloat16)


def check_xfa(
    shape: tuple[int, int, int, int], config: Config, dtype: torch.dtype, masked: bool, device: str, backend: str
) -> None:
    here, there = (make_problem(shape, config, dtype=dtype, masked=masked, device=x) for x in ("cpu", device))
    result = there.run(xk.xfa, backend=backend)
    here.check({name: x.cpu() for name, x in result.items()})


def check_gram(dtype: torch.dtype, symmetric: bool, masked: bool, device: str, backend: str) -> None:
    a, b = (randn(2, 2, 333, d, seed=d, dtype=dtype) for d in (19, 35))
    b = a if symmetric else b
    mask = torch.arange(2 * 333).view(2, 333) % 3 > 0 if masked else None
    on_device = a.to(device)
    results = xk.gram(
        on_device,
        on_device if symmetric else b.to(device),
        symmetric=symmetric,
        token_mask=None if mask is None else mask.to(device),
        backend=backend,
    )
    eager = reference.gram(a, b, symmetric=symmetric, token_mask=mask)
    wide = a.double()
    exact = reference.gram(wide, wide if symmetric else b.double(), symmetric=symmetric, token_mask=mask)
    for name, x, y, z in zip(("G", "ssq_a", "ssq_b"), results, eager, exact, strict=True):
        assert_close(x.cpu(), y, z, name)


def check_channel_mix(dtype: torch.dtype, everything: bool, device: str, backend: str) -> None:
    x, add, x2 = (randn(2, 2, 77, d, seed=d, dtype=dtype) for d in (19, 35, 23))
    weight, weight2, bias, scale = (
        randn(2, 2, *size, seed=i) for i, size in enumerate(((35, 19), (35, 23), (35,), (35,)))
    )
    options = dict(bias=bias, add=add, add_scale=scale, x2=x2, weight2=weight2) if everything else {}

    def run(function, to):
        return function(to(x), to(weight), **{name: to(t) for name, t in options.items()})

    y = run(lambda *args, **named: xk.channel_mix(*args, **named, backend=backend), lambda t: t.to(device))
    exact = run(reference.channel_mix, lambda t: t.double())
    assert_close(y.cpu(), run(reference.channel_mix, lambda t: t), exact, "y")


def paths(backend: str) -> Iterator[None]:
    """Once, but for cuda, whose xfa is one launch where tokens fit, once more in two passes."""
    yield
    if backend == "cuda":
        from xformer_kernels.backends import cuda

        cuda.path = "two passes"
        yield
        cuda.path = "any"


def main(device: str, backend: str) -> None:
    count = 0
    all_ops = dispatch.has(backend, "gram")
    configs = CONFIGS if all_ops else [config for config in CONFIGS if config.norm == "token"]
    with dispatch.record() as ran:
        for dtype in DTYPES:
            for shape in SHAPES:
                for config in configs:
                    for _ in paths(backend):
                        check_xfa(shape, config, dtype, True, device, backend)
                        count += 1
            check_xfa(SHAPES[0], CONFIGS[0], dtype, False, device, backend)
            count += 1
            if not all_ops:
                continue
            for config in CONFIGS[:2] + CONFIGS[-1:]:
                check_xfa(WIDE, config, dtype, False, device, backend)
            for flag in (False, True):
                check_gram(dtype, False, flag, device, backend)
                check_gram(dtype, True, flag, device, backend)
                check_channel_mix(dtype, flag, device, backend)
            count += 9
    assert {name for name, _ in ran} == {backend}, f"others ran than {backend}: {set(ran)}"
    print(f"{count} calls, those of xfa with their gradients, agree with the reference: {backend} on {device}")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("tests/gpu/sanitize.py needs a CUDA device, torch sees none")
    for name in sys.argv[1:] or ["triton", "cuda"]:
        main("cuda", name)
