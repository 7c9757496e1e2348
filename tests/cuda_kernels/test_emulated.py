"""What only the emulated kernels can show: any order of threads gives the same bits, nothing beyond a tensor is
touched, other devices give results as good, and which kernels run."""

import shutil
from functools import partial

import emulated
import guarded
import pytest
import torch
from cases import LOW_PRECISION, Config, Problem, make_problem

import xformer_kernels as xk
from xformer_kernels.backends import arguments, cuda_first
from xformer_kernels.backends.layouts import Results
from xformer_kernels.testing import assert_bitwise

PATHS = ("one launch", "two passes")
CONFIGS = tuple(
    Config(map, norm, activation)
    for map, activation in (("query_key", "softmax"), ("query_key", "identity"), ("key_value", "softmax"))
    for norm in ("token", "none")
)


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
    results, *launched = problem.run_cuda(cuda)
    problem.check(results)
    return tuple(launched)


def run(problem):
    return problem.run(partial(xk.xfa, backend="cuda"))


# ---------------------------------------------------------------------------------------------------- orders of threads


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("path", PATHS)
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
    problem = make_problem(
        shape, Config("key_value" if shape[2] == 1 else "query_key"), dtype=dtype, layout=layout, masked=True
    )
    for name in ("q", "k", "v", "dout", "temperature", "token_mask"):
        setattr(problem, name, at_page(getattr(problem, name)))
    problem.check(run(problem))


def test_what_lies_beyond_is_reported(cuda, at_page):
    """That the test above would fail; and an error of a launch names the kernel, the runtime's error and its text."""
    problem = make_problem((1, 21, 1, 5), layout="contiguous")
    q, k, v = (at_page(x) for x in (problem.q, problem.k, problem.v))
    results = Results(partial(cuda._empty, q.device), keeps_layout=False)
    call, _ = arguments.xfa_forward(results, q, k, v, problem.temperature, None, problem.config.spec)
    assert call.count(q.data_ptr()) == 1
    for step in (-1, 1):
        moved = tuple(q.data_ptr() + 4096 * step if x == q.data_ptr() else x for x in call)
        text = (
            r"_cuda: fused_forward: cudaErrorLaunchFailure: block \(0, 0, 0\) thread \d+: illegal access to address 0x"
        )
        with pytest.raises(RuntimeError, match=text):
            cuda._cuda.xfa_forward(*moved, 0, 0, None, 0, False)
    assert cuda._cuda.xfa_forward(*call, 0, 0, None, 0, False)  # and nothing is left of it


# ----------------------------------------------------------------------------------------------------- kernels that run

FUSED = ("fused_forward", "fused_backward temperature")
TWO_PASSES = (
    "fragment_gram map_forward fragment_mix",
    "fragment_gram map_backward fragment_gradients temperature",
)


@pytest.mark.parametrize(
    ("shape", "config", "dtype", "expected"),
    (
        ((1, 1, 1, 1), Config(), torch.float32, FUSED),
        ((2, 64, 2, 48), Config(), torch.float32, FUSED),
        ((2, 64, 2, 48), Config("key_value"), torch.bfloat16, FUSED),
        ((1, 300, 1, 64), Config(activation="identity"), torch.float16, FUSED),
        ((1, 9000, 1, 48), Config(), torch.float32, TWO_PASSES),
        ((1, 0, 1, 48), Config(), torch.float32, TWO_PASSES),
    ),
    ids=str,
)
def test_which_kernels_run(cuda, shape, config, dtype, expected):
    assert kernels(cuda, make_problem(shape, config, dtype=dtype)) == expected


def test_paths(cuda, monkeypatch):
    """A path that is asked for is taken, or refused in words."""
    problem = make_problem((1, 21, 1, 24))
    monkeypatch.setattr(cuda, "path", "two passes")
    assert kernels(cuda, problem) == TWO_PASSES
    monkeypatch.setattr(cuda, "path", "one launch")
    assert kernels(cuda, problem) == FUSED
    with pytest.raises(RuntimeError, match="one launch cannot hold 9000 tokens of 64 features"):
        forward(cuda, make_problem((1, 9000, 1, 64)))
    # numbers of tiles that 32 bits do not count
    one = make_problem((1, 1, 1, 1), dtype=torch.bfloat16)
    q, k, v, dout = (x.expand(1, 1, 2**25, 1) for x in (one.q, one.k, one.v, one.dout))
    with pytest.raises(RuntimeError, match="one launch cannot hold 33554432 tokens of 1 features"):
        forward(cuda, Problem(q, k, v, one.temperature, dout))


REFUSED = {
    "float64": (lambda q: xk.xfa(q.double(), q.double(), q.double(), torch.ones(2)), "do not take float64"),
    "temperature": (lambda q: xk.xfa(q, q, q, torch.ones(2).double()), "do not take float64"),
    "features": (lambda q: xk.xfa(*[q.repeat(1, 1, 1, 9)] * 3, torch.ones(2)), "72 features per head, .* 1 to 64"),
    "norm": (lambda q: xk.xfa(q, q, q, torch.ones(2), norm="feature"), 'no gram .* which norm="feature" needs'),
    "map_fn": (lambda q: xk.xfa(q, q, q, torch.ones(2), map_fn=torch.sin), "no gram .* which this call needs"),
    "dropout": (lambda q: xk.xfa(q, q, q, torch.ones(2), dropout_p=0.1), "no gram .* which this call needs"),
    "gram": (lambda q: xk.gram(q, q), "no gram and channel_mix, which this call needs"),
    "channel_mix": (lambda q: xk.channel_mix(q, torch.ones(8, 8)), "no gram and channel_mix"),
    "linear_attention": (lambda q: xk.linear_attention(q, q, q), "no gram and channel_mix"),
    "layer": (lambda q: xk.XFA(8, 2, form="gram")(q[:, 0]), "no gram and channel_mix"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(cuda, monkeypatch, what):
    """By name, with the reason; under auto another backend serves it."""
    call, reason = REFUSED[what]
    q = make_problem((2, 9, 2, 8)).q
    call(q)
    monkeypatch.setenv("XFORMER_KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=rf"backend XFORMER_KERNELS_BACKEND=cuda cannot serve .*\n- .*{reason}"):
        call(q)


def test_the_library_refuses_what_it_has_no_kernels_for(cuda):
    for problem, reason in (
        (make_problem((1, 9, 1, 65)), "65 features, the kernels take 1 to 64"),
        (make_problem((1, 9, 1, 8), Config(norm="feature")), "no norms over features"),
        (make_problem((1, 9, 1, 8), dtype=torch.float64), "no kernels of the dtype"),
        (make_problem((1, 9, 1, 8), temperature_dtype=torch.float64), "no float64 temperature"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            forward(cuda, problem)


def test_layers_take_the_direct_form(cuda):
    x = make_problem((2, 50, 1, 24)).q[:, 0]
    layer = xk.XFA(24, 3, backend="cuda")
    explained = xk.explain_layer(x, *layer.weights(), backend="cuda")
    assert (explained.form, explained.backend.backend) == ("direct", "cuda")
    layer(x).sum().backward()
    assert cuda._cuda.launched() == FUSED[1]


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
    """Without clusters; and with 99 KiB of shared memory a block."""
    on_device(capability)
    assert kernels(cuda, make_problem((2, 21, 2, 8))) == FUSED
    # for a cluster, or two passes
    assert kernels(cuda, make_problem((1, 330, 1, 30))) == (FUSED if capability == "12.0" else TWO_PASSES)
    assert kernels(cuda, make_problem((1, 2500, 1, 60), dtype=torch.bfloat16)) == TWO_PASSES


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


@pytest.mark.parametrize("temperature_dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_temperature_of_another_dtype(cuda, monkeypatch, path, temperature_dtype):
    monkeypatch.setattr(cuda, "path", path)
    problem = make_problem((2, 21, 3, 8), temperature_dtype=temperature_dtype)
    problem.check(run(problem))
