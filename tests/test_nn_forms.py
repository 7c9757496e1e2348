"""XFA and XFABlock in both forms: the ops and submodules that they call."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import randn
from test_nn import DIM, HEADS, randomize, run
from torch import nn

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise, assert_close

OPS = {"gram": ("layer_forward", "layer_backward"), "direct": ("xfa_forward", "xfa_backward")}


@pytest.mark.parametrize("form", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_layer_in_both_forms(dtype, form, kernel, device, ran):
    layer = randomize(xk.XFA(DIM, HEADS, True, form=form, backend=kernel)).to(device, dtype)
    plain = copy.deepcopy(layer)
    plain.form, plain.backend = "direct", "reference"
    x, dy = (randn(2, 130, DIM, seed=i, dtype=dtype, device=device) for i in (1, 2))
    with ran(*OPS[form]):
        result = run(layer, x, dy)
    eager, oracle = run(plain, x, dy), run(copy.deepcopy(plain).double(), x.double(), dy.double())
    for name, got in result.items():
        assert_close(got, eager[name], oracle[name], name)


@pytest.mark.parametrize("form", OPS)
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_block_in_both_forms(layer_scale, form, kernel, device, ran):
    choices = dict(qkv_bias=True, layer_scale=layer_scale, ln_eps=1e-3)
    block = randomize(xk.XFABlock(DIM, HEADS, form=form, backend=kernel, **choices)).to(device)

    class Eager(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.norm, self.attn, self.layer_scale = block.norm, block.attn, block.layer_scale

        def forward(self, x):
            y = self.attn(self.norm(x))
            return x + (y if self.layer_scale is None else self.layer_scale * y)

    plain = Eager(copy.deepcopy(block))
    plain.attn.form, plain.attn.backend = "direct", "reference"
    x, dy = (randn(2, 130, DIM, seed=i, device=device) for i in (1, 2))
    with ran(*OPS[form]):
        result = run(block, x, dy)
    eager, oracle = run(plain, x, dy), run(copy.deepcopy(plain).double(), x.double(), dy.double())
    for name in eager:
        assert_close(result[name], eager[name], oracle[name], name)


@pytest.mark.needs(norm=None)
def test_block_with_dropout_and_mask(kernel, device):
    """Dropout of the result is not fused: it drops elements of the layer's output, never of x."""
    block = randomize(xk.XFABlock(DIM, HEADS, proj_drop=0.5, form="gram", backend=kernel)).to(device)
    x = randn(2, 60, DIM, seed=1, device=device)
    y = block(x)
    assert 0.4 < (y == x).double().mean() < 0.6
    block.eval()
    mask = torch.ones(2, 60, dtype=torch.bool, device=device)
    assert_bitwise(block(x, token_mask=mask).detach(), block(x).detach(), "all tokens kept")
    mask[:, 30:] = False
    torch.testing.assert_close(block(x, token_mask=mask)[:, :30], block(x[:, :30]), rtol=1e-4, atol=1e-5)


def test_auto_is_the_cheaper_form(ran_auto):
    layer = xk.XFA(64, 4)
    for N, form in ((4096, "gram"), (32, "direct")):
        with ran_auto(*OPS[form]):
            layer(torch.randn(1, N, 64)).sum().backward()


@pytest.mark.parametrize("part", ["qkv", "proj"])
@pytest.mark.parametrize("how", ["hook", "replaced"])
def test_changed_projections_are_called(how, part, ran_auto):
    """With adapters, quantised layers or hooks, the direct form is used; requesting the Gram form is an error."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = randomize(xk.XFA(64, 4, True))
    x = randn(1, 4096, 64, seed=1)
    linear = getattr(layer, part)
    if how == "hook":
        linear.register_forward_hook(lambda module, args, y: 2 * y)
    else:
        other = Twice(linear.in_features, linear.out_features)
        other.load_state_dict(linear.state_dict())
        setattr(layer, part, other)
    doubled = randomize(xk.XFA(64, 4, True))
    with torch.no_grad():
        for parameter in getattr(doubled, part).parameters():
            parameter.mul_(2)
    with ran_auto("xfa_forward"):
        y = layer(x)
    torch.testing.assert_close(y, doubled(x), rtol=1e-4, atol=1e-4)
    layer.form = "gram"
    with pytest.raises(ValueError, match="form='gram' and group need the weights"):
        layer(x)


def test_bad_arguments():
    with pytest.raises(ValueError, match="form must be one of 'auto', 'gram', 'direct', got 'both'"):
        xk.XFA(8, 2, form="both")
    with pytest.raises(ValueError, match="form must be one of"):
        xk.integrations.replace_attention(nn.Identity(), form="both")
    with pytest.raises(ValueError, match="ln_eps"):
        xk.XFABlock(8, 2, ln_eps=-1e-5)
    with pytest.raises(TypeError, match="layer_scale must be a finite number, got str: 'a'"):
        xk.XFABlock(8, 2, layer_scale="a")
    with pytest.raises(TypeError, match="residual must be True or False, got str: 'no'"):
        x, layer = torch.randn(1, 5, 8), xk.XFA(8, 2)
        xk.xfa_block(x, None, None, 1e-6, *layer.weights(), residual="no")
    with pytest.raises(ValueError, match="form='gram' is not possible: norm='feature'"):
        xk.XFA(8, 2, norm="feature", form="gram")(torch.randn(1, 5, 8))


def test_names_of_a_block():
    names = {"norm.weight", "norm.bias", "attn.temperature", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"}
    assert set(xk.XFABlock(8, 2).state_dict()) == names
    assert set(xk.XFABlock(8, 2, layer_scale=1e-6).state_dict()) == {*names, "layer_scale"}
