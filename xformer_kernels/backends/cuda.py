"""GPU kernels in CUDA C++ (csrc/cuda), called through the compiled module ``xformer_kernels._cuda``.

Each function has the signature of its op and returns newly allocated tensors. If the tokens of a head fit into the
shared memory of a block, or of a cluster of blocks (sm_90 and newer), forward and backward are one launch each, which
reads every token once; otherwise they are two passes. The kernels read any strides in place, accumulate in fp32 (fp64
for fp64), and sum in an order that depends only on the shapes and the device. In two passes, tokens of up to 64
features without a mask are read as the operands of tensor cores where their alignment allows it (fragment_pass.h); an
fp32 product is then three of tf32, with the accuracy of fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import _cuda
from xformer_kernels.backends import arguments, cuda_first, precision_of_products, tf32_allowed, unsupported_numbers
from xformer_kernels.backends.layouts import Results

NAME = "cuda"
NORMS = arguments.NORMS
comes_first = cuda_first.comes_first
_BUILD = _cuda.build_info()
EMULATED: bool = _BUILD["emulated"]
"""Whether this is the test build, whose kernels run on the CPU."""
ONLY_BY_NAME = "these kernels are emulated: they serve calls that ask for cuda by name" if EMULATED else ""

PATHS = {"any": 0, "one launch": 1, "two passes": 2}
path = "any"
"""Which of :data:`PATHS` xfa takes, for tests and benchmarks; "one launch" raises if the tokens do not fit."""

_WIDEST = 256
_NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
_DEVICE_TYPE = "cpu" if EMULATED else "cuda"


def unsupported(device_type: str, dtypes: Iterable[torch.dtype], head_dims: Iterable[int]) -> list[str]:
    """Every reason why these kernels cannot serve a call; empty when they can."""
    reasons = []
    dtypes = tuple(dtypes)
    if device_type != _DEVICE_TYPE:
        reasons.append(f"tensors are on {device_type}, the kernels run on {_DEVICE_TYPE}")
    elif not EMULATED:
        reasons += _of_device()
    left_out = [str(dtype) for dtype in dtypes if _NAMES.get(dtype, "") not in ("", *_BUILD["dtypes"].split())]
    if left_out:
        reasons.append(f"the kernels were built without {', '.join(left_out)}")
    return reasons + unsupported_numbers(dtypes, head_dims, _WIDEST)


def decisions(tokens: dict[str, Tensor]) -> list[str]:
    return precision_of_products(next(iter(tokens.values())).dtype, tf32_allowed())


def _of_device() -> list[str]:
    if torch.version.hip is not None:
        return ["this torch is for AMD GPUs, the kernels are for NVIDIA's"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    major, minor = torch.cuda.get_device_capability()
    if not runs_on(10 * major + minor):
        built = f"{_BUILD['archs']} and PTX of {_BUILD['ptx']}"
        return [f"the device is of compute capability {major}.{minor}, the kernels were built for sm_ {built}"]
    return []


def runs_on(capability: int) -> bool:
    """Whether this build has code for a device: binaries of its generation, or PTX of an earlier one."""
    for arch in _BUILD["archs"].split():
        own = int(arch.rstrip("af"))
        if own == capability or (arch.isdigit() and own // 10 == capability // 10 and own <= capability):
            return True
    ptx: str = _BUILD["ptx"]
    return ptx.isdigit() and int(ptx) <= capability


def _empty(device: torch.device, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


def _run(op: str, like: Tensor, *args: Any) -> Any:
    """Allocates results and workspace, and launches on the current stream of the tensors' device."""
    device = like.device
    addresses, result = getattr(arguments, op)(Results(partial(_empty, device), keeps_layout=False), like, *args)
    B, H = like.shape[:2]
    if B * H == 0:
        if op == "xfa_backward":
            result[1].zero_()
        return result
    # the diagonal of a symmetric Gram matrix holds squared norms
    tf32 = like.dtype == torch.float32 and tf32_allowed() and not (op == "gram" and args[1])
    index, chosen = device.index or 0, PATHS[path]
    with nullcontext() if EMULATED or torch.cuda.current_device() == index else torch.cuda.device(index):
        stream = 0 if EMULATED else torch.cuda.current_stream().cuda_stream
        getattr(_cuda, op)(*addresses, index, stream, lambda size: _empty(device, (size,), torch.uint8), tf32, chosen)
    return result


def gram(a: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _run("gram", a, *args)
    return result


def channel_mix(x: Tensor, *args: Any) -> Tensor:
    result: Tensor = _run("channel_mix", x, *args)
    return result


def xfa_forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _run("xfa_forward", q, *args)
    return result


def xfa_backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _run("xfa_backward", dout, *args)
    return result
