"""The kernels of two passes, whose loads are the operands of mma.sync: their results, and which tokens are copied."""

import guarded
import pytest
import torch
from cases import RESULTS, Config, make_problem, randn, random_mask

from xformer_kernels import reference
from xformer_kernels.spec import Spec
from xformer_kernels.testing import assert_bitwise, assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every width, filled and in part; the last pieces of 4 and 36 features of 16 bits are filled up.
FEATURES = (4, 16, 24, 32, 36, 48, 56, 64)
FORWARD = "fragment_gram map_forward fragment_mix"
BACKWARD = "fragment_gram map_backward fragment_gradients temperature"
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


@pytest.fixture(autouse=True)
def cuda(emulated_cuda, monkeypatch):
    monkeypatch.setattr(emulated_cuda, "path", "two passes")
    return emulated_cuda


@pytest.fixture
def copied(cuda, monkeypatch):
    """The shapes of the tokens that have been copied."""
    shapes = []

    def aligned(x):
        if isinstance(x, torch.Tensor) and x.dim() == 4:
            shapes.append(tuple(x.shape))
        return before(x)

    before = cuda._aligned
    monkeypatch.setattr(cuda, "_aligned", aligned)
    return shapes


def ends_at_page(x):
    """With memory behind it that may not be touched."""
    return guarded.like(x, end=True)


# ----------------------------------------------------------------------------------------------------------------- gram


def check_sums(cuda, k, q, mask=None):
    """k^T q is the map of a call without norms; the norms are those of one with norms."""
    B, H, _, D = q.shape
    one = torch.ones(H)
    stats = [cuda.xfa_forward(q, k, k, one, mask, Spec("query_key", norm, "identity"))[1] for norm in ("none", "token")]
    got = stats[0][..., : D * D].view(B, H, D, D), stats[1][..., -D:], stats[1][..., D * D : -D]
    expected = [reference.gram(a, b, token_mask=mask) for a, b in ((k, q), (k.double(), q.double()))]
    for name, x, eager, oracle in zip(("g", "norm of k", "norm of q"), got, *expected, strict=True):
        if name != "g":
            eager, oracle = eager.sqrt(), oracle.sqrt()
        assert_close(x, eager, oracle, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_sums(cuda, features, dtype):
    """Tokens that fill steps, and that do not; heads next to each other, as views of a projection."""
    for tokens in (1, 47, 600):
        k, q = randn(2, tokens, 2, 2, features, seed=tokens, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
        check_sums(cuda, ends_at_page(k), ends_at_page(q), random_mask(2, tokens) if tokens == 47 else None)


@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_many_tokens(cuda, dtype, masked):
    """Far from zero, where sums are large beside their terms."""
    k, q = (randn(1, 1, 5000, 48, seed=seed, dtype=torch.float64).add(3).to(dtype) for seed in (1, 2))
    check_sums(cuda, k, q, random_mask(1, 5000) if masked else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_sums_of_what_is_not_finite(cuda, value, dtype):
    k, q = (randn(1, 1, 70, 24, seed=seed, dtype=dtype) for seed in (1, 2))
    k[0, 0, 40, 3] = q[0, 0, 69, 23] = value
    check_sums(cuda, k, q)
    mask = torch.ones(1, 70, dtype=torch.bool)
    mask[0, [40, 69]] = False  # then nobody sees them
    k[0, 0, 7, 5] = value
    check_sums(cuda, k, q, mask)


# ------------------------------------------------------------------------------------------------------------------ mix


def check_products(cuda, x, weight):
    """x times any map (B, H, D, D): k picks the rows of q, which are those of the map."""
    B, H, N, D = x.shape
    k, q = torch.zeros(2, B, H, N, D, dtype=x.dtype).unbind(0)
    k[:, :, :D], q[:, :, :D] = torch.eye(D), weight
    spec = Spec("query_key", "none", "identity")
    out, _ = cuda.xfa_forward(q, k, x, torch.ones(H), None, spec)
    assert cuda._cuda.launched() == FORWARD
    assert_close(out.transpose(1, 2), *((x.to(t) @ weight.to(t)).to(t) for t in (x.dtype, torch.float64)), "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_products(cuda, features, dtype):
    weight = randn(2, 2, features, features, seed=9, dtype=dtype)
    for tokens in (features, 77, 600):
        x = randn(2, tokens, 2, features, seed=tokens, dtype=dtype).transpose(1, 2)
        check_products(cuda, ends_at_page(x), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_products_of_what_is_not_finite(cuda, value, dtype):
    x, weight = randn(1, 2, 70, 24, seed=1, dtype=dtype), randn(1, 2, 24, 24, seed=2, dtype=dtype)
    x[0, 0, 40, 3] = value
    check_products(cuda, x, weight)


def test_products_of_unlike_columns(cuda):
    """fp16 has five bits of exponent: columns of a map are scaled each by itself."""
    x = randn(1, 1, 40, 32, seed=1, dtype=torch.float16)
    check_products(cuda, x, (randn(1, 1, 32, 32, seed=2) * 2.0 ** torch.linspace(-20, 10, 32)).half())


# ------------------------------------------------------------------------------------------------------------------ xfa


CONFIGS = tuple(
    Config(map, norm, activation)
    for map, activation in (("query_key", "softmax"), ("query_key", "identity"), ("key_value", "softmax"))
    for norm in ("token", "none")
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((2, 196, 2, 48), (1, 700, 2, 32), (2, 40, 3, 16), (1, 131, 2, 64)), ids=str)
def test_xfa(cuda, monkeypatch, shape, dtype, config):
    """With a mask, tokens that are left out have no influence; the same bits in any order of threads, too."""
    masked = shape[0] == 2
    problem = make_problem(shape, config, dtype=dtype, masked=masked)
    if config.norm == "none":
        problem.temperature *= shape[1] ** -0.5
    results, *launched = problem.run_cuda(cuda)
    gram = "fragment_gram fragment_gram" if (config.map, config.norm) == ("key_value", "token") else "fragment_gram"
    forward, backward = FORWARD.replace("fragment_gram", gram), BACKWARD
    if config.norm == "none" or (dtype == torch.float32 and shape[3] == 64):
        backward = backward.replace("fragment_gradients", "fragment_mix fragment_mix fragment_mix")
    if masked:
        forward, backward = f"{forward} clear", backward.replace(" temperature", " clear temperature")
    assert launched == [forward, backward]
    problem.check(results)
    monkeypatch.setenv("XK_EMULATION_SEED", "1")
    for name, result in problem.run_cuda(cuda)[0].items():
        assert_bitwise(results[name], result, name)
    if masked:
        for x in (problem.q, problem.k, problem.v, problem.dout):
            x.masked_fill_(~problem.token_mask[:, None, :, None], float("nan"))
        for name, result in problem.run_cuda(cuda)[0].items():
            assert_bitwise(results[name], result, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens_are_zero_beside_a_map_of_nan(cuda, dtype):
    problem = make_problem((1, 40, 1, 24), dtype=dtype, masked=True)
    kept = problem.token_mask[0].nonzero()[0, 0]
    problem.q[0, 0, kept, 3] = problem.dout[0, 0, kept, 5] = float("nan")
    results, *_ = problem.run_cuda(cuda)
    for name in RESULTS[:4]:
        assert results[name].isnan().any(), name
        assert (results[name][:, :, ~problem.token_mask[0]] == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_xfa_of_many_tokens(cuda, dtype):
    """fp32 by tensor cores keeps the rule where sums are long."""
    problem = make_problem((1, 4096, 1, 48), dtype=dtype)
    results, *launched = problem.run_cuda(cuda)
    assert launched == [FORWARD, BACKWARD]
    problem.check(results)


# -------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("layout", "features"),
    (("packed", 40), ("token_major", 40), ("packed", 36), ("packed", 7), ("padded", 40), ("token_contiguous", 40)),
)
def test_what_is_not_aligned_is_copied(cuda, copied, layout, features, dtype):
    """And only that: views of a packed projection are read in place."""
    problem = make_problem((2, 47, 2, features), layout=layout, dtype=dtype)
    results, *launched = problem.run_cuda(cuda)
    assert launched == [FORWARD, BACKWARD]
    problem.check(results)
    in_place = layout in ("packed", "token_major") and features * dtype.itemsize % 16 == 0
    assert copied == [] if in_place else len(copied) == 7
    assert all(results[name].shape == problem.q.shape for name in RESULTS[:4])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_follows_a_token_is_not_read(cuda, copied, dtype):
    """The other columns of a wider tensor, whose strides are aligned; a single token; and one that is expanded."""
    for shape in ((2, 47, 2, 5), (1, 1, 1, 5)):
        problem = make_problem(shape, dtype=dtype, dout="per_feature")
        for name in ("q", "k", "v"):
            wide = torch.full((*getattr(problem, name).shape[:3], 8), float("nan"), dtype=dtype)
            wide[..., :5] = getattr(problem, name)
            setattr(problem, name, ends_at_page(wide)[..., :5])
        problem.dout = ends_at_page(problem.dout)
        results, *_ = problem.run_cuda(cuda)
        problem.check(results)
        assert len(copied) == 7
        copied.clear()


def test_copies_leave_strides_as_they_are(cuda):
    """Results are laid out as those of calls that copy nothing."""
    for features in (8, 7):
        problem = make_problem((2, 9, 3, features))
        inputs = (problem.q, problem.k, problem.v, problem.temperature)
        out, stats = cuda.xfa_forward(*inputs, None, Spec())
        dqkv, _ = cuda.xfa_backward(problem.dout, *inputs, stats, None, Spec())
        assert out.is_contiguous() and dqkv.is_contiguous()


def test_one_launch_copies_nothing(cuda, copied, monkeypatch):
    monkeypatch.setattr(cuda, "path", "any")
    problem = make_problem((2, 47, 2, 7), layout="padded")
    results, *launched = problem.run_cuda(cuda)
    assert launched == ["fused_forward", "fused_backward temperature"] and not copied
    problem.check(results)
