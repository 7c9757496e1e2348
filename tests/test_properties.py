"""Random shapes, strides and dtypes drawn by hypothesis, checked with the usual tolerance."""

from __future__ import annotations

import math

import pytest
import torch
from cases import THOROUGH, Config, Problem, random_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xformer_kernels as xk
from xformer_kernels import dispatch, reference
from xformer_kernels.testing import assert_bitwise, assert_close


@pytest.fixture
def examples(kernel, slow, interpreted):
    """Number of examples; each takes seconds if kernels are emulated, or compiled for each number of features."""
    if slow or kernel == "triton":
        return 8 if THOROUGH else 2 if interpreted else 4
    return 100


def for_all(strategy, check, examples):
    """Runs `check` for `examples` arguments drawn from `strategy`."""
    settings(max_examples=examples, suppress_health_check=list(HealthCheck))(given(strategy)(check))()


batches = st.sampled_from([0, 1, 1, 2, 3])
heads = st.integers(1, 4)
tokens = st.one_of(st.integers(0, 40), st.integers(41, 300), st.sampled_from([997, 1024, 1025, 2047, 4096, 4099]))
features = st.one_of(st.integers(1, 20), st.sampled_from([24, 31, 32, 33, 47, 48, 61, 64, 65, 96, 127, 128]))
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
configs = st.builds(
    Config,
    st.sampled_from(["query_key", "key_value"]),
    st.sampled_from(["token", "feature"]),
    st.sampled_from(["softmax", "identity"]),
    st.sampled_from([1e-12, 1e-6, 0.5]),
)


@st.composite
def strided(draw, shape, dtype, device):
    """A view of random numbers, with any memory order, steps and offset; the rest of its buffer is NaN."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    strides, extent = [0] * len(shape), 1
    for dim in order:
        strides[dim] = extent * steps[dim]
        extent *= max(shape[dim], 1) * steps[dim] + draw(st.sampled_from([0, 0, 1, 5]))
    offset = draw(st.integers(0, 9))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    view = torch.full((offset + extent,), math.nan, dtype=dtype, device=device).as_strided(shape, strides, offset)
    view.copy_(torch.randn(shape, generator=numbers, dtype=torch.float64) + 0.2)
    expanded = draw(st.sampled_from([None, None, None, *range(len(shape))]))
    return view if expanded is None or 0 in shape else view.narrow(expanded, 0, 1).expand(shape)


@st.composite
def problems(draw, device):
    B, H, N, D = draw(batches), draw(heads), draw(tokens), draw(features)
    dtype = draw(dtypes)
    q, k, v, dout = (draw(strided((B, H, N, D), dtype, device)) for _ in range(4))
    temperature = torch.linspace(0.5, 2.0, H, dtype=torch.float64, device=device).to(
        draw(st.sampled_from([dtype, torch.float32]))
    )
    mask = random_mask(B, N, draw(st.integers(0, 9)), device) if draw(st.booleans()) else None
    return Problem(q, k, v, temperature, dout, draw(configs), mask)


def test_xfa(kernel, device, ran, examples):
    def check(p):
        with ran("xfa_forward", "xfa_backward"):
            result = p.run(xk.xfa, backend=kernel)
        p.check(result)
        again = p.run(xk.xfa, backend=kernel)
        for name, x in result.items():
            assert_bitwise(x, again[name], name)

    def served(p):
        return not dispatch.reasons_against(kernel, device, (p.q.dtype,), (p.q.shape[3],), p.config.norm)

    drawn = problems(device)
    for_all(drawn if dispatch.has(kernel, "gram") else drawn.filter(served), check, examples)


@st.composite
def gram_arguments(draw, device):
    B, H, N = draw(batches), draw(heads), draw(tokens)
    dtype = draw(dtypes)
    a = draw(strided((B, H, N, draw(features)), dtype, device))
    symmetric = draw(st.booleans())
    b = a if symmetric else draw(strided((B, H, N, draw(features)), dtype, device))
    mask = random_mask(B, N, draw(st.integers(0, 9)), device) if draw(st.booleans()) else None
    return a, b, {"symmetric": symmetric, "token_mask": mask}


@pytest.mark.needs(norm=None)
def test_gram(kernel, device, ran, examples):
    def check(arguments):
        a, b, kwargs = arguments
        with ran("gram"):
            result = xk.gram(a, b, backend=kernel, **kwargs)
        a64 = a.double()
        oracle = reference.gram(a64, a64 if b is a else b.double(), **kwargs)
        for name, got, eager, exact in zip(
            ("G", "ssq_a", "ssq_b"), result, reference.gram(a, b, **kwargs), oracle, strict=True
        ):
            assert_close(got, eager, exact, name)

    for_all(gram_arguments(device), check, examples)


@st.composite
def mix_arguments(draw, device):
    B, H, N, I, O = draw(batches), draw(heads), draw(tokens), draw(features), draw(features)  # noqa: E741
    dtype = draw(dtypes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight_dtype = draw(st.sampled_from([dtype, wide]))
    t = {"x": draw(strided((B, H, N, I), dtype, device)), "weight": draw(strided((B, H, O, I), weight_dtype, device))}
    if draw(st.booleans()):
        t["bias"] = draw(strided((B, H, O), weight_dtype, device))
    if draw(st.booleans()):
        t["add"] = draw(strided((B, H, N, O), dtype, device))
        if draw(st.booleans()):
            t["add_scale"] = draw(strided((B, H, O), weight_dtype, device))
    if draw(st.booleans()):
        I2 = draw(features)
        t["x2"], t["weight2"] = (
            draw(strided((B, H, N, I2), dtype, device)),
            draw(strided((B, H, O, I2), weight_dtype, device)),
        )
    return t


@pytest.mark.needs(norm=None)
def test_channel_mix(kernel, device, ran, examples):
    def check(t):
        with ran("channel_mix"):
            y = xk.channel_mix(**t, backend=kernel)
        oracle = reference.channel_mix(**{name: x.double() for name, x in t.items()})
        assert_close(y, reference.channel_mix(**t), oracle, "y")

    for_all(mix_arguments(device), check, examples)
