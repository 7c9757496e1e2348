"""The kernels whose loads are the operands of mma.sync: where they run, and that their results are right."""

import guarded
import pytest
import torch
from cases import RESULTS, Config, make_problem, randn

import xformer_kernels as xk
from xformer_kernels import reference
from xformer_kernels.testing import assert_bitwise, assert_close

LOW_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)
# Every width, filled and in part; the smallest pieces are of 4 bytes.
FEATURES = (4, 16, 24, 32, 36, 48, 56, 64)


@pytest.fixture(autouse=True)
def cuda(emulated_cuda, monkeypatch):
    monkeypatch.setattr(emulated_cuda, "path", "two passes")
    return emulated_cuda


def ends_at_page(x):
    """With memory behind it that may not be touched."""
    return guarded.like(x, end=True)


# ----------------------------------------------------------------------------------------------------------------- gram


def check_gram(cuda, a, b, expected="fragment_gram"):
    result = xk.gram(a, b, backend="cuda")
    assert cuda._cuda.launched().removesuffix(" sum") == expected
    eager, oracle = reference.gram(a, b), reference.gram(a.double(), b.double())
    for name, got, other, exact in zip(("g", "ssq_a", "ssq_b"), result, eager, oracle, strict=True):
        assert_close(got, other, exact, name)


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_gram(cuda, features, dtype):
    """Tokens that fill steps, and that do not; heads next to each other, as views of a projection."""
    for tokens in (1, 47, 600):
        a, b = randn(2, tokens, 2, 2, features, seed=tokens, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
        check_gram(cuda, ends_at_page(a), ends_at_page(b))


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=str)
def test_gram_of_many_tokens(cuda, dtype):
    """Far from zero, where sums are large beside their terms."""
    a, b = (randn(1, 1, 5000, 48, seed=seed, dtype=torch.float64).add(3).to(dtype) for seed in (1, 2))
    check_gram(cuda, a, b)


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=str)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_gram_of_what_is_not_finite(cuda, value, dtype):
    a, b = (randn(1, 1, 70, 24, seed=seed, dtype=dtype) for seed in (1, 2))
    a[0, 0, 40, 3] = b[0, 0, 69, 23] = value
    check_gram(cuda, a, b)


def test_what_gram_leaves_to_others(cuda, monkeypatch):
    x = randn(1, 1, 40, 65, seed=0)
    for features in (5, 65):
        check_gram(cuda, x[..., :features].contiguous(), x[..., :features].contiguous() + 1, "gram")
    check_gram(cuda, x[..., 1:33], x[..., 1:33] + 1, "gram")  # not at multiples of 16 bytes
    check_gram(cuda, x[..., :16], x[..., :32], "gram")
    check_gram(cuda, x[..., :64:2], x[..., :64:2] + 1, "gram")
    check_gram(cuda, x[..., :32].double(), x[..., 32:64].double(), "gram")
    a = x[..., :32].contiguous()
    xk.gram(a, a, symmetric=True, backend="cuda")
    assert cuda._cuda.launched() == "gram"
    xk.gram(a, a + 1, token_mask=torch.ones(1, 40, dtype=torch.bool), backend="cuda")
    assert cuda._cuda.launched() == "gram"
    monkeypatch.setattr(cuda, "tf32_allowed", lambda: True)
    xk.gram(a, a + 1, backend="cuda")
    assert cuda._cuda.launched() == "gram"


# ------------------------------------------------------------------------------------------------------------------ mix


def check_mix(cuda, x, weight, expected="fragment_mix"):
    y = xk.channel_mix(x, weight, backend="cuda")
    assert cuda._cuda.launched() == expected
    exact = reference.channel_mix(x.double(), weight.double())
    assert_close(y, reference.channel_mix(x, weight), exact, "channel_mix")


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_mix(cuda, features, dtype):
    weight = randn(2, 2, features, features, seed=9, dtype=dtype)
    for tokens in (1, 47, 600):
        x = randn(2, tokens, 2, features, seed=tokens, dtype=dtype).transpose(1, 2)
        check_mix(cuda, ends_at_page(x), weight.mT if tokens == 47 else weight)


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=str)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_mix_of_what_is_not_finite(cuda, value, dtype):
    x, weight = randn(1, 2, 70, 24, seed=1, dtype=dtype), randn(1, 2, 24, 24, seed=2, dtype=dtype)
    x[0, 0, 40, 3] = weight[0, 1, 5, 6] = value
    check_mix(cuda, x, weight)


def test_mix_of_unlike_columns(cuda):
    """fp16 has five bits of exponent: columns of a map are scaled each by itself."""
    x = randn(1, 1, 40, 32, seed=1, dtype=torch.float16)
    weight = (randn(1, 1, 32, 32, seed=2) * 2.0 ** torch.linspace(-20, 10, 32)[:, None]).half()
    check_mix(cuda, x, weight)


def test_what_mix_leaves_to_others(cuda, monkeypatch):
    x, weight = randn(1, 1, 40, 32, seed=0), randn(1, 1, 32, 32, seed=1)
    check_mix(cuda, x.double(), weight.double(), "mix")
    check_mix(cuda, x, weight[:, :, :16], "mix")
    check_mix(cuda, randn(1, 1, 40, 65, seed=0), randn(1, 1, 65, 65, seed=1), "mix")
    check_mix(cuda, x.bfloat16(), weight, "mix")
    for more in ({"bias": weight[0, 0, 0]}, {"add": x}, {"x2": x, "weight2": weight}):
        xk.channel_mix(x, weight, **more, backend="cuda")
        assert cuda._cuda.launched() == "mix"
    monkeypatch.setattr(cuda, "tf32_allowed", lambda: True)
    xk.channel_mix(x, weight, backend="cuda")
    assert cuda._cuda.launched() == "mix"


# ------------------------------------------------------------------------------------------------------------------ xfa


def passes(cuda, problem):
    """Results, and the kernels of forward and of backward."""
    options = (problem.token_mask, problem.config.spec)
    inputs = (problem.q, problem.k, problem.v, problem.temperature)
    out, stats = cuda.xfa_forward(*inputs, *options)
    first = cuda._cuda.launched()
    dqkv, dtemperature = cuda.xfa_backward(problem.dout, *inputs, stats, *options)
    second = cuda._cuda.launched()
    results = (out.transpose(1, 2), *dqkv.transpose(2, 3).unbind(0), dtemperature)
    return dict(zip(RESULTS, results, strict=True)), first, second


GRAM_AND_MIX = "fragment_gram map_forward fragment_mix"
GRADIENTS = "fragment_gram map_backward fragment_gradients temperature"
QUERY_KEY = (Config(), Config(activation="identity"))


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=str)
@pytest.mark.parametrize("shape", ((2, 196, 2, 48), (1, 700, 2, 32), (2, 40, 3, 16), (1, 131, 2, 24)), ids=str)
def test_xfa(cuda, monkeypatch, shape, dtype):
    """The same bits in any order of threads, too."""
    for config in QUERY_KEY:
        problem = make_problem(shape, config, dtype=dtype)
        results, *launched = passes(cuda, problem)
        assert launched == [GRAM_AND_MIX, GRADIENTS]
        problem.check(results)
    monkeypatch.setenv("XK_EMULATION_SEED", "1")
    for name, result in passes(cuda, problem)[0].items():
        assert_bitwise(results[name], result, name)


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "token_major", "padded", "token_contiguous"))
def test_xfa_of_layouts(cuda, layout, dtype):
    problem = make_problem((2, 47, 2, 36), layout=layout, dtype=dtype)
    results, *launched = passes(cuda, problem)
    fits = layout in ("contiguous", "token_major")
    assert launched == (
        [GRAM_AND_MIX, GRADIENTS] if fits else ["gram map_forward mix", "gram map_backward mix temperature"]
    )
    problem.check(results)


@pytest.mark.parametrize(
    ("config", "forward", "backward"),
    (
        (Config("key_value"), "gram map_forward fragment_mix", "fragment_gram map_backward mix temperature"),
        (Config(norm="none"), GRAM_AND_MIX, "fragment_gram map_backward mix temperature"),
    ),
    ids=str,
)
def test_xfa_of_which_a_part_fits(cuda, config, forward, backward):
    problem = make_problem((1, 100, 2, 32), config)
    problem.temperature *= 0.1
    results, *launched = passes(cuda, problem)
    assert launched == [forward, backward]
    problem.check(results)


@pytest.mark.parametrize("dtype", LOW_AND_FULL, ids=str)
def test_xfa_of_many_tokens(cuda, dtype):
    """fp32 by tensor cores keeps the rule where sums are long."""
    problem = make_problem((1, 4096, 1, 48), dtype=dtype)
    results, *launched = passes(cuda, problem)
    assert launched == [GRAM_AND_MIX, GRADIENTS]
    problem.check(results)
