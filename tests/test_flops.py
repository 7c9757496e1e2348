"""FLOP counts of the ops, compared with the products of the reference."""

from __future__ import annotations

import pytest
import torch
from cases import randn
from torch.utils.flop_counter import FlopCounterMode

import xformer_kernels as xk
from xformer_kernels.layer import ops as layer_ops
from xformer_kernels.spec import Spec

B, H, N, D = 2, 3, 40, 8
C = H * D


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def layer(map="query_key", dim=C, requires_grad=True):
    module = xk.XFA(dim, H, qkv_bias=True, map=map)
    return module.requires_grad_(requires_grad)


@pytest.mark.parametrize("map", ["query_key", "key_value"])
def test_xfa_is_two_products_forward_and_four_backward(map):
    q, k, v = (randn(B, H, N, D, seed=i).requires_grad_() for i in range(3))
    temperature = torch.ones(H)

    def run(backend):
        return xk.xfa(q, k, v, temperature, map=map, backend=backend)

    forward = flops(lambda: run("auto"))
    assert forward == 2 * 2 * B * H * N * D * D == flops(lambda: run("reference"))
    both = flops(lambda: run("auto").sum().backward())
    assert both == 3 * forward == flops(lambda: run("reference").sum().backward())


def test_primitives():
    a, b = randn(B, H, N, D, seed=1), randn(B, H, N, 5, seed=2)
    weight, weight2 = randn(B, H, 7, D, seed=3), randn(B, H, 7, 5, seed=4)
    assert flops(lambda: xk.gram(a, b)) == 2 * B * H * N * D * 5
    assert flops(lambda: xk.gram(a, a, symmetric=True)) == B * H * N * D * (D + 1)
    assert flops(lambda: xk.channel_mix(a, weight)) == 2 * B * H * N * 7 * D
    assert flops(lambda: xk.channel_mix(a, weight, x2=b, weight2=weight2)) == 2 * B * H * N * 7 * (D + 5)


@pytest.mark.parametrize("map", ["query_key", "key_value"])
def test_layer_counts_passes_and_algebra(map):
    """The formulas, compared with the same steps in eager PyTorch, which computes both halves of symmetric products."""
    module = layer(map)
    x, dy = randn(B, N, C, seed=1), randn(B, N, C, seed=2)
    args = layer_ops.Operands(x, *module.weights())
    args = args._replace(temperature=args.temperature.reshape(-1))
    choices = layer_ops.Choices(None, None, Spec(map), None, False, "")
    as_in_schemas = (*choices._replace(spec=choices.spec.text()), "reference")

    def total(function):
        """Products with vectors (means and biases) are linear in C, and not part of the formulas."""
        with FlopCounterMode(display=False) as counter:
            result = function()
        return counter.get_total_flops(), result

    with torch.no_grad():
        eager, (_, *saved) = total(lambda: layer_ops._forward("reference", *args, *choices))
        eager_backward, _ = total(lambda: layer_ops._backward("reference", dy, *args, *saved, *choices))
        ours = 2 * xk.flops.MACS["layer_forward"](*shapes(args), *as_in_schemas)
        ours_backward = 2 * xk.flops.MACS["layer_backward"](*shapes((dy, *args)), *shapes(saved), *as_in_schemas)
    vectors = 2 * B * C * C
    assert 0 <= eager - ours - B * N * C * (C - 1) <= 8 * vectors
    assert 0 <= eager_backward - ours_backward <= 20 * vectors


def shapes(args):
    return [None if t is None else t.shape for t in args]


@pytest.mark.parametrize("map", ["query_key", "key_value"])
def test_layer_in_both_forms_by_torch(map, ran_auto):
    module, x = layer(map), randn(B, N, C, seed=1)
    module.form = "gram"
    with ran_auto("layer_forward", "layer_backward"):
        both = flops(lambda: module(x.requires_grad_()).sum().backward())
    per_image = C * C * ((2 if map == "query_key" else 3) * C + 2 * D + C)
    forward = flops(lambda: module(x))
    assert forward == 2 * B * (N * (C * (C + 1) // 2 + C * C) + per_image)
    backward = C * C * ((4 if map == "query_key" else 6) * C + 5 * D + 2 * C)
    assert both - forward == 2 * B * (N * 3 * C * C + backward)
    module.form = "direct"
    assert flops(lambda: module(x)) == 2 * B * N * (4 * C * C + 2 * C * D)


def test_counting_changes_nothing():
    module, x = layer(requires_grad=False), randn(B, N, C, seed=1)
    for form in ("gram", "direct"):
        module.form = form
        plain = module(x)
        with FlopCounterMode(display=False):
            torch.testing.assert_close(module(x), plain, rtol=0, atol=0)


def test_fvcore_counts_the_same():
    pytest.importorskip("fvcore", reason="the handlers are fvcore's")
    from fvcore.nn import FlopCountAnalysis

    class Calls(torch.nn.Module):
        def forward(self, q, x, weights):
            out = xk.xfa(q, q, q, torch.ones(H))
            G = xk.gram(q, q, symmetric=True)[0]
            y = xk.channel_mix(q, G)
            return out, y, xk.xfa_layer(x, *weights, form="gram")

    q, x, weights = randn(B, H, N, D, seed=1), randn(B, N, C, seed=2), layer(requires_grad=False).weights()
    analysis = FlopCountAnalysis(Calls(), (q, x, weights)).set_op_handle(**xk.flops.fvcore_handlers())
    by_op = analysis.unsupported_ops_warnings(False).by_operator()
    assert {name: by_op[name] for name in ("xfa_forward", "gram", "channel_mix", "layer_forward")} == {
        "xfa_forward": 2 * B * H * N * D * D,
        "gram": B * H * N * D * (D + 1) // 2,
        "channel_mix": B * H * N * D * D,
        "layer_forward": B * (N * (C * (C + 1) // 2 + C * C) + C * C * (3 * C + 2 * D)),
    }
