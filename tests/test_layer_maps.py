"""The maps of a layer in Gram form and their derivatives, by each backend that computes them itself.

The oracle is eager PyTorch in float64 (layer/maps.py), which test_layer.py compares with the reference.
"""

from __future__ import annotations

import pytest
import torch
from cases import randn
from layer_cases import make_layer

from xformer_kernels import backends
from xformer_kernels.layer import maps, passes
from xformer_kernels.layer.maps import Rule
from xformer_kernels.testing import assert_bitwise, assert_close

RULES = (
    Rule("query_key", "softmax", 1e-12),
    Rule("query_key", "identity", 1e-12),
    Rule("query_key", "softmax", 0.3),
    Rule("query_key", "softmax", 1e-12, normalised=False),
    Rule("key_value", "softmax", 1e-12),
    Rule("key_value", "identity", 0.3),
    Rule("key_value", "identity", 1e-12, normalised=False),
)
pytestmark = pytest.mark.needs(norm=None)


def own(kernel, dtype, D):
    """The module of a backend, whose functions compute the maps of a layer."""
    backend = backends.load(kernel)[0]
    if not backend.takes_layer_maps(dtype, D):
        pytest.skip(f"{kernel} leaves maps of {D} features in {dtype} to eager PyTorch")
    found = passes.of(kernel, dtype, D)
    assert (found.maps, found.maps_backward) == (backend.module.layer_maps, backend.module.layer_maps_backward)
    return backend.module


def inputs(B, H, D, C, rule, kept, device):
    """Arguments of layer_maps in float64, of tokens centred off their mean, and the gradients of its first results."""
    u = randn(B, C + 60, C, dtype=torch.float64, seed=1)
    s, n, c = u.sum(1), torch.full((B, 1), C + 60.0, dtype=torch.float64), randn(B, C, dtype=torch.float64, seed=2)
    sizes = ((3, H, D, C), (3, H, D), (H,), (B, H, D, D), (B, H, D, C), (B, H, D))
    qkv, bias, temperature, keep, dT, de = (randn(*size, dtype=torch.float64, seed=3) for size in sizes)
    if not rule.normalised:
        temperature = temperature / 1000
    P = torch.einsum("rhdc,bce->brhde", qkv[: rule.rows], u.mT @ u).contiguous()
    tensors = (P, qkv, bias, temperature, s, n, c, keep.abs() if kept else None, dT, de)
    return [None if t is None else t.to(device) for t in tensors]


def both(module, P, qkv, bias, temperature, s, n, c, keep, dT, de, rule, saved=None):
    """The results of both functions by name; `saved`: cos and norms, by default those of the first function."""
    forward = module.layer_maps(P, qkv, bias, temperature, s, n, c, keep, rule)
    cos, norms = (forward.cos, forward.norms) if saved is None else saved
    backward = module.layer_maps_backward(dT, de, qkv, bias, temperature, cos, norms, s, n, c, keep, rule)
    return {**{f"forward {k}": v for k, v in forward._asdict().items()}, **backward._asdict()}


@pytest.mark.parametrize("kept", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule)))
@pytest.mark.parametrize("B, H, D, C", [(2, 3, 1, 5), (1, 2, 17, 40), (2, 1, 32, 67), (1, 2, 64, 130), (1, 1, 70, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_maps(dtype, B, H, D, C, rule, kept, kernel, device):
    module = own(kernel, dtype, D)
    exact = inputs(B, H, D, C, rule, kept, device)
    rounded = [None if t is None else t.to(dtype) for t in exact]
    wide = [None if t is None else t.double() for t in rounded]
    oracle = both(maps, *wide, rule)
    saved = tuple(oracle[f"forward {name}"].to(dtype) for name in ("cos", "norms"))
    result, eager = both(module, *rounded, rule, saved), both(maps, *rounded, rule, saved)
    for name, x in result.items():
        assert (x.shape, x.dtype) == (eager[name].shape, eager[name].dtype), name
        assert_close(x.to(dtype), eager[name], oracle[name], name)  # dtemperature is float64, but not its terms
    again = both(module, *rounded, rule, saved)
    for name, x in result.items():
        assert_bitwise(x, again[name], name)


@pytest.mark.parametrize("rule", RULES[::4], ids=lambda rule: rule.map)
@pytest.mark.parametrize("D", [16, 17])
def test_strided_and_unaligned_arguments(D, rule, kernel, device):
    """Sums and norms are parts of larger tensors in backward; everything else may be a view, of any address."""
    module = backends.load(kernel)[0].module
    plain = [None if t is None else t.float() for t in inputs(2, 3, D, 40, rule, True, device)]
    saved = [plain[7].clone(), torch.rand(2, 2, 3, D, device=device) + 0.5]  # cos and norms

    def apart(t):
        return torch.cat((t, t), 1)[:, : t.shape[1]]

    def unaligned(t):
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    expected = both(module, *plain, rule, saved)
    parts = [apart(t) if i in (4, 5, 6) else torch.stack((t, t), -1)[..., 0] for i, t in enumerate(plain)]
    for arguments, more in ((parts, [apart(t) for t in saved]), ([*map(unaligned, plain)], [*map(unaligned, saved)])):
        for name, x in both(module, *arguments, rule, more).items():
            assert_bitwise(x, expected[name], name)


def test_wider_sums(kernel, device):
    """P may be wider than the weights."""
    module = backends.load(kernel)[0].module
    plain = [None if t is None else t.float() for t in inputs(1, 2, 8, 16, RULES[0], False, device)]
    expected = both(module, *plain, RULES[0])
    for name, x in both(module, plain[0].double(), *plain[1:], RULES[0]).items():
        assert_bitwise(x, expected[name], name)


@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("eps", [None, 1e-5], ids=["", "layer norm"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample(dtype, masked, eps, N, kernel, device):
    """The same tokens are sampled, whatever the strides, and those that are masked do not count."""
    x = randn(2, 40, N, dtype=dtype, seed=N, device=device).mT
    mask = torch.arange(N, device=device).expand(2, N) % 3 > 0 if masked else None
    if masked:
        x = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    total, count = passes.of(kernel, torch.float32, 8).sample(x, mask, eps)
    expected, number = passes.sample(x, mask, eps)
    assert torch.equal(count, number)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("D", [66, 130])
def test_wide_heads(D, kernel, device, ran):
    """Eager PyTorch computes maps that are wider than the kernels take; nothing else changes."""
    layer = make_layer((1, 40, D, 1), device=device)
    with ran("layer_forward", "layer_backward"):
        layer.check(layer.run(form="gram", backend=kernel))
    backend = backends.load(kernel)[0]
    taken = passes.of(kernel, torch.float32, D).maps is not maps.layer_maps
    assert taken == backend.takes_layer_maps(torch.float32, D) == (kernel == "cpp" and D <= 128)


def test_no_images(kernel, device):
    module = backends.load(kernel)[0].module
    rule = RULES[0]
    tensors = [None if t is None else t.float() for t in inputs(1, 2, 8, 16, rule, False, device)]
    empty = [t if t is None or i in (1, 2, 3) else t[:0] for i, t in enumerate(tensors)]
    shapes = {name: x.shape for name, x in both(module, *tensors, rule).items()}
    assert {name: (1, *x.shape[1:]) for name, x in both(module, *empty, rule).items()} == shapes
