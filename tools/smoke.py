"""Tests the installed package, not the source tree, in seconds: ``python tools/smoke.py [--expect VERSION] [--cuda]``.

:func:`xformer_kernels.xfa` and :func:`xformer_kernels.linear_attention`, forward and backward, are compared with the
reference in float64 by the rule of the tests (:mod:`xformer_kernels.testing`). The compiled module must compute them.

With ``--cuda``, xformer-kernels-cuda must be installed too: its module is imported, and must be of the same version and
for the architectures of ``XFORMER_KERNELS_CUDA_ARCHS``, or else for all of ``csrc/cuda``. Its kernels do not run.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tools")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import xformer  # noqa: E402
import xformer_kernels as xk  # noqa: E402
from xformer_kernels import dispatch, info, reference, testing  # noqa: E402

TERMS = {"xfa": testing.gradient_terms, "linear_attention": testing.linear_attention_terms}


def compare(function: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = dict(zip("qkv", torch.randn(3, 2, 4, 197, 24, dtype=dtype), strict=True))
    if function == "xfa":
        given["temperature"] = torch.rand(4, dtype=dtype) + 0.5
    dout = torch.randn_like(given["q"])

    def results(compute: Callable[..., Tensor], to: torch.dtype) -> dict[str, Tensor]:
        inputs = [x.to(to, copy=True).requires_grad_() for x in given.values()]
        out = compute(*inputs)
        gradients = torch.autograd.grad(out, inputs, dout.to(to))
        return {"out": out.detach(), **{f"d{name}": g for name, g in zip(given, gradients, strict=True)}}

    with dispatch.record() as ran:
        ours = results(getattr(xk, function), dtype)
    assert {backend for backend, _ in ran} == {"cpp"}, f"{function} was computed by {ran}, not by the compiled module"
    eager, oracle = (results(getattr(reference, function), to) for to in (dtype, torch.float64))
    terms = TERMS[function](*(x.double() for x in given.values()), dout.double())
    for name in ours:
        testing.assert_close(ours[name], eager[name], oracle[name], f"{name} of {function}", terms.get(name))


def check_cuda(module: dict[str, Any]) -> None:
    """`module`: what info says of the CUDA module."""
    assert module["loaded"], f"the CUDA module cannot be loaded: {module}"
    assert module["distribution"] == "xformer-kernels-cuda", f"the CUDA module is that of {module['distribution']}"
    cmake = (ROOT / "csrc" / "cuda" / "CMakeLists.txt").read_text()
    (every,) = re.findall(r'^set\(XK_CUDA_ARCHS "(.+?)"', cmake, re.M)
    archs = (os.environ.get("XFORMER_KERNELS_CUDA_ARCHS") or every).replace(";", " ")
    assert module["archs"] == archs, f"the CUDA module is built for {module['archs']}, not {archs}"
    print(f"CUDA module {module['version']}, {module['compiler']}: sm_ {archs}, PTX of {module['ptx']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--expect", metavar="VERSION", help="the version that must be installed")
    parser.add_argument("--cuda", action="store_true", help="xformer-kernels-cuda must be installed")
    options = parser.parse_args()
    location = Path(xk.__file__).resolve().parent
    assert not location.is_relative_to(ROOT), f"the package that was imported is that of the source tree, {location}"
    facts = info.collect()
    extension, version = facts["extension"], facts["versions"]["xformer_kernels"]
    assert options.expect in (None, version), f"version {version} is installed, not {options.expect}"
    assert extension["loaded"], f"the compiled module cannot be loaded: {extension}"
    assert extension["version"] == version, f"the compiled module is of version {extension['version']}, not {version}"
    if options.cuda:
        check_cuda(facts["cuda extension"])
    for function in TERMS:
        for dtype in (torch.float32, torch.bfloat16):
            compare(function, dtype)
    logits = xformer.xformer_xxs(num_classes=10).eval()(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 10) and logits.isfinite().all(), logits
    print(
        f"xformer-kernels {version}, {location}\n"
        f"built for {extension['levels']}; runs {extension['level in use']}; torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}: results agree with the reference"
    )


if __name__ == "__main__":
    main()
