"""CPU kernels in C++ (csrc/cpu), called through the compiled module ``xformer_kernels._C`` by address and strides.

Each function has the signature of its op and returns newly allocated tensors. The kernels read any strides in place
and accumulate in fp32 (fp64 for fp64). They convert bf16 and fp16 to fp32; on Zen 4, xfa multiplies pairs of bf16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import _C
from xformer_kernels.backends import arguments, unsupported_numbers
from xformer_kernels.backends.layouts import Results
from xformer_kernels.backends.program import Program, Unrecordable
from xformer_kernels.layer.maps import MapGradients, Maps, Rule
from xformer_kernels.validate import DTYPES

NAME = "cpp"

_CPU = torch.device("cpu")  # always passed explicitly, as the default device may be another
_LIKE = {dtype: torch.empty(0, dtype=dtype, device=_CPU) for dtype in DTYPES}
# glibc calls mmap for every allocation above 32 MiB, but for smaller sizes only until such a block is first freed.
_LARGE = 32 << 20
# The products add their terms sequentially: for more terms than this, a blocked matrix product is more accurate.
_WIDEST = 512
_WIDEST_MAP = 128
LEVEL = _C.cpu_level()
NORMS = arguments.NORMS
FEATURE_MAPS = arguments.FEATURE_MAPS
KEEPS_LAYOUT = True


def unsupported(device_type: str, dtypes: Iterable[torch.dtype], head_dims: Iterable[int]) -> list[str]:
    """Every reason why these kernels cannot serve a call; empty when they can."""
    reasons = []
    if not LEVEL:
        reasons.append(
            "no instruction level is usable: XFORMER_KERNELS_CPU_LEVEL must name one of the built levels "
            f"({_C.build_info()['levels']}) that this processor supports"
        )
    if device_type != "cpu":
        reasons.append(f"tensors are on {device_type}, the kernels run on cpu")
    return reasons + unsupported_numbers(dtypes, head_dims, _WIDEST)


def _empty(size: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...] | None = None) -> Tensor:
    if order is None:
        result = _LIKE[dtype].new_empty(size)  # fewer arguments to convert than those of torch.empty
    else:
        result = torch.empty_permuted(size, order, dtype=dtype, device=_CPU)
    if result.nbytes >= _LARGE:
        _C.prefer_huge_pages(result.data_ptr(), result.nbytes)
    return result


_RESULTS = Results(_empty, keeps_layout=True)


def gram(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    addresses, result = arguments.gram(_RESULTS, *args)
    _C.gram(*addresses, torch.get_num_threads())
    return result


def channel_mix(*args: Any) -> Tensor:
    addresses, result = arguments.channel_mix(_RESULTS, *args)
    _C.channel_mix(*addresses, torch.get_num_threads())
    return result


def xfa_forward(*args: Any) -> tuple[Tensor, Tensor]:
    addresses, result = arguments.xfa_forward(_RESULTS, *args)
    _C.xfa_forward(*addresses, torch.get_num_threads())
    return result


def xfa_backward(*args: Any) -> tuple[Tensor, Tensor]:
    addresses, result = arguments.xfa_backward(_RESULTS, *args)
    _C.xfa_backward(*addresses, torch.get_num_threads())
    return result


def linear_attention_forward(*args: Any) -> tuple[Tensor, Tensor]:
    addresses, result = arguments.linear_attention_forward(_RESULTS, *args)
    _C.linear_attention_forward(*addresses, torch.get_num_threads())
    return result


def linear_attention_backward(*args: Any) -> tuple[Tensor, ...]:
    addresses, result = arguments.linear_attention_backward(_RESULTS, *args)
    _C.linear_attention_backward(*addresses, torch.get_num_threads())
    return result


def layer_gram(
    a: Tensor,
    b: Tensor,
    symmetric: bool,
    token_mask: Tensor | None,
    center: Tensor | None,
    layer_norm_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """gram of a and b, with b layer-normalised and centred as it is read; returns sums instead of sums of squares."""
    addresses, result = arguments.gram(_RESULTS, a, b, symmetric, token_mask)
    sums = (result[1].data_ptr(), result[2].data_ptr())
    _C.layer_gram(*addresses, *_prologue(center, layer_norm_eps), *sums, torch.get_num_threads())
    return result


def layer_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
    center: Tensor | None,
    layer_norm_eps: float | None,
    differentiate: bool,
) -> Tensor:
    """channel_mix with x2 (x if x2 is None) layer-normalised and centred as it is read, or the gradient of that."""
    addresses, result = arguments.channel_mix(_RESULTS, x, weight, bias, add, None, x2, weight2)
    _C.layer_mix(*addresses, *_prologue(center, layer_norm_eps), differentiate, torch.get_num_threads())
    return result


def takes_layer_maps(dtype: torch.dtype, head_dim: int) -> bool:
    """Not for wide heads: torch's products, which use all threads for a head, are faster."""
    return head_dim <= _WIDEST_MAP


def layer_maps(
    P: Tensor, qkv: Tensor, qkv_bias: Tensor, temperature: Tensor, s: Tensor, n: Tensor, c: Tensor,
    keep: Tensor | None, rule: Rule,
) -> Maps:  # fmt: skip
    """See :func:`xformer_kernels.layer.maps.layer_maps`."""
    (B, _, H, D, _), dtype = P.shape, qkv.dtype
    T, e = _empty((B, *qkv.shape[1:]), dtype), _empty((B, H, D), dtype)
    cos, norms = _empty((B, H, D, D), dtype), _empty((B, 2, H, D), dtype)
    read = (qkv, qkv_bias, temperature, s, n, c, keep, P, None, None)
    _maps(_C.layer_maps, B, rule, read, (T, e, cos, norms, *(None,) * 5))
    return Maps(T, e, cos, norms)


def layer_maps_backward(
    dT: Tensor, de: Tensor, qkv: Tensor, qkv_bias: Tensor, temperature: Tensor, cos: Tensor, norms: Tensor,
    s: Tensor, n: Tensor, c: Tensor, keep: Tensor | None, rule: Rule,
) -> MapGradients:  # fmt: skip
    """See :func:`xformer_kernels.layer.maps.layer_maps_backward`."""
    (B, H, D, C), rows = dT.shape, rule.rows
    X, x, T, e, dz, dshifted = (
        _empty(size, qkv.dtype)
        for size in ((B, rows, H, D, C), (B, rows, H, D), (B, H, D, C), (B, H, D), (B, H, D, C), (B, 3, H, D))
    )
    dtemperature = _empty((B, H), torch.float64)
    cos, norms = cos.contiguous(), norms.contiguous()  # these two are read
    read = (qkv, qkv_bias, temperature, s, n, c, keep, None, dT, de)
    _maps(_C.layer_maps_backward, B, rule, read, (T, e, cos, norms, X, x, dz, dshifted, dtemperature))
    return MapGradients(X, x, T, e, dz, dshifted, dtemperature)


def _maps(
    function: Any, B: int, rule: Rule, read: tuple[Tensor | None, ...], written: tuple[Tensor | None, ...]
) -> None:
    """Calls a function with the tensors of xk_layer_maps_args, in the order of its fields."""
    qkv: Any = read[0]
    dense = [None if t is None else t.to(qkv.dtype).contiguous() for t in read]
    choices = arguments.layer_maps(qkv.dtype, rule.map, rule.activation)
    function(
        (B, *qkv.shape[1:]), *choices, rule.normalised, rule.eps, [*map(_address, dense)], [*map(_address, written)],
        torch.get_num_threads(),
    )  # fmt: skip


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch_norm: tuple[Any, ...] | None,
    layer_norm: tuple[Any, ...] | None,
    hard_swish: bool,
    add: Tensor | None,
    packed: Tensor | None = None,
) -> Tensor:
    """See :func:`xformer_kernels.inference.linear`, which checks that all tensors are contiguous and float32.

    packed: the result of :func:`pack_linear`; batch norm is not supported with it.
    """
    O, I = weight.shape  # noqa: E741
    y = _empty((*x.shape[:-1], O), x.dtype)
    ln_weight, ln_bias, ln_eps = (None, None, None) if layer_norm is None else layer_norm
    _C.linear(
        x.numel() // I, I, O, x.data_ptr(), _address(ln_weight), _address(ln_bias), ln_eps, weight.data_ptr(),
        _address(packed), _address(bias), _batch_norm(batch_norm), hard_swish, _address(add), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def pack_linear(weight: Tensor) -> Tensor:
    """Packs a contiguous float32 weight (O, I) for :func:`linear`, for this process's instruction level."""
    O, I = weight.shape  # noqa: E741
    packed = torch.empty(I * -(-O // 16) * 16, dtype=weight.dtype, device=_CPU)
    _C.pack_linear(I, O, weight.data_ptr(), packed.data_ptr())
    return packed


def record(shape: tuple[int, ...], function: Any) -> Program | None:
    """The program of a function of a contiguous float32 tensor.

    None if it calls anything other than kernels, or if its workspace is so large that every call would map new memory.
    """
    try:
        program = Program(_C.Program(), shape, function)
    except Unrecordable:
        return None
    return program if program.workspace * 4 < _LARGE else None


def run(program: Program, x: Tensor) -> Tensor:
    y, workspace = _empty(program.shape, x.dtype), _empty((program.workspace,), x.dtype)
    blocks = [x.data_ptr(), y.data_ptr(), workspace.data_ptr()]
    program.calls.run(blocks, torch.get_num_threads())
    return y


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    batch_norm: tuple[Any, ...] | None,
    hard_swish: bool,
) -> Tensor:
    """See :func:`xformer_kernels.inference.depthwise`; x and the result are (B, H, W, C), contiguous."""
    B, H, W, C = x.shape
    y = _empty((B, -(-H // stride), -(-W // stride), C), x.dtype)
    _C.depthwise(
        B, H, W, C, weight.shape[-1], stride, x.data_ptr(), weight.data_ptr(), _address(bias), _batch_norm(batch_norm),
        hard_swish, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _batch_norm(norm: tuple[Any, ...] | None) -> tuple[int, int, int, int, float]:
    if norm is None:
        return 0, 0, 0, 0, 0.0
    mean, variance, weight, bias, eps = norm
    return mean.data_ptr(), variance.data_ptr(), _address(weight), _address(bias), eps


def _prologue(center: Tensor | None, layer_norm_eps: float | None) -> tuple[int, float | None]:
    return (0 if center is None else center.data_ptr()), layer_norm_eps
