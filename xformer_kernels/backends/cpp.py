"""CPU kernels in C++ (csrc/cpu), called through the compiled module ``xformer_kernels._C`` by address and strides.

Each function has the signature of its op and returns freshly allocated tensors. The kernels read any strides in place
and accumulate in fp32 (fp64 for fp64). They widen bf16 and fp16 to fp32; on Zen 4, xfa multiplies bf16 by pairs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from xformer_kernels import _C
from xformer_kernels.backends import unsupported_numbers
from xformer_kernels.reference import accumulate_dtype

NAME = "cpp"

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MAPS = {"query_key": 0, "key_value": 1}
_NORMS = {"token": 0, "feature": 1}
_ACTIVATIONS = {"softmax": 0, "identity": 1}
_NO_STRIDES = (0, 0, 0, 0)
_CPU = torch.device("cpu")  # said each time: the default device may be another
# glibc maps tensors above 32 MiB afresh at every call, and smaller ones only until it has seen their size.
_LARGE = 32 << 20
# The products add their terms one after another: beyond this many, a blocked matrix product is more accurate.
_WIDEST = 512
_LEVEL = _C.cpu_level()


def unsupported(device_type: str, dtypes: Iterable[torch.dtype], head_dims: Iterable[int]) -> list[str]:
    """Every reason why these kernels cannot serve a call; empty when they can."""
    reasons = []
    if not _LEVEL:
        reasons.append(
            "no instruction level is usable here: XFORMER_KERNELS_CPU_LEVEL names none of the built levels "
            f"({_C.build_info()['levels']}) that this processor has"
        )
    if device_type != "cpu":
        reasons.append(f"tensors are on {device_type}, the kernels run on cpu")
    return reasons + unsupported_numbers(dtypes, head_dims, _WIDEST)


def _empty(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    result = torch.empty(size, dtype=dtype, device=_CPU)
    if result.nbytes >= _LARGE:
        _C.prefer_huge_pages(result.data_ptr(), result.nbytes)
    return result


def _token_major(B: int, H: int, N: int, D: int, like: Tensor) -> Tensor:
    return _empty((B, N, H, D), like.dtype).transpose(1, 2)


def _mask(token_mask: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if token_mask is None else (token_mask.data_ptr(), token_mask.stride(0), token_mask.stride(1))


def _optional(tensor: Tensor | None, strides: tuple[int, ...] | None = None) -> tuple[int, tuple[int, ...], int]:
    """Address, strides and dtype code of a tensor that may be absent."""
    if tensor is None:
        return 0, _NO_STRIDES, 0
    return tensor.data_ptr(), strides or tensor.stride(), _DTYPES[tensor.dtype]


def gram(a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, Da = a.shape
    Db = b.shape[-1]
    dtype = accumulate_dtype(a.dtype)
    G = _empty((B, H, Da, Db), dtype)
    ssq_a, ssq_b = _empty((B, H, Da), dtype), _empty((B, H, Db), dtype)
    _C.gram(
        (B, H, N, Da), Db, _DTYPES[a.dtype], a.data_ptr(), a.stride(), b.data_ptr(), b.stride(), symmetric,
        *_mask(token_mask), G.data_ptr(), ssq_a.data_ptr(), ssq_b.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return G, ssq_a, ssq_b


def channel_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    add_scale: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
) -> Tensor:
    B, H, N, I = x.shape  # noqa: E741
    O = weight.shape[-2]  # noqa: E741
    y = _token_major(B, H, N, O, x)

    def per_feature(t: Tensor | None) -> tuple[int, tuple[int, ...], int]:
        return _optional(t, None if t is None else (t.stride(0), t.stride(1), 0, t.stride(2)))

    _C.channel_mix(
        (B, H, N, I), 0 if x2 is None else x2.shape[-1], O, _DTYPES[x.dtype], x.data_ptr(), x.stride(),
        *_optional(weight), *per_feature(bias), *_optional(add)[:2], *per_feature(add_scale),
        *_optional(x2)[:2], *_optional(weight2), y.data_ptr(), y.stride(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def xfa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    token_mask: Tensor | None,
    map: str,
    norm: str,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    B, H, N, D = q.shape
    out = _token_major(B, H, N, D, q)
    stats = _empty((B, H, D * D + 2 * D), accumulate_dtype(q.dtype))
    _C.xfa_forward(
        (B, H, N, D), _DTYPES[q.dtype], _MAPS[map], _NORMS[norm], _ACTIVATIONS[activation], eps,
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        temperature.data_ptr(), temperature.stride(0), _DTYPES[temperature.dtype], *_mask(token_mask),
        stats.data_ptr(), torch.get_num_threads(), out.data_ptr(), out.stride(),
    )  # fmt: skip
    return out, stats


def xfa_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    stats: Tensor,
    token_mask: Tensor | None,
    map: str,
    norm: str,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    B, H, N, D = q.shape
    dqkv = _empty((3, B, N, H, D), q.dtype)
    dq, dk, dv = dqkv.transpose(2, 3).unbind(0)
    dtemperature = _empty((H,), temperature.dtype)
    _C.xfa_backward(
        (B, H, N, D), _DTYPES[q.dtype], _MAPS[map], _NORMS[norm], _ACTIVATIONS[activation], eps,
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        temperature.data_ptr(), temperature.stride(0), _DTYPES[temperature.dtype], *_mask(token_mask),
        stats.data_ptr(), torch.get_num_threads(), dout.data_ptr(), dout.stride(),
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), dq.stride(), dtemperature.data_ptr(),
    )  # fmt: skip
    return dqkv, dtemperature
