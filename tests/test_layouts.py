"""Channel-major tokens and packed projections: results have the layout of the tokens, and the same values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import CONFIGS, DTYPES, LAYOUTS, Config, Problem, make_problem, randn, random_mask
from test_linear_attention import MAPS, check, inputs

import xformer_kernels as xk
from xformer_kernels.backends import layouts
from xformer_kernels.testing import assert_bitwise

channel_major = LAYOUTS["token_contiguous"]
# (B, N, H, D): numbers of tokens that fill blocks and vectors, and that do not
IMAGES = ((2, 37, 3, 20), (1, 1, 2, 7), (3, 9, 1, 2), (1, 300, 2, 48), (1, 96, 2, 16), (2, 131, 1, 67))
# packed shape for (B, N, H, D), dimension of q, k and v, and a function that views one of them as (B, H, N, D)
PACKED = {
    "tokens": (lambda B, N, H, D: (B, N, 3, H, D), 2, lambda x: x.transpose(1, 2)),
    "channels": (lambda B, N, H, D: (B, 3, H, D, N), 1, lambda x: x.transpose(2, 3)),
    "channels_of_heads": (lambda B, N, H, D: (B, H, 3, D, N), 2, lambda x: x.transpose(2, 3)),
    "stacked": (lambda B, N, H, D: (3, B, H, N, D), 0, lambda x: x),
}
OPERATORS = {
    "xfa": lambda q, k, v, **o: xk.xfa(q, k, v, q.new_ones(1), **o),
    "of_other_roles": lambda q, k, v, **o: xk.xfa(k, v, q, q.new_ones(1), norm="none", **o),
    "linear_attention": xk.linear_attention,
}


@pytest.fixture
def keeper(need_backend):
    """The backend that keeps layouts."""
    need_backend("cpp")
    return "cpp"


@pytest.fixture
def ran_keeper(keeper, ran_backend):
    return partial(ran_backend, keeper)


@pytest.fixture
def always_a_node(monkeypatch):
    monkeypatch.setattr(layouts, "WORTH_PACKING", 0)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dout", ["token_contiguous", "token_major", "per_feature"])
@pytest.mark.parametrize("config", [*CONFIGS, Config("query_key", "none")], ids=str)
def test_xfa_of_images(config, dout, masked, keeper, ran_keeper):
    for shape in IMAGES:
        p = make_problem(shape, config, layout="token_contiguous", dout=dout, masked=masked)
        with ran_keeper("xfa_forward", "xfa_backward"):
            result = p.run(xk.xfa, backend=keeper)
        p.check(result)
        if 1 not in p.q.shape[2:]:
            assert all(result[name].stride(2) == 1 for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_xfa_of_images_of_each_dtype(dtype, keeper, ran_keeper):
    for masked in (False, True):
        p = make_problem((2, 100, 3, 36), dtype=dtype, layout="token_contiguous", masked=masked)
        with ran_keeper("xfa_forward", "xfa_backward"):
            p.check(p.run(xk.xfa, backend=keeper))


@pytest.mark.parametrize("normalize", [True, False], ids=["", "sums"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_linear_attention_of_images(feature_map, normalize, keeper, ran_keeper):
    for turn, shape in enumerate(((2, 3, 100, 37, 16, 9), (1, 1, 96, 96, 20, 20), (1, 2, 5, 131, 33, 7))):
        tensors = [channel_major(x) for x in inputs(shape, positive=feature_map == "identity")]
        masks = {}
        if turn == 0:
            masks = {"query_mask": random_mask(2, 100, 1), "token_mask": random_mask(2, 37, 2)}
        result = check(tensors, ran_keeper, keeper, feature_map=feature_map, normalize=normalize, scale=0.5, **masks)
        assert all(x.stride(2) == 1 for x in result.values())


def test_masked_pixels_are_ignored(keeper):
    """Values of masked pixels are ignored, for every layout of the results."""
    clean = make_problem((2, 53, 2, 12), layout="token_contiguous", dout="token_contiguous", masked=True)
    mask = clean.token_mask[:, None, :, None]
    dirty = Problem(*(torch.where(mask, x, float("nan")) for x in (clean.q, clean.k, clean.v)), clean.temperature,
                    torch.where(mask, clean.dout, float("inf")), clean.config, clean.token_mask)  # fmt: skip
    for name, x in dirty.run(xk.xfa, backend=keeper).items():
        assert_bitwise(x, clean.run(xk.xfa, backend=keeper)[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_packed(operator, layout, dtype, keeper, always_a_node):
    """The gradient of split_qkv equals that of unbind; if the kernels write a packed gradient, nothing is copied."""
    shape, dim, of_heads = PACKED[layout]
    x = randn(*shape(2, 37, 3, 8), seed=1, dtype=dtype).requires_grad_()
    dout = randn(2, 3, 37, 8, seed=2, dtype=dtype)

    def gradient(parts):
        out = OPERATORS[operator](*map(of_heads, parts), backend=keeper)
        with torch.profiler.profile() as profile:
            (dx,) = torch.autograd.grad(out, x, dout)
        return dx, {event.name for event in profile.events()}

    expected, _ = gradient(x.unbind(dim))
    dx, called = gradient(xk.split_qkv(x, dim))
    assert_bitwise(dx, expected, "dx")
    if operator != "of_other_roles":
        assert dx.stride() == x.stride() and not called & {"aten::stack", "aten::cat", "aten::clone", "aten::copy_"}


def test_gradients_of_some_parts(always_a_node):
    """Parts that are unused, used twice, changed by hooks, or have gradients with other strides."""
    x = randn(2, 5, 3, 2, 4, seed=1).requires_grad_()

    def used(q, k, v):
        v.register_hook(lambda g: 2 * g)
        return (q * q.detach()).sum() + q.transpose(0, 1).sum() + v.square().sum()

    expected = torch.autograd.grad(used(*x.unbind(2)), x)[0]
    assert_bitwise(torch.autograd.grad(used(*xk.split_qkv(x, 2)), x)[0], expected, "dx")
    q, k, v = xk.split_qkv(x, -3)
    (unused,) = torch.autograd.grad(k.detach().sum().requires_grad_(), x, allow_unused=True)
    assert unused is None and q.shape == k.shape == v.shape == (2, 5, 2, 4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_batched_gradients_of_packed(operator, keeper, always_a_node):
    """With is_grads_batched of torch.autograd.grad, and with torch.vmap."""
    x = randn(2, 9, 3, 2, 4, seed=1).requires_grad_()
    douts = randn(3, 2, 2, 9, 4, seed=2)
    out = OPERATORS[operator](*(t.transpose(1, 2) for t in xk.split_qkv(x, 2)), backend=keeper)

    def gradient(dout, **kwargs):
        return torch.autograd.grad(out, x, dout, retain_graph=True, **kwargs)[0]

    expected = torch.stack([gradient(dout) for dout in douts])
    torch.testing.assert_close(gradient(douts, is_grads_batched=True), expected)
    torch.testing.assert_close(torch.vmap(gradient)(douts), expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivatives_of_packed(operator, keeper, always_a_node):
    x = randn(1, 3, 3, 1, 2, seed=1, dtype=torch.float64)
    x = (x.abs() + 0.1).requires_grad_()  # not at the kink of relu

    def function(x):
        return OPERATORS[operator](*(t.transpose(1, 2) for t in xk.split_qkv(x, 2)), backend=keeper)

    assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("layout", ["tokens", "channels"])
def test_compiled_as_eager(layout, keeper):
    shape, dim, of_heads = PACKED[layout]
    x = randn(*shape(2, 37, 3, 8), seed=1).requires_grad_()

    def function(x):
        return OPERATORS["xfa"](*map(of_heads, xk.split_qkv(x, dim)), backend=keeper)

    torch.compiler.reset()
    out, again = torch.compile(function, fullgraph=True)(x), function(x)
    assert out.stride() == again.stride()
    assert_bitwise(out, again, "out")
    (dx,), (dx_again,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, again))
    torch.testing.assert_close(dx, dx_again)


def test_split_qkv_errors():
    with pytest.raises(TypeError, match=r"packed must be a torch.Tensor"):
        xk.split_qkv([1], 0)
    for dim in ("1", 1.0, True, None):
        with pytest.raises(TypeError, match=r"dim must be an integer, got \w+: "):
            xk.split_qkv(torch.zeros(3, 3), dim)
    for dim in (1, 3, -4):
        with pytest.raises(ValueError, match=rf"packed must have 3 at dim {dim}, .*\(2, 4, 3\)"):
            xk.split_qkv(torch.zeros(2, 4, 3), dim)
