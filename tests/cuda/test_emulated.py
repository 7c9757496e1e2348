"""What only the emulated kernels can show: any order of threads gives the same bits, nothing beyond a tensor is
touched, other devices give results as good, and which kernels run."""

import shutil
from functools import partial

import emulated
import guarded
import pytest
import torch
from cases import CONFIGS, LOW_PRECISION, RESULTS, Config, Problem, make_problem, randn, random_mask

import xformer_kernels as xk
from xformer_kernels import reference
from xformer_kernels.backends import arguments, cuda_first
from xformer_kernels.backends.layouts import Results
from xformer_kernels.testing import assert_bitwise, assert_close

PATHS = ("one launch", "two passes")


@pytest.fixture(autouse=True)
def cuda(emulated_cuda, monkeypatch):
    monkeypatch.setattr(emulated_cuda, "path", "any")
    return emulated_cuda


def forward(cuda, problem):
    options = (problem.token_mask, problem.config.spec)
    out, stats = cuda.xfa_forward(problem.q, problem.k, problem.v, problem.temperature, *options)
    return out.transpose(1, 2), stats


def kernels(cuda, problem):
    """Those of forward and those of backward, which also are right."""
    options = (problem.token_mask, problem.config.spec)
    inputs = (problem.q, problem.k, problem.v, problem.temperature)
    out, stats = cuda.xfa_forward(*inputs, *options)
    first = cuda._cuda.launched()
    dqkv, dtemperature = cuda.xfa_backward(problem.dout, *inputs, stats, *options)
    second = cuda._cuda.launched()
    results = (out.transpose(1, 2), *dqkv.transpose(2, 3).unbind(0), dtemperature)
    problem.check(dict(zip(RESULTS, results, strict=True)))
    return first, second


def run(problem):
    return problem.run(partial(xk.xfa, backend="cuda"))


# ---------------------------------------------------------------------------------------------------- orders of threads


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("path", "config"),
    # norms over features take two passes
    [
        (path, config)
        for path in PATHS
        for config in (*CONFIGS, Config("query_key", "none"), Config("key_value", "none"))
        if path == "two passes" or config.norm != "feature"
    ],
    ids=str,
)
def test_same_bits_in_any_order(cuda, monkeypatch, path, config, dtype):
    monkeypatch.setattr(cuda, "path", path)
    for shape, masked in (((1, 150, 1, 36), True), ((2, 21, 2, 5), False)):
        problem = make_problem(shape, config, dtype=dtype, masked=masked)
        if config.norm == "none":
            problem.temperature *= shape[1] ** -0.5
        first = run(problem)
        problem.check(first)
        for seed in (1, 2, 3):
            monkeypatch.setenv("XK_EMULATION_SEED", str(seed))
            for name, result in run(problem).items():
                assert_bitwise(first[name], result, name)
        monkeypatch.delenv("XK_EMULATION_SEED")


# --------------------------------------------------------------------------------------------------- beyond the tensors


@pytest.fixture(params=(False, True), ids=("begin", "end"))
def at_page(request, cuda, monkeypatch):
    """Places a tensor next to memory that may not be touched, as all results and workspaces are from then on."""

    def empty(device, size, dtype):
        count = torch.Size(size).numel()
        return guarded.empty(count, dtype, request.param).view(size) if count else torch.empty(size, dtype=dtype)

    monkeypatch.setattr(cuda, "_empty", empty)
    return partial(guarded.like, end=request.param)


@pytest.mark.parametrize("shape", ((2, 21, 2, 5), (1, 150, 1, 36), (1, 47, 2, 33)), ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("token_major", "padded", "token_contiguous"))
def test_xfa_stays_within_its_tensors(cuda, monkeypatch, at_page, layout, dtype, path, shape):
    monkeypatch.setattr(cuda, "path", path)
    problem = make_problem(shape, Config(CONFIGS[shape[2] % 2 * 4].map), dtype=dtype, layout=layout, masked=True)
    for name in ("q", "k", "v", "dout", "temperature", "token_mask"):
        setattr(problem, name, at_page(getattr(problem, name)))
    problem.check(run(problem))


@pytest.mark.parametrize("map", ("query_key", "key_value"))
def test_norms_over_features_stay_within_their_tensors(at_page, map):
    problem = make_problem((2, 21, 2, 33), Config(map, "feature"), layout="padded", masked=True)
    for name in ("q", "k", "v", "dout", "temperature", "token_mask"):
        setattr(problem, name, at_page(getattr(problem, name)))
    problem.check(run(problem))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("features", ((5, 9), (33, 70), (64, 64)), ids=str)
def test_primitives_stay_within_their_tensors(at_page, features, dtype):
    a, b = (at_page(randn(2, 2, 45, D, seed=D, dtype=dtype)) for D in features)
    mask = at_page(random_mask(2, 45))
    result = xk.gram(a, b, token_mask=mask, backend="cuda")
    eager, oracle = (reference.gram(x, y, token_mask=mask) for x, y in ((a, b), (a.double(), b.double())))
    for got, other, exact in zip(result, eager, oracle, strict=True):
        assert_close(got, other, exact, "gram")

    I, O = features  # noqa: E741
    wanted = {"weight": (2, 2, O, I), "bias": (2, 2, O), "add": (2, 2, 45, O), "add_scale": (2, 2, O)}
    wanted |= {"x2": (2, 2, 45, I), "weight2": (2, 2, O, I)}
    t = {name: at_page(randn(*size, seed=i, dtype=dtype)) for i, (name, size) in enumerate(wanted.items())}
    y = xk.channel_mix(a, **t, backend="cuda")
    exact = reference.channel_mix(a.double(), **{name: x.double() for name, x in t.items()})
    assert_close(y, reference.channel_mix(a, **t), exact, "channel_mix")


def test_what_lies_beyond_is_reported(cuda, at_page):
    """That the tests above would fail; and an error of a launch names the kernel, the runtime's error and its text."""
    a = at_page(randn(1, 1, 21, 5, seed=0))
    results = Results(partial(cuda._empty, a.device), keeps_layout=False)
    call, _ = arguments.gram(results=results, a=a, b=a, symmetric=False, token_mask=None)
    assert call.count(a.data_ptr()) == 2
    for step in (-1, 1):
        moved = tuple(a.data_ptr() + 4096 * step if x == a.data_ptr() else x for x in call)
        text = r"_cuda: gram: cudaErrorLaunchFailure: block \(0, 0, 0\) thread \d+: illegal access to address 0x"
        with pytest.raises(RuntimeError, match=text):
            cuda._cuda.gram(*moved, 0, 0, None, False, 0)
    cuda._cuda.gram(*call, 0, 0, None, False, 0)  # and nothing is left of it


# ----------------------------------------------------------------------------------------------------- kernels that run

FUSED = ("fused_forward", "fused_backward temperature")
TWO_PASSES = ("gram map_forward mix", "gram map_backward mix temperature")
FRAGMENTS = (
    "fragment_gram map_forward fragment_mix",
    "fragment_gram map_backward fragment_gradients temperature",
)


@pytest.mark.parametrize(
    ("shape", "config", "dtype", "expected"),
    (
        ((1, 1, 1, 1), Config(), torch.float32, FUSED),
        ((2, 64, 2, 48), Config(), torch.float32, FUSED),
        ((2, 64, 2, 48), Config("key_value"), torch.bfloat16, FUSED),
        ((1, 300, 1, 128), Config(activation="identity"), torch.float16, (FUSED[0], TWO_PASSES[1])),
        ((1, 21, 1, 65), Config(), torch.float32, TWO_PASSES),
        ((1, 64, 1, 129), Config(), torch.float32, TWO_PASSES),
        (
            (1, 64, 1, 24),
            Config(norm="feature"),
            torch.float32,
            ("gram map_forward fragment_mix", "fragment_gram map_backward mix temperature"),
        ),
        ((1, 64, 1, 24), Config(), torch.float64, TWO_PASSES),
        ((1, 9000, 1, 48), Config(), torch.float32, FRAGMENTS),
    ),
    ids=str,
)
def test_which_kernels_run(cuda, shape, config, dtype, expected):
    assert kernels(cuda, make_problem(shape, config, dtype=dtype)) == expected


def test_paths(cuda, monkeypatch):
    """A path that is asked for is taken, or refused in words."""
    problem = make_problem((1, 21, 1, 24))
    monkeypatch.setattr(cuda, "path", "two passes")
    assert kernels(cuda, problem) == FRAGMENTS
    monkeypatch.setattr(cuda, "path", "one launch")
    assert kernels(cuda, problem) == FUSED
    for shape, config in (((1, 21, 1, 130), Config()), ((1, 21, 1, 24), Config(norm="feature"))):
        with pytest.raises(RuntimeError, match=f"one launch cannot hold 21 tokens of {shape[3]} features"):
            forward(cuda, make_problem(shape, config))
    # numbers of tiles that 32 bits do not count
    one = make_problem((1, 1, 1, 1), dtype=torch.bfloat16)
    q, k, v, dout = (x.expand(1, 1, 2**25, 1) for x in (one.q, one.k, one.v, one.dout))
    with pytest.raises(RuntimeError, match="one launch cannot hold 33554432 tokens of 1 features"):
        forward(cuda, Problem(q, k, v, one.temperature, dout))


# -------------------------------------------------------------------------------------------------------- other devices


@pytest.fixture
def on_device(cuda, monkeypatch, tmp_path):
    """``on_device(capability)``: a module of its own, since one remembers the devices it has seen."""

    def choose(capability):
        monkeypatch.setenv("XK_EMULATION_DEVICE", capability)
        copy = shutil.copy(cuda._cuda.__file__, tmp_path)
        monkeypatch.setattr(cuda, "_cuda", emulated.module_at(copy, f"{tmp_path.name}._cuda"))

    return choose


@pytest.mark.parametrize("capability", ("8.0", "12.0"))
def test_other_devices(cuda, on_device, capability):
    """Without clusters; and with 99 KiB of shared memory, where tiles of four operands do not fit beside each other."""
    on_device(capability)
    assert kernels(cuda, make_problem((2, 21, 2, 8))) == FUSED
    # for a cluster, or two passes
    assert kernels(cuda, make_problem((1, 330, 1, 30))) == (FUSED if capability == "12.0" else TWO_PASSES)
    for shape in ((2, 21, 2, 8), (1, 330, 1, 60), (1, 40, 1, 130), (1, 20, 1, 256)):
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float64 or shape[3] > 128:
                config = Config("key_value") if shape[3] == 130 else Config()
                mixes = "mix mix mix" if shape[3] == 130 and capability == "12.0" else "mix"
                expected = (TWO_PASSES[0], TWO_PASSES[1].replace("mix", mixes))
                assert kernels(cuda, make_problem(shape, config, dtype=dtype, masked=True)) == expected


@pytest.mark.parametrize("rule", cuda_first.CUDA_FIRST, ids=str)
def test_what_auto_takes_is_one_launch(cuda, on_device, rule):
    """At the bounds of the table, forward and backward fit into the shared memory of the devices it is for."""
    on_device(f"{rule.first // 10}.{rule.first % 10}")
    for dtype in (torch.float32, torch.bfloat16):
        for features in {1, 32, rule.features}:
            tokens = rule.head_bytes // (cuda_first.padded(features) * dtype.itemsize)
            assert cuda_first.cuda_first(rule.first, 1, tokens, features, dtype.itemsize)
            assert not cuda_first.cuda_first(rule.first, 1, tokens + 1, features, dtype.itemsize)
            assert kernels(cuda, make_problem((1, tokens, 1, features), dtype=dtype)) == FUSED, (dtype, features)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("path", "temperature_dtype"),
    # tokens are promoted to the float64 of a temperature, which takes two passes
    [(path, dtype) for path in PATHS for dtype in LOW_PRECISION] + [("two passes", torch.float64)],
    ids=str,
)
def test_temperature_of_another_dtype(cuda, monkeypatch, path, temperature_dtype):
    monkeypatch.setattr(cuda, "path", path)
    problem = make_problem((2, 21, 3, 8), temperature_dtype=temperature_dtype)
    problem.check(run(problem))


@pytest.mark.parametrize(
    ("path", "dim"), [(path, dim) for path in PATHS for dim in (24, 48, 100, 130) if path == "two passes" or dim <= 64]
)
def test_tf32(cuda, monkeypatch, path, dim):
    """Where torch allows it products are cut to tf32: other results, of that precision."""
    monkeypatch.setattr(cuda, "path", path)
    problem = make_problem((1, 70, 1, dim), Config(activation="identity"))
    exactly, oracle = run(problem), problem.oracle()
    monkeypatch.setattr(cuda, "tf32_allowed", lambda: True)
    for name, result in run(problem).items():
        assert not torch.equal(result, exactly[name]), name
        error = (result.double() - oracle[name]).norm() / oracle[name].norm()
        assert error <= 3e-3, f"{name}: {error:.1e}"


def test_tf32_is_kept_from_norms(cuda, monkeypatch):
    """On the diagonal of a symmetric Gram matrix are squares of norms."""
    a, b = (randn(1, 2, 70, 24, seed=seed) for seed in (1, 2))
    exactly = [cuda.gram(a, x, x is a, None) for x in (a, b)]
    monkeypatch.setattr(cuda, "tf32_allowed", lambda: True)
    of_itself, of_both = (cuda.gram(a, x, x is a, None) for x in (a, b))
    assert_bitwise(of_itself[0], exactly[0][0], "x^T x")
    assert not torch.equal(of_both[0], exactly[1][0])
    for got, expected in zip(of_both[1:], exactly[1][1:], strict=True):
        assert (got / expected - 1).abs().max() < 1e-6  # of another kernel, which adds in another order
    assert "products of float32 are cut to tf32" in str(xk.explain(a, a, a, torch.ones(2), backend="cuda"))
