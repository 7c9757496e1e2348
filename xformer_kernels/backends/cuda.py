"""GPU kernels of xfa in CUDA C++ (csrc/cuda), called through the compiled module that ``cuda_module.py`` finds.

They serve up to 64 features of float32, bfloat16 and float16, with ``norm="token"`` and ``norm="none"``, and masks.
Other calls, ``gram`` and ``channel_mix`` among them, are for other backends. Each function has the signature of
its op and returns newly allocated tensors. If the tokens of a head fit into the shared memory of a block, or of a
cluster of blocks (sm_90 and newer), forward and backward are one launch each, which reads every token once, in any
strides. Otherwise they are two passes, which read tokens as the operands of tensor cores; tokens that are not at
multiples of 16 bytes are copied before. Sums, norms and maps are in fp32, and the order of summation depends only on
the shapes and the device. Products of fp32 have the accuracy of fp32 (in two passes, each is three of tf32), also where
torch allows tf32.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from xformer_kernels.backends import arguments, cuda_first, cuda_module, unsupported_numbers
from xformer_kernels.backends.layouts import Results

NAME = "cuda"
NORMS = ("token", "none")
comes_first = cuda_first.comes_first
_cuda = cuda_module.load()
_BUILD = _cuda.build_info()
EMULATED: bool = _BUILD["emulated"]
"""Whether this is the test build, whose kernels run on the CPU."""
ONLY_BY_NAME = "these kernels are emulated: they serve calls that ask for cuda by name" if EMULATED else ""

PATHS = {"any": 0, "one launch": 1, "two passes": 2}
path = "any"
"""Which of :data:`PATHS` xfa takes, for tests and benchmarks; "one launch" raises if the tokens do not fit."""

_WIDEST = 64
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_ALIGNMENT = 16  # bytes
_DEVICE_TYPE = "cpu" if EMULATED else "cuda"


def unsupported(device_type: str, dtypes: Iterable[torch.dtype], head_dims: Iterable[int]) -> list[str]:
    """Every reason why these kernels cannot serve a call; empty when they can."""
    reasons = []
    dtypes = tuple(dtypes)
    if device_type != _DEVICE_TYPE:
        reasons.append(f"tensors are on {device_type}, the kernels run on {_DEVICE_TYPE}")
    elif not EMULATED:
        reasons += _of_device()
    if torch.float64 in dtypes:
        reasons.append("the kernels do not take float64")
    left_out = [str(dtype) for dtype in dtypes if _NAMES.get(dtype, "") not in ("", *_BUILD["dtypes"].split())]
    if left_out:
        reasons.append(f"the kernels were built without {', '.join(left_out)}")
    return reasons + unsupported_numbers(dtypes, head_dims, _WIDEST)


def _of_device() -> list[str]:
    if torch.version.hip is not None:
        return ["this torch is for AMD GPUs, the kernels are for NVIDIA's"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    release = re.search(r"nvcc (\d+)", _BUILD["compiler"])
    if release and driver() < int(release[1]):
        return [f"the driver is for CUDA {driver()}, the kernels were built with CUDA {release[1]}"]
    major, minor = torch.cuda.get_device_capability()
    if not runs_on(10 * major + minor):
        built = f"{_BUILD['archs']} and PTX of {_BUILD['ptx']}"
        return [f"the device is of compute capability {major}.{minor}, the kernels were built for sm_ {built}"]
    return []


@cache
def driver() -> int:
    """The major version of CUDA that the driver is for, where torch sees a device."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


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


def _workspace(device: torch.device, size: int) -> Tensor:
    return _empty(device, (size,), torch.uint8)


class _Rows(Results):
    """Allocates results whose tokens begin and end at multiples of 16 bytes."""

    def _token_major(self, size: tuple[Any, ...], *tokens: Tensor) -> Tensor:
        return super()._token_major((*size[:-1], _padded(size[-1], tokens[0])), *tokens)[..., : size[-1]]


def _padded(features: int, x: Tensor) -> int:
    numbers = _ALIGNMENT // x.element_size()
    return -(-features // numbers) * numbers


def _aligned(x: Any) -> Any:
    """A copy of (B, H, N, D) tokens which begin and end at multiples of 16 bytes; other arguments unchanged."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    B, H, N, D = x.shape
    memory = _empty(x.device, (B, N, H, _padded(D, x)), x.dtype)
    memory[..., D:] = 0
    copy = memory[..., :D].transpose(1, 2)
    copy.copy_(x)
    return copy


def _run(op: str, like: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Allocates results and workspace, and launches on the current stream of the tensors' device."""
    device = like.device
    empty = partial(_empty, device)
    B, H = like.shape[:2]
    index, chosen = device.index or 0, PATHS[path]

    def launch(results: Results, padded: bool, *call: Any) -> tuple[Tensor, Tensor] | None:
        """None if tokens have to be aligned. `padded`: whether :func:`_aligned` made the tokens."""
        addresses, result = getattr(arguments, op)(results, *call)
        if B * H == 0:
            return (result[0], result[1].zero_()) if op == "xfa_backward" else result
        stream = 0 if EMULATED else torch.cuda.current_stream().cuda_stream
        workspace = partial(_workspace, device)
        return result if getattr(_cuda, op)(*addresses, index, stream, workspace, chosen, padded) else None

    with nullcontext() if EMULATED or torch.cuda.current_device() == index else torch.cuda.device(index):
        result = launch(Results(empty, keeps_layout=False), False, like, *args)
        if result is None:
            result = launch(_Rows(empty, keeps_layout=False), True, *map(_aligned, (like, *args)))
            assert result is not None, "copied tokens are aligned"
            result = (result[0].contiguous(), result[1])
    return result


def xfa_forward(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _run("xfa_forward", q, *args)


def xfa_backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _run("xfa_backward", dout, *args)
