"""Modules whose attention is replaced, and the inference kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xformer_kernels as xk
from fuzz.draws import Draw
from xformer_kernels import inference
from xformer_kernels.integrations import replace_attention
from xformer_kernels.testing import assert_close


def model(d: Draw) -> None:
    """Families that replace_attention supports, and XFA in place of XCA, with a random mode for each part.

    All results are compared together: the worst error of any tensor may be twice the worst one of the original.
    """
    from test_integrations import MDTA
    from timm.models.edgenext import CrossCovarianceAttn, SplitTransposeBlock
    from timm.models.xcit import XCA, XCABlock

    heads = d.pick("heads", 1, 2, 4)
    C, bias = heads * d.pick("D", 2, 3, 8, 12), d.pick("bias", True, False)
    # few tokens are covered by `layer`, whose check knows the terms of subtractions in the gradients
    B, h, w = d.pick("B", 1, 2), d.pick("h", 5, 9, 16), d.pick("w", 7, 13, 20)
    made: dict[str, Callable[[], nn.Module]] = {
        "XCA": lambda: XCA(C, heads, bias),
        "CrossCovarianceAttn": lambda: CrossCovarianceAttn(C, heads, bias),
        "XCABlock": lambda: XCABlock(C, heads, qkv_bias=bias, eta=0.7, drop_path=0.2),
        "SplitTransposeBlock": lambda: SplitTransposeBlock(
            C, 2, heads, qkv_bias=bias, ls_init_value=0.7, drop_path=0.2
        ),
        "MDTA": lambda: MDTA(C, heads, bias),
        "XFA": lambda: XCA(C, heads, bias),
    }
    kind = d.pick("kind", *made)
    torch.manual_seed(d.seed)
    theirs = made[kind]()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=d.numbers, dtype=torch.float64) / max(p[0].numel(), 4) ** 0.5)
        for name, p in theirs.named_parameters():
            if name.endswith("temperature"):
                p.abs_().add_(0.5)
    theirs.train(d.pick("training", True, False))
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        elif d.maybe(0.2):
            module.training = not module.training
        if isinstance(module, nn.Dropout):
            module.p = 0.0 if module.training else 0.5
        if hasattr(module, "drop_prob") and module.training:
            module.drop_prob = 0.0
        if d.maybe(0.1):
            module.requires_grad_(False)
    form = d.pick("form", "auto", "gram", "direct")
    if kind == "XFA":
        ours: nn.Module = xk.XFA(C, heads, bias, form=form)
        ours.load_state_dict(theirs.state_dict())
        for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            a.requires_grad_(b.requires_grad)
    else:
        ours = copy.deepcopy(theirs)
        assert replace_attention(ours, form=form) == 1
    tokens = kind in ("XCA", "CrossCovarianceAttn", "XCABlock", "XFA")
    shape = (B, h * w, C) if tokens else (B, C, h, w)
    x = d.tensor("x", shape, torch.float32)
    if 0 in x.stride() or d.notes["x numbers"] == "equal tokens":  # as in `layer`
        x = torch.randn(shape, generator=d.numbers)
    more = (h, w) if kind == "XCABlock" else ()
    dy = d.gradient(tuple(x.shape), torch.float32)

    def results(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        leaf = x.detach().requires_grad_()
        named = {"x": leaf, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
        y = module(leaf, *more)
        grads = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
        return {"y": y.detach(), **{f"d{n}": g for n, g in zip(named, grads, strict=True) if g is not None}}

    oracle = results(copy.deepcopy(theirs).double(), x.double(), dy.double())
    got, eager = results(ours, x, dy), results(theirs, x, dy)
    assert got.keys() == oracle.keys()
    largest = max(t.abs().max().item() for t in oracle.values())

    def worst(found: dict[str, Tensor]) -> float:
        # relative to the largest gradient: the smaller ones result from cancellation of its terms
        return max((found[name].double() - t).abs().max().item() for name, t in oracle.items()) / largest

    error, allowed = worst(got), 2 * worst(eager) + 8 * torch.finfo(torch.float32).eps
    assert error <= allowed, f"error {error:.3e} of the largest gradient > {allowed:.3e} allowed"
    for name, t in oracle.items():  # tensors are not swapped
        size = max(t.abs().max().item(), 1e-3 * largest)
        assert (got[name].double() - t).abs().max() <= 1e-2 * size, name


# Inference kernels.


def _batch_norm(d: Draw, features: int) -> inference.BatchNorm | None:
    if not d.maybe():
        return None
    mean, weight, bias = (torch.randn(features, generator=d.numbers) for _ in range(3))
    affine = d.maybe(0.8)
    variance = torch.rand(features, generator=d.numbers) + 0.05
    return inference.BatchNorm(mean, variance, weight if affine else None, bias if affine else None, 1e-5)


def _norm_and_activation(y: Tensor, norm: Any, hard_swish: bool) -> Tensor:
    if norm is not None:
        y = F.batch_norm(y, norm.mean, norm.variance, norm.weight, norm.bias, eps=norm.eps)
    return F.hardswish(y) if hard_swish else y


def _judge_inference(ours: Any, eager: Callable[..., Tensor], terms: Tensor | None = None) -> None:
    with torch.no_grad():
        result = ours()
        if result is None:
            assert inference.KERNELS is None, "the kernels did not serve"
            return
        assert_close(result, eager(lambda t: t), eager(lambda t: t.double()), "y", terms)


def linear(d: Draw) -> None:
    N, I, O = d.size("N", (16, 97), 300) + 16, d.size("I", (24, 96, 512, 1024), 1024), d.size("O", (24, 64), 200)  # noqa: E741
    x = torch.randn(N, I, generator=d.numbers) + d.pick("mean", 0.0, 1.0)
    weight = torch.randn(O, I, generator=d.numbers) / I**0.5
    bias = torch.randn(O, generator=d.numbers) if d.maybe() else None
    add = torch.randn(N, O, generator=d.numbers) if d.maybe() else None
    norm, hard_swish = _batch_norm(d, O), d.pick("hard_swish", True, False)
    ln_weight, ln_bias = (torch.randn(I, generator=d.numbers) if d.maybe() else None for _ in range(2))
    before = inference.LayerNorm(ln_weight, ln_bias, 1e-6) if d.pick("layer norm", True, False) else None

    def eager(to: Any) -> Tensor:
        def part(t: Any) -> Any:
            return to(t) if isinstance(t, Tensor) else t

        u = to(x) if before is None else F.layer_norm(to(x), (I,), *map(part, before))
        bn = None if norm is None else inference.BatchNorm(*map(part, norm))
        y = _norm_and_activation(F.linear(u, to(weight), part(bias)), bn, hard_swish)
        return y if add is None else y + to(add)

    def ours() -> Any:
        return inference.linear(x, weight, bias, batch_norm=norm, layer_norm=before, hard_swish=hard_swish, add=add)

    # the accuracy of a sum of products, in any order, is bounded by the sum of absolute values
    u = (
        x.double()
        if before is None
        else F.layer_norm(x.double(), (I,), *(t.double() if isinstance(t, Tensor) else t for t in before))
    )
    terms = u.abs() @ weight.double().abs().T
    if norm is not None:
        scale = 1.0 if norm.weight is None else norm.weight.double()
        terms = terms * (scale / (norm.variance.double() + norm.eps).sqrt()).abs()
    _judge_inference(ours, eager, terms)


def depthwise(d: Draw) -> None:
    B, C, h, w = d.pick("B", 1, 2), d.size("C", (16, 33, 96), 130), d.size("h", (7, 16), 40), d.size("w", (7, 16), 40)
    side, stride = d.pick("side", 3, 5), d.pick("stride", 1, 2)
    x = torch.randn(B, C, h, w, generator=d.numbers).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(C, 1, side, side, generator=d.numbers)
    bias = torch.randn(C, generator=d.numbers) if d.maybe() else None
    norm, hard_swish = _batch_norm(d, C), d.pick("hard_swish", True, False)

    def eager(to: Any) -> Tensor:
        def part(t: Any) -> Any:
            return to(t) if isinstance(t, Tensor) else t

        bn = None if norm is None else inference.BatchNorm(*map(part, norm))
        return _norm_and_activation(
            F.conv2d(to(x), to(weight), part(bias), stride, side // 2, groups=C), bn, hard_swish
        )

    def ours() -> Any:
        return inference.depthwise(x, weight, bias, stride, batch_norm=norm, hard_swish=hard_swish)

    _judge_inference(ours, eager)
