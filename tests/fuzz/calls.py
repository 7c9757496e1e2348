"""The calls, and the check of their outputs and gradients by :mod:`xformer_kernels.testing`.

The check compares two errors that are both random. A call that exceeds the tolerance is repeated 4 times with other
values of the same sizes and strides, and fails if at least 3 of these exceed it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import LOW_PRECISION, Problem
from layer_cases import NAMES, Layer
from torch import Tensor

import xformer_kernels as xk
from fuzz.draws import Draw
from fuzz.modules import depthwise, linear, model
from xformer_kernels import reference
from xformer_kernels.testing import assert_close, linear_attention_terms

Tensors = dict[str, Any]


def gradients(
    function: Callable[[Tensors], Tensor | tuple[Tensor, ...]], tensors: Tensors, wanted: list[str], dy: Any
) -> Tensors:
    """Outputs and requested gradients, by name."""
    leaves = {
        name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in tensors.items()
    }  # fmt: skip
    outputs = function(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, dy, strict=True) if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], [leaves[name] for name in wanted], [g for _, g in pairs], allow_unused=True
    )
    named = {f"d{name}": g for name, g in zip(wanted, grads, strict=True) if g is not None}
    return {**{f"y{i}": y.detach() for i, y in enumerate(outputs)}, **named}


def widened(tensors: Tensors) -> Tensors:
    return {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in tensors.items()
    }  # fmt: skip


def judge(
    d: Draw,
    ours: Any,
    eager: Any,
    tensors: Tensors,
    outputs: list[tuple[tuple[int, ...], torch.dtype]],
    terms: Callable[[list[Tensor]], Tensors],
    cancels: bool = False,
) -> None:
    """Compares `ours` with `eager`, the same function in PyTorch.

    Args:
        outputs: shapes and dtypes of the results.
        terms: the terms of subtractions in the gradients, by name.
        cancels: whether the results are only rounding errors; they must then be finite where eager's are.
    """
    short = any(dtype in LOW_PRECISION for _, dtype in outputs)
    wanted = d.wanted(tensors)
    dy = [d.gradient(shape, dtype) for shape, dtype in outputs]
    got = gradients(ours, tensors, wanted, dy)
    theirs = gradients(eager, tensors, wanted, dy)
    oracle = gradients(eager, widened(tensors), wanted, [g.double() for g in dy])
    assert got.keys() == oracle.keys(), f"{sorted(got)} instead of {sorted(oracle)}"
    larger = terms(dy)
    for name, exact in oracle.items():
        assert got[name].dtype == theirs[name].dtype, f"{name} is {got[name].dtype}, eager's {theirs[name].dtype}"
        finite = theirs[name].isfinite().all()
        if short and not finite:  # 16-bit dtypes overflow in PyTorch too
            continue
        if cancels:
            assert not finite or got[name].isfinite().all(), f"{name} is not finite"
            continue
        assert_close(got[name], theirs[name], exact, name, larger.get(name))


def sums_of_sizes(eager: Any, tensors: Tensors) -> Callable[[list[Tensor]], Tensors]:
    """For functions that are sums of products, as are their gradients: the same sums of absolute values.

    They bound the accuracy of a sum in any order of its terms.
    """
    sizes = {name: None if t is None else t.double().abs() for name, t in tensors.items()}
    names = [name for name, t in sizes.items() if t is not None]
    return lambda dy: gradients(eager, sizes, names, [g.double().abs() for g in dy])


# ------------------------------------------------------------------------------------------------------------ operators


def xfa(d: Draw) -> None:
    B, N, H, D = d.batch(), d.tokens(), d.pick("H", 1, 2, 3, 8), d.size("D", (8, 24, 32, 33, 48, 64), 130)
    dtype, config = d.dtype(), d.config()
    tensors = {name: d.tensor(name, (B, H, N, D), dtype) for name in "qkv"}
    tensors["temperature"] = d.temperature(H, dtype, [(H,), (H, 1, 1), (1,), (1, 1, 1), ()])
    mask = d.mask(B, N)

    def call(function: Any) -> Any:
        return lambda t: function(*t.values(), token_mask=mask, **config.kwargs())

    def terms(dy: list[Tensor]) -> Tensors:
        temperature = tensors["temperature"].reshape(-1).expand(H)
        larger = Problem(*(tensors[name] for name in "qkv"), temperature, dy[0], config, mask).terms()
        whole = larger["dtemperature"] if tensors["temperature"].numel() == H else larger["dtemperature"].norm()
        return {**larger, "dtemperature": whole}

    judge(d, call(xk.xfa), call(reference.xfa), tensors, [((B, H, N, D), dtype)], terms)


def linear_attention(d: Draw) -> None:
    B, N, M, H = d.batch(), d.tokens(), d.pick("M", 0, 1, 2, 31, 196, 1024), d.pick("H", 1, 2, 3, 8)
    D, Dv, dtype = d.size("D", (8, 16, 32, 33), 130), d.size("Dv", (8, 16, 32, 33), 130), d.dtype()
    # positive values, if denominators near zero would reduce the outputs to rounding errors
    of_q = d.pick("feature map of q", "relu", "elu1", "softmax_features")
    of_k = d.pick("feature map of k", "relu", "elu1", "softmax_features", "softmax_tokens")
    choices = {
        "feature_map": (of_q, of_k), "normalize": d.pick("normalize", True, True, False),
        "scale": d.pick("scale", 1.0, 1.0, 0.25), "eps": d.pick("eps", 1e-6, 1e-5, 1e-3, 0.5),
        "query_mask": d.mask(B, N), "token_mask": d.mask(B, M),
    }  # fmt: skip
    tensors = {
        name: d.tensor(name, (B, H, *size), dtype) for name, size in (("q", (N, D)), ("k", (M, D)), ("v", (M, Dv)))
    }

    def call(function: Any) -> Any:
        return lambda t: function(*t.values(), **choices)

    def terms(dy: list[Tensor]) -> Tensors:
        return linear_attention_terms(*(x.double() for x in (*tensors.values(), dy[0])), **choices)

    judge(d, call(xk.linear_attention), call(reference.linear_attention), tensors, [((B, H, N, Dv), dtype)], terms)


def gram(d: Draw) -> None:
    B, N, dtype = d.batch(), d.tokens(), d.dtype()
    lead = (B,) if d.pick("single", True, False) else (B, d.pick("H", 1, 2, 3))
    a = d.tensor("a", (*lead, N, d.size("Da", (24, 32, 33, 64), 130)), dtype)
    symmetric = d.pick("symmetric", True, False)
    b = None if symmetric else d.tensor("b", (*lead, N, d.size("Db", (24, 32, 33, 64), 130)), dtype)
    mask = d.mask(B, N)
    sums = reference.accumulate_dtype(dtype)

    def ours(t: Tensors) -> Any:
        return xk.gram(t["a"], t["a"] if symmetric else t["b"], symmetric=symmetric, token_mask=mask)

    def eager(t: Tensors) -> Any:
        a4, b4 = (x if x.dim() == 4 else x.unsqueeze(1) for x in (t["a"], t["a"] if symmetric else t["b"]))
        result = reference.gram(a4, b4, symmetric=symmetric, token_mask=mask)
        return result if len(lead) == 2 else tuple(x.squeeze(1) for x in result)

    Da, Db = a.shape[-1], a.shape[-1] if b is None else b.shape[-1]
    outputs = [((*lead, Da, Db), sums), ((*lead, Da), sums), ((*lead, Db), sums)]
    tensors = {"a": a, "b": b}
    judge(d, ours, eager, tensors, outputs, sums_of_sizes(eager, tensors))


def channel_mix(d: Draw) -> None:
    B, N, dtype = d.batch(), d.tokens(), d.dtype()
    lead = (B,) if d.pick("single", True, False) else (B, d.pick("H", 1, 2, 3))
    I, I2, O = (d.size(name, (24, 32, 33, 64), 130) for name in ("I", "I2", "O"))  # noqa: E741
    small = d.pick("weight dtype", dtype, reference.accumulate_dtype(dtype))

    def weight(name: str, *shape: int) -> Tensor:
        return d.tensor(name, (*d.pick(f"{name} lead", (), (), lead), *shape), small)

    t: Tensors = {"x": d.tensor("x", (*lead, N, I), dtype), "weight": weight("weight", O, I)}
    t["bias"] = weight("bias", O) if d.maybe() else None
    t["add"] = d.tensor("add", (*lead, N, O), dtype) if d.maybe() else None
    t["add_scale"] = weight("add_scale", O) if t["add"] is not None and d.maybe() else None
    both = d.maybe()
    t["x2"], t["weight2"] = (d.tensor("x2", (*lead, N, I2), dtype), weight("weight2", O, I2)) if both else (None, None)

    def eager(t: Tensors) -> Tensor:
        wide = (*lead, 1) if len(lead) == 1 else lead

        def tokens(x: Any) -> Any:
            return None if x is None else x if x.dim() == 4 else x.unsqueeze(1)

        def small(x: Any, dims: int) -> Any:
            if x is None:
                return None
            x = x.unsqueeze(1) if len(lead) == 1 and x.dim() == dims + 1 else x
            return x.to(reference.accumulate_dtype(x.dtype)).expand(*wide, *x.shape[x.dim() - dims :])

        y = reference.channel_mix(
            tokens(t["x"]), small(t["weight"], 2), bias=small(t["bias"], 1), add=tokens(t["add"]),
            add_scale=small(t["add_scale"], 1), x2=tokens(t["x2"]), weight2=small(t["weight2"], 2),
        )  # fmt: skip
        return y if len(lead) == 2 else y.squeeze(1)

    judge(d, lambda t: xk.channel_mix(**t), eager, t, [((*lead, N, O), dtype)], sums_of_sizes(eager, t))


# --------------------------------------------------------------------------------------------------------------- layers


def layer(d: Draw) -> None:
    """xfa_layer and xfa_block in both forms, with numbers of output and inner features other than that of x."""
    B, N, H = d.batch(), d.tokens(), d.pick("H", 1, 2, 3, 4)
    D, dtype, config, block = d.size("D", (8, 24, 32), 40), d.dtype(), d.config(), d.pick("block", True, False)
    # layer norm of few or of equal features gives zeros or rounding errors: tests/test_layer.py covers these
    C = max(d.size("C", (24, 48, 64), 130), 8 if block else 1)
    O = C if block else d.pick("O", C, C, 7, 33)  # noqa: E741
    form = d.pick("form", "gram", "direct", "auto")
    if form == "gram" and config.norm == "feature":
        form = "direct"
    small = d.pick("weight dtype", dtype, dtype, reference.accumulate_dtype(dtype))
    gain = 1 / C**0.5

    def weight(name: str, *shape: int, by: float = 1.0) -> Tensor:
        return d.tensor(name, shape, small, by * torch.randn(shape, generator=d.numbers, dtype=torch.float64))

    # not with equal features, or weights equal along the features: the projection of the layer norm's result is then
    # zero; see the limits of the Gram form in the docstring of xfa_layer
    x, qkv_weight = d.tensor("x", (B, N, C), dtype), weight("qkv_weight", 3 * H * D, C, by=gain)
    if x.stride(-1) == 0:
        x = d.values("x", (B, N, C)).to(dtype)
    if 0 in qkv_weight.stride():
        qkv_weight = (gain * torch.randn(3 * H * D, C, generator=d.numbers)).to(small)
    tensors = {
        "x": x,
        "qkv_weight": qkv_weight,
        "qkv_bias": weight("qkv_bias", 3 * H * D) if d.maybe() else None,
        "temperature": d.temperature(H, small, [(H,), (H, 1, 1)]),
        "proj_weight": weight("proj_weight", O, H * D, by=(H * D) ** -0.5),
        "proj_bias": weight("proj_bias", O) if d.maybe() else None,
        "ln_weight": weight("ln_weight", C) if block and d.maybe(0.7) else None,
        "ln_bias": weight("ln_bias", C) if block and d.maybe(0.7) else None,
        "layer_scale": weight("layer_scale", C) if block and d.maybe(0.7) else None,
    }
    ln_eps = d.pick("ln_eps", 1e-6, 1e-5, 1e-2) if block else None
    mask = d.mask(B, N)

    def of(t: Tensors) -> Layer:
        return Layer(tuple(t[name] for name in NAMES), torch.empty(0), config, mask, ln_eps)

    def ours(t: Tensors) -> Tensor:
        return of(t).call([t[name] for name in NAMES], form=form)

    def eager(t: Tensors) -> Tensor:
        # weights cast to the dtype that torch's layers would need
        cast = {name: x if x is None or name == "temperature" else x.to(t["x"].dtype) for name, x in t.items()}
        return of(cast).by_reference([cast[name] for name in NAMES])

    def terms(dy: list[Tensor]) -> Tensors:
        case = of(tensors)
        case.dy = dy[0]
        return case.terms()

    # Normalised features of equal tokens do not depend on the tokens, and those of 1 to 3 tokens have few values, which
    # often cancel exactly. Only rounding errors are left, for which those of eager, possibly zero, are no measure.
    cancels = N <= 3 or d.notes["x numbers"] == "equal tokens" or d.notes["x layout"] == "expanded"
    judge(d, ours, eager, tensors, [((B, N, O), dtype)], terms, cancels)


CALLS: dict[str, Callable[[Draw], None]] = {
    "xfa": xfa,
    "linear_attention": linear_attention,
    "gram": gram,
    "channel_mix": channel_mix,
    "layer": layer,
    "model": model,
    "linear": linear,
    "depthwise": depthwise,
}
"""The calls by the name of a kind of public functions."""


def attempt(name: str, seed: int) -> tuple[str, bool]:
    """The failure of one call, empty if it passes, and whether the tolerance was exceeded at least once."""
    draw = Draw(seed)
    try:
        CALLS[name](draw)
        return "", False
    except AssertionError as miss:
        first = miss
    except Exception as error:
        return f"{type(error).__name__}: {error}\n    {draw}", True
    others = [_misses(name, seed, numbers) for numbers in range(1, 5)]
    return (f"{first}, and with other numbers {sum(others)} of 4\n    {draw}" if sum(others) >= 3 else ""), True


def _misses(name: str, seed: int, numbers: int) -> bool:
    try:
        CALLS[name](Draw(seed, numbers))
    except AssertionError:
        return True
    return False
