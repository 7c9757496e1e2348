"""Results that are modified in place, batched gradients, the transforms of torch.func and forward-mode AD."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import make_problem, randn

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def functions(kernel, device):
    """Every differentiable function of one argument (3, 10, 8): its name, and the function for a backend."""
    weight = randn(24, 8, seed=1, dtype=torch.float64, device=device)
    proj = randn(5, 8, seed=2, dtype=torch.float64, device=device)
    square = randn(8, 8, seed=2, dtype=torch.float64, device=device)
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    norm = torch.linspace(0.5, 1.5, 8, dtype=torch.float64, device=device)

    def heads(x):
        return x.unflatten(-1, (2, 4)).transpose(-3, -2)

    def xfa(x, backend):
        return xk.xfa(heads(x), heads(x.flip(1)), heads(x * x), temperature, backend=backend)

    def gram(x, backend):
        return xk.gram(x, x.sin(), backend=backend)[0]

    def channel_mix(x, backend):
        return xk.channel_mix(x, proj, add=x[..., :5], bias=x.mean((0, 1))[:5], backend=backend)

    def layer(x, backend, form="gram"):
        return xk.xfa_layer(x, weight, None, temperature, proj, None, form=form, backend=backend)

    def block(x, backend, form="gram"):
        return xk.xfa_block(x, norm, None, 1e-3, weight, None, temperature, square, None, form=form, backend=backend)

    named = {"xfa": xfa, "gram": gram, "channel_mix": channel_mix}
    named |= {"layer, gram": layer, "layer, direct": partial(layer, form="direct")}
    named |= {"block, gram": block, "block, direct": partial(block, form="direct")}
    return [(name, partial(f, backend=kernel), partial(f, backend="reference")) for name, f in named.items()]


@pytest.fixture
def x(device):
    return randn(3, 10, 8, seed=5, dtype=torch.float64, device=device)


@pytest.mark.needs(norm=None)
def test_results_may_be_modified_in_place(kernel, device, x):
    """As those of torch's layers: y += x in a residual block, gradients that are scaled while a graph is made."""
    for name, ours, _ in functions(kernel, device):
        leaf = x.clone().requires_grad_()
        y = ours(leaf)
        (expected,) = torch.autograd.grad((y * 2 + 1).square().sum(), leaf)
        y = ours(leaf)
        y.mul_(2).add_(1)
        (g,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        CLOSE(g, expected, msg=name)
        second = torch.autograd.grad(g.square().sum(), leaf, retain_graph=True)[0]
        CLOSE(torch.autograd.grad(g.mul_(2).square().sum(), leaf)[0], 4 * second, msg=name)


@pytest.mark.needs(dtype=torch.float64)
def test_gradients_of_each_operand_may_be_modified_in_place(kernel, device):
    p = make_problem((2, 9, 2, 4), dtype=torch.float64, device=device)
    for wanted in ([0], [0, 1, 2, 3]):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((p.q, p.k, p.v, p.temperature))]
        out = xk.xfa(*leaves, backend=kernel)
        for g in torch.autograd.grad(out.square().sum(), [leaves[i] for i in wanted], create_graph=True):
            before = g.detach().clone()
            assert_bitwise(g.mul_(2).detach(), 2 * before, "gradient")


@pytest.mark.needs(norm=None)
def test_gradients_of_layer_weights_may_be_modified_in_place(kernel, device):
    for form in ("gram", "direct"):
        block = xk.XFABlock(8, 2, True, layer_scale=0.5, form=form, backend=kernel).to(device)
        y = block(torch.randn(2, 20, 8, device=device, requires_grad=True))
        for g in torch.autograd.grad(y.square().sum(), list(block.parameters()), create_graph=True):
            before = g.detach().clone()
            assert_bitwise(g.mul_(2).detach(), 2 * before, "gradient")


@pytest.mark.nightly(slow=True)
@pytest.mark.needs(norm=None)
def test_batched_gradients(kernel, device, x):
    """Vectorized Jacobians, and torch.autograd.grad with is_grads_batched."""
    for name, ours, reference in functions(kernel, device):
        jacobians = [
            torch.autograd.functional.jacobian(lambda x, f=f: f(x).sum(-1), x[:1], vectorize=vectorize)
            for f, vectorize in ((ours, True), (reference, False))
        ]
        CLOSE(*jacobians, msg=name)
        leaf = x.clone().requires_grad_()
        y = ours(leaf)
        dy = randn(4, *y.shape, seed=7, dtype=y.dtype, device=device)
        (batched,) = torch.autograd.grad(y, leaf, dy, is_grads_batched=True, retain_graph=True)
        for one, d in zip(batched, dy, strict=True):
            CLOSE(one, torch.autograd.grad(y, leaf, d, retain_graph=True)[0], msg=name)


def test_transforms_of_torch_func(kernel, device, x):
    """PyTorch's own operators compute under them, since they have the rules."""
    for name, ours, reference in functions(kernel, device):
        expected = reference(x)
        if name != "gram":  # whose example has no batch of its own left
            each = torch.vmap(lambda one, f=ours: f(one[None])[0])(x)
            CLOSE(each, torch.stack([reference(one[None])[0] for one in x]), msg=name)
        dy = randn(*expected.shape, seed=7, dtype=x.dtype, device=device)
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(reference(leaf), leaf, dy)
        CLOSE(torch.func.grad(lambda x, f=ours, dy=dy: (f(x) * dy).sum())(x), g, msg=name)
        CLOSE(torch.func.vjp(ours, x)[1](dy)[0], g, msg=name)
        tangent = randn(*x.shape, seed=8, dtype=x.dtype, device=device)
        y, dual = torch.func.jvp(ours, (x,), (tangent,))
        CLOSE(y, expected, msg=name)
        CLOSE((dual * dy).sum(), (g * tangent).sum(), msg=name)
        with torch.autograd.forward_ad.dual_level():
            again = ours(torch.autograd.forward_ad.make_dual(x, tangent))
            CLOSE(torch.autograd.forward_ad.unpack_dual(again).tangent, dual, msg=name)


@pytest.mark.nightly(slow=True)
@pytest.mark.needs(norm=None)
def test_hessian(kernel, device, slow):
    x = randn(1, 2 if slow else 4, 8, seed=5, dtype=torch.float64, device=device)
    for name, ours, reference in functions(kernel, device):
        expected = torch.autograd.functional.hessian(lambda x, f=reference: f(x).sin().sum(), x)
        CLOSE(torch.func.hessian(lambda x, f=ours: f(x).sin().sum())(x), expected, msg=name)
        vectorized = torch.autograd.functional.hessian(lambda x, f=ours: f(x).sin().sum(), x, vectorize=True)
        CLOSE(vectorized, expected, msg=name)


def test_explain_says_that_torch_computes(device):
    q, t = torch.ones(1, 2, 5, 4, device=device), torch.ones(2, device=device)
    seen = []

    def each(q):
        seen.append(xk.explain(q[None], q[None], q[None], t, backend="auto"))
        return q

    torch.vmap(each)(q)
    assert seen[0].backend == "reference" and "torch.func" in str(seen[0])
    with pytest.raises(ValueError, match="backend must be one of"):
        torch.vmap(lambda q: xk.xfa(q[None], q[None], q[None], t, backend="gpu"))(q)
