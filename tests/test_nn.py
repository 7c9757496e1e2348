"""The layer XFA: it equals timm's XCA with the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CONFIGS, randn

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise, assert_close

xcit = pytest.importorskip("timm.models.xcit", reason="timm, whose XCA the layer is compared with, is not installed")

DIM, HEADS = 48, 4


def randomize(module, seed=0):
    """Random values for all parameters: the default biases of 0 and temperatures of 1 would hide errors."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.rand(parameter.shape, generator=numbers, dtype=torch.float64)
            parameter.copy_(noise + 0.5 if name.endswith("temperature") else (noise - 0.5) * 0.4)
    return module


def run(module, x, dy):
    """The output and all gradients, by name."""
    x = x.detach().requires_grad_()
    y = module(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, (x, *parameters), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(("x", *names), grads, strict=True)}}


def tokens_of(layout, dtype, device):
    x = randn(2, 130, DIM, seed=1, dtype=dtype, device=device)
    if layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        x = torch.cat((x, x), 2)[:, :, :DIM]
    return x


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("qkv_bias", [False, True], ids=["", "qkv_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_timm_xca(dtype, qkv_bias, layout, backend, device, ran):
    theirs = randomize(xcit.XCA(DIM, num_heads=HEADS, qkv_bias=qkv_bias)).to(device, dtype)
    ours = xk.XFA(DIM, num_heads=HEADS, qkv_bias=qkv_bias, backend=backend).to(device, dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, dy = tokens_of(layout, dtype, device), randn(2, 130, DIM, seed=2, dtype=dtype, device=device)
    with ran("xfa_forward", "xfa_backward"):
        result = run(ours, x, dy)
    eager = run(theirs, x, dy)
    oracle = run(copy.deepcopy(theirs).double(), x.double(), dy.double())
    assert result.keys() == eager.keys()
    for name, got in result.items():
        assert_close(got, eager[name], oracle[name], name)


@pytest.mark.parametrize("qkv_bias", [False, True], ids=["", "qkv_bias"])
def test_state_dict_is_that_of_timm_xca(qkv_bias):
    theirs, ours = xcit.XCA(DIM, HEADS, qkv_bias), xk.XFA(DIM, HEADS, qkv_bias)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in theirs.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.state_dict().items()} == expected
    theirs.load_state_dict(randomize(ours).state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


def test_default_arguments_are_those_of_timm_xca():
    theirs, ours = xcit.XCA(64), xk.XFA(64)
    assert ours.num_heads == theirs.num_heads == 8
    assert ours.qkv.bias is None and theirs.qkv.bias is None
    assert torch.equal(ours.temperature, theirs.temperature)
    assert ours.no_weight_decay() == theirs.no_weight_decay() if hasattr(ours, "no_weight_decay") else True


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config(config, backend, device, ran):
    """The layer equals qkv, xfa and proj."""
    choices = {key: value for key, value in config.kwargs().items() if key != "eps"}
    layer = randomize(xk.XFA(DIM, HEADS, True, **choices, backend=backend)).to(device)
    x = randn(2, 50, DIM, seed=1, device=device)
    q, k, v = layer.qkv(x).view(2, 50, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    with ran("xfa_forward"):
        y = layer(x)
    out = xk.xfa(q, k, v, layer.temperature, **choices, backend=backend)
    assert_bitwise(y.detach(), layer.proj(out.transpose(1, 2).flatten(2)).detach(), "y")


@pytest.mark.needs(norm=None)
def test_dropout_in_training_only(backend, device, ran):
    layer = randomize(xk.XFA(DIM, HEADS, attn_drop=0.5, proj_drop=0.5, backend=backend)).to(device)
    plain = xk.XFA(DIM, HEADS, backend=backend).to(device)
    plain.load_state_dict(layer.state_dict())
    x = randn(2, 50, DIM, seed=1, device=device)
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert (first == 0).double().mean() > 0.4
    layer.eval()
    with ran("xfa_forward"):
        assert_bitwise(layer(x).detach(), plain(x).detach(), "evaluation")


@pytest.mark.needs(norm=None)
def test_attn_drop_alone_drops_the_map(backend, device):
    layer = randomize(xk.XFA(DIM, HEADS, attn_drop=0.5, backend=backend)).to(device)
    x = randn(2, 50, DIM, seed=1, device=device)
    y = layer(x)
    assert not torch.equal(layer(x), y)
    assert (y == 0).double().mean() < 0.1


@pytest.mark.needs(dtype=torch.float64)
def test_training_steps_equal_those_of_timm(backend, device):
    """After steps of an optimiser in float64, both layers still agree."""
    theirs = randomize(xcit.XCA(DIM, HEADS, True)).to(device).double()
    ours = xk.XFA(DIM, HEADS, True, backend=backend).to(device).double()
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for layer in (theirs, ours):
        optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        for step in range(8):
            x = randn(2, 40, DIM, seed=step, dtype=torch.float64, device=device)
            loss = (layer(x) - x.roll(1, dims=2)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_no_tokens_and_no_batch(backend, device):
    layer = xk.XFA(DIM, HEADS, backend=backend).to(device)
    for shape in ((2, 0, DIM), (0, 5, DIM)):
        y = layer(torch.ones(shape, device=device, requires_grad=True))
        assert y.shape == shape
        y.sum().backward()


def test_repr():
    text = repr(xk.XFA(DIM, HEADS, map="key_value", norm="feature"))
    assert "key_value" in text and "feature" in text
