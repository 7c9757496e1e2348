"""norm="none": the channel attention of DaViT and Florence-2, as an operator and as a layer in both forms."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Config, make_problem, randn
from layer_cases import make_layer
from torch.autograd import gradcheck, gradgradcheck

import xformer_kernels as xk
from xformer_kernels import dispatch
from xformer_kernels.spec import Spec
from xformer_kernels.testing import assert_close

CONFIGS = tuple(
    Config(map, "none", activation)
    for map, activation in (("query_key", "softmax"), ("query_key", "identity"), ("key_value", "softmax"))
)
SHAPES = ((1, 1, 1, 1), (2, 300, 3, 5), (1, 1031, 2, 32), (2, 7, 1, 40), (0, 9, 2, 4), (2, 0, 2, 4))


def problem(shape, config, **changes):
    """A problem with a temperature as in models: N^-1/2."""
    p = make_problem(shape, config, **changes)
    p.temperature = (p.temperature * max(1, shape[1]) ** -0.5).to(p.temperature.dtype)
    return p


@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xfa(shape, dtype, config, kernel, device, ran, shorter):
    shape = shorter(shape)
    p = problem(shape, config, dtype=dtype, masked=shape[1] > 5, device=device)
    fused = dispatch.fuses(kernel, Spec(norm="none"))
    with ran(*(("xfa_forward", "xfa_backward") if fused else ("gram", "channel_mix"))):
        p.check(p.run(xk.xfa, backend=kernel))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
def test_layer(block, form, config, kernel, device):
    for dtype in (torch.float32, torch.bfloat16):
        layer = make_layer((2, 131, 24, 3), config, dtype=dtype, block=block, masked=True, device=device)
        temperature = (layer.tensors[3] / 131).to(dtype)
        layer.tensors = (*layer.tensors[:3], temperature, *layer.tensors[4:])
        layer.check(layer.run(form=form, backend=kernel))


@pytest.mark.nightly(slow=True)
@pytest.mark.needs(dtype=torch.float64)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_derivatives(config, backend, slow):
    p = problem((2, 5, 2, 2), config, dtype=torch.float64, masked=False)
    p.token_mask = torch.tensor([[True, False, True, True, True], [True] * 5])

    def xfa(*inputs):
        return xk.xfa(*inputs, token_mask=p.token_mask, **config.kwargs(), backend=backend)

    assert gradcheck(xfa, p.inputs(), fast_mode=slow) and gradgradcheck(xfa, p.inputs(), fast_mode=slow)
    layer = xk.XFA(
        6, 2, map=config.map, norm="none", activation=config.activation, form="gram", backend=backend
    ).double()
    assert gradgradcheck(
        lambda x: layer(x), (randn(1, 9, 6, seed=1, dtype=torch.float64).requires_grad_(),), fast_mode=slow
    )


def davit(q, k, v):
    """ChannelAttention of timm: k, v and q take the roles of q, k and v."""
    k = k * k.shape[-1] ** -0.5
    return ((k.transpose(-1, -2) @ v).softmax(-1) @ q.transpose(-1, -2)).transpose(-1, -2)


def florence(q, k, v):
    """As in transformers: scaled dot product attention over features, with head dimension N."""
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(-1, -2) for x in (q, k, v))).transpose(-1, -2)


@pytest.mark.parametrize("name", ["davit", "florence"])
def test_equals_the_code_of_models(name, kernel, device):
    """Outputs and gradients equal those of the models' own code."""
    theirs = {"davit": davit, "florence": florence}[name]
    tokens = [randn(2, 3, 144, 32, seed=i).to(device) for i in range(3)]
    dout = randn(2, 3, 144, 32, seed=4).to(device)

    def ours(q, k, v):
        if name == "davit":
            return xk.xfa(
                k, v, q, torch.full((1,), 32**-0.5, dtype=q.dtype, device=device), norm="none", backend=kernel
            )
        return xk.xfa(q, k, v, torch.full((1,), 144**-0.5, dtype=q.dtype, device=device), norm="none", backend=kernel)

    def all_of(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tokens]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    results = zip(
        ("out", "dq", "dk", "dv"), all_of(ours, torch.float32), all_of(theirs, torch.float32),
        all_of(theirs, torch.float64), strict=True,
    )  # fmt: skip
    for name, result, eager, oracle in results:
        assert_close(result, eager, oracle, name)


def test_compiled(kernel, device, slow):
    compiler = "aot_eager" if slow else "inductor"
    layer = xk.XFA(24, 3, norm="none", backend=kernel).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    x = randn(2, 70, 24, seed=1).to(device) / 8
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_explained(kernel, device):
    p = problem((1, 9, 2, 4), CONFIGS[0], device=device)
    tensors = (p.q, p.k, p.v, p.temperature)
    assert xk.explain(*tensors, norm="none", backend=kernel).backend == kernel
    with pytest.raises(ValueError, match="norm must be one of 'token', 'feature', 'none', got 'batch'"):
        xk.xfa(*tensors, norm="batch")
