"""Argument checks of the public functions. Errors name the argument, the given value and what is accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, x: Any) -> None:
    """Checks for a dense tensor of a supported dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}: {_short(x)}")
    if x.dtype not in DTYPES:
        accepted = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} must have a floating point dtype, one of {accepted}, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor (layout torch.strided), got layout {x.layout}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested tensor; pad it and give a token_mask")


def like(name: str, x: Any, other_name: str, other: Tensor) -> None:
    """Checks for a tensor with the dtype and device of another."""
    tensor(name, x)
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    same_device(name, x, other_name, other)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def shape(name: str, x: Tensor, expected: Sequence[Any], meaning: str) -> None:
    if x.shape != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {_dims(expected)}, got {_dims(x.shape)}")


def choice(name: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}: {_short(value)}")


def integer(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer of {least} or more, got {type(value).__name__}: {_short(value)}")
    if value < least:
        raise ValueError(f"{name} must be an integer of {least} or more, got {value}")


def positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number above 0, got {type(value).__name__}: {_short(value)}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a finite number, got {type(value).__name__}: {_short(value)}")
    if not -float("inf") < value < float("inf"):  # dynamo cannot trace math.isfinite of a symbolic number
        raise ValueError(f"{name} must be a finite number, got {value}")


def not_negative(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of 0 or above, got {type(value).__name__}: {_short(value)}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of 0 or above, got {value}")


def probability(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {type(value).__name__}: {_short(value)}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def token_mask(mask: Any, x: Tensor, x_name: str) -> None:
    """Checks for a (B, N) bool mask of (B, ..., N, D) tokens."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"token_mask must be a torch.Tensor of bool, got {type(mask).__name__}: {_short(mask)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"token_mask must have dtype torch.bool (False: takes no part), got {mask.dtype}")
    shape("token_mask", mask, (x.shape[0], x.shape[-2]), "(B, N)")
    same_device("token_mask", mask, x_name, x)


def xfa(
    q: Any,
    k: Any,
    v: Any,
    temperature: Any,
    mask: Any,
    dropout_p: Any,
    map_fn: Callable[[Tensor], Tensor] | None,
) -> None:
    """Checks every argument of xfa except the backend and those of its Spec."""
    tensor("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must have 4 dimensions, (B, H, N, D), got {q.dim()}: {_dims(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        like(name, x, "q", q)
        if x.shape != q.shape:
            raise ValueError(
                f"{name} must have the shape of q, {_dims(q.shape)}, (4: B, H, N, D), got {_dims(x.shape)}"
            )
    tensor("temperature", temperature)
    H = q.shape[1]
    if temperature.numel() != 1 and temperature.shape != (H,) and temperature.shape != (H, 1, 1):
        raise ValueError(
            f"temperature must have shape (H,) = ({H},), (H, 1, 1) = ({H}, 1, 1) or one element, "
            f"got {_dims(temperature.shape)}"
        )
    same_device("temperature", temperature, "q", q)
    probability("dropout_p", dropout_p)
    if mask is not None:
        token_mask(mask, q, "q")
    if map_fn is not None and not callable(map_fn):
        raise TypeError(f"map_fn must be callable, (B, H, D, D) to (B, H, D, D), got {type(map_fn).__name__}")


def layer(
    x: Any,
    qkv_weight: Any,
    qkv_bias: Any,
    temperature: Any,
    proj_weight: Any,
    proj_bias: Any,
    ln_weight: Any,
    ln_bias: Any,
    layer_scale: Any,
) -> None:
    """Checks the tensors of a layer or half block."""
    tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must have 3 dimensions, (B, N, C), got {x.dim()}: {_dims(x.shape)}")
    C = x.shape[-1]
    tensor("temperature", temperature)
    same_device("temperature", temperature, "x", x)
    H = temperature.numel()
    if H == 0 or tuple(temperature.shape) not in ((H,), (H, 1, 1)):
        raise ValueError(f"temperature must have shape (H,) or (H, 1, 1) with H >= 1, got {_dims(temperature.shape)}")
    small("qkv_weight", qkv_weight, x)
    rows = qkv_weight.shape[0] if qkv_weight.dim() == 2 else 0
    if qkv_weight.dim() != 2 or qkv_weight.shape[1] != C or rows == 0 or rows % (3 * H):
        raise ValueError(
            f"qkv_weight must have shape (3 I, C) with C = {C} and I a multiple of the {H} heads that temperature has, "
            f"got {_dims(qkv_weight.shape)}"
        )
    small("proj_weight", proj_weight, x)
    if proj_weight.dim() != 2 or proj_weight.shape[1] != rows // 3:
        raise ValueError(f"proj_weight must have shape (O, I) with I = {rows // 3}, got {_dims(proj_weight.shape)}")
    for name, t, length, meaning in (
        ("qkv_bias", qkv_bias, rows, "(3 I,)"),
        ("proj_bias", proj_bias, proj_weight.shape[0], "(O,)"),
        ("ln_weight", ln_weight, C, "(C,)"),
        ("ln_bias", ln_bias, C, "(C,)"),
        ("layer_scale", layer_scale, proj_weight.shape[0], "(O,)"),
    ):
        if t is not None:
            small(name, t, x)
            shape(name, t, (length,), meaning)


def gram(a: Any, b: Any, symmetric: Any, mask: Any) -> None:
    """Checks every argument of gram except the backend."""
    _tokens("a", a)
    like("b", b, "a", a)
    if b.dim() != a.dim() or b.shape[:-1] != a.shape[:-1]:
        raise ValueError(
            f"b must agree with a, {_dims(a.shape)}, in every dimension but the last (features), got {_dims(b.shape)}"
        )
    boolean("symmetric", symmetric)
    if symmetric and b is not a:
        raise ValueError("symmetric=True needs b to be the same tensor as a, got another tensor for b")
    if mask is not None:
        token_mask(mask, a, "a")


def channel_mix(x: Any, weight: Any, bias: Any, add: Any, add_scale: Any, x2: Any, weight2: Any) -> None:
    """Checks every argument of channel_mix except the backend and the shapes of broadcast arguments."""
    _tokens("x", x)
    weight_of("weight", weight, "x", x)
    if (x2 is None) != (weight2 is None):
        raise ValueError(f"x2 and weight2 come together, got x2={_given(x2)} and weight2={_given(weight2)}")
    if add_scale is not None and add is None:
        raise ValueError("add_scale scales add, got add_scale without add")
    if x2 is not None:
        like("x2", x2, "x", x)
        if x2.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"x2 must agree with x, {_dims(x.shape)}, in every dimension but the last, got {_dims(x2.shape)}"
            )
        weight_of("weight2", weight2, "x2", x2)
    if add is not None:
        like("add", add, "x", x)
        shape("add", add, (*x.shape[:-1], weight.shape[-2]), "(B, H, N, O)" if x.dim() == 4 else "(B, N, O)")
    for name, y in (("bias", bias), ("add_scale", add_scale)):
        if y is not None:
            small(name, y, x)


def weight_of(name: str, weight: Any, x_name: str, x: Tensor) -> None:
    small(name, weight, x)
    if weight.dim() < 2 or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{name} must have shape (..., O, I) with I = {x.shape[-1]}, the features of {x_name}, "
            f"got {_dims(weight.shape)}"
        )


def small(name: str, t: Any, x: Tensor) -> None:
    """Checks for a weight, bias or scale with the dtype of x or its accumulate dtype."""
    tensor(name, t)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    if t.dtype not in (x.dtype, accumulate):
        accepted = " or ".join(str(dtype) for dtype in dict.fromkeys((x.dtype, accumulate)))
        raise TypeError(f"{name} must have dtype {accepted} for tokens of {x.dtype}, got {t.dtype}")
    same_device(name, t, "x", x)


def _tokens(name: str, x: Any) -> None:
    tensor(name, x)
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{name} must have 4 dimensions, (B, H, N, D), or 3, (B, N, D), got {x.dim()}: {_dims(x.shape)}"
        )


def _dims(dims: Sequence[Any]) -> str:
    return f"({', '.join(map(str, dims))}{',' if len(dims) == 1 else ''})"


def _given(x: Any) -> str:
    return "None" if x is None else "a tensor"


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 60 else text[:57] + "..."
