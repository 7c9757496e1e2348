"""What only a GPU can show: graphs, streams, devices, races, waits, large offsets, memory, compilations, tf32.

Results and gradients on cuda are compared with the reference by the common tests, which run there by the `device`
fixture.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from cases import RESULTS, Problem, make_problem, randn

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]

MB = 2**20
# The forward is one launch where (b, h) alone fill the machine, else two passes.
ONE_LAUNCH, TWO_LAUNCHES = (64, 196, 8, 48), (1, 20000, 2, 32)
SHAPES = (ONE_LAUNCH, TWO_LAUNCHES)
DTYPES = (torch.float32, torch.bfloat16)


asked = ""


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def gpu_backend(request, need_backend):
    """The backend that the functions below ask for."""
    global asked
    asked = request.param
    need_backend(asked)
    return asked


@pytest.fixture
def only_triton(gpu_backend):
    if gpu_backend != "triton":
        pytest.skip("compilations and their names, gram and channel_mix, and tf32 are Triton's")


def xfa(*args, **kwargs):
    return xk.xfa(*args, **kwargs, backend=asked)


def make(shape, dtype=torch.float32, seed=0, device="cuda") -> Problem:
    return make_problem(shape, dtype=dtype, seed=seed, device=device)


def assert_same_bits(result, expected, when):
    for name in RESULTS:
        assert_bitwise(result[name], expected[name], f"{name} {when}")


def jitted():
    """Every kernel that the ops launch."""
    import triton

    from xformer_kernels.backends.triton import ops

    return [x for x in vars(ops).values() if isinstance(x, triton.JITFunction)]


@contextmanager
def launches():
    """The names of the kernels that are launched within it, in order."""
    seen = []
    hooks = [(kernel, lambda *_, name=kernel.fn.__name__, **__: seen.append(name)) for kernel in jitted()]
    for kernel, hook in hooks:
        kernel.add_pre_run_hook(hook)
    try:
        yield seen
    finally:
        for kernel, hook in hooks:
            kernel.pre_run_hooks.remove(hook)


@pytest.mark.parametrize(("shape", "count"), [(ONE_LAUNCH, 1), (TWO_LAUNCHES, 2)], ids=str)
def test_shapes_take_the_paths_that_they_stand_for(shape, count, gpu_backend):
    p = make(shape)
    if gpu_backend == "cuda":
        from xformer_kernels.backends.cuda import _cuda

        xfa(p.q, p.k, p.v, p.temperature)
        names = _cuda.launched().split()
        two_passes = ["fragment_gram", "map_forward", "fragment_mix"]
        assert names == (["fused_forward"] if count == 1 else two_passes)
        return
    with launches() as seen:
        xfa(p.q, p.k, p.v, p.temperature)
    assert len(seen) == count, seen


def test_clusters_take_what_one_block_cannot(gpu_backend):
    """Distributed shared memory, of 8 blocks, and of 16 where the device has so many free side by side."""
    if gpu_backend != "cuda":
        pytest.skip("Triton has no clusters")
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs clusters with the shared memory of sm_90 or sm_100")
    from xformer_kernels.backends.cuda import _cuda

    eight = (((1, 4096, 4, 32), torch.bfloat16), ((1, 4096, 4, 64), torch.bfloat16), ((2, 1000, 3, 50), torch.float32))
    sixteen = ((1, 6400, 2, 64), torch.float16)
    for shape, dtype in (*eight, sixteen):
        p = make(shape, dtype)
        p.check(p.run(xfa))
        xfa(p.q, p.k, p.v, p.temperature)
        or_else = ("fragment_gram map_forward fragment_mix",) if (shape, dtype) == sixteen else ()
        assert _cuda.launched() in ("fused_forward", *or_else), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_graph_replays_eager_bits(shape, dtype):
    """Captured once, forward and backward; replayed with other numbers in the same places."""
    p = make(shape, dtype)
    inputs = p.inputs()

    def step():
        out = xfa(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, p.dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2, 3):
        fresh = make(shape, dtype, seed)
        with torch.no_grad():
            for old, new in zip((*inputs, p.dout), (*fresh.inputs(), fresh.dout), strict=True):
                old.copy_(new)
        graph.replay()
        expected = fresh.run(xfa)
        assert_same_bits(dict(zip(RESULTS, captured, strict=True)), expected, f"of replay {seed}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_side_stream_gives_the_same_bits(shape):
    """Inputs are written on that stream just before: a launch on another one would read NaN."""
    p, late = make(shape), make(shape)
    expected = p.run(xfa)
    for x in (late.q, late.k, late.v, late.dout):
        x.fill_(float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name in ("q", "k", "v", "dout"):
            getattr(late, name).copy_(getattr(p, name))
        result = late.run(xfa)
    stream.synchronize()
    assert_same_bits(result, expected, "on a side stream")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_decide_the_device():
    here, there = (make(TWO_LAUNCHES, device=f"cuda:{i}") for i in range(2))
    with torch.cuda.device(0):
        result = there.run(xfa)
    assert all(x.device == torch.device("cuda:1") for x in result.values())
    there.check(result)
    here.check(here.run(xfa))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_hundred_runs_give_the_same_bits(shape, dtype):
    p = make(shape, dtype)
    expected = p.run(xfa)
    for i in range(100):
        assert_same_bits(p.run(xfa), expected, f"of run {i}")


def test_a_hundred_runs_of_the_primitives_give_the_same_bits(only_triton):
    a, b = (randn(1, 2, 20000, d, seed=d, device="cuda") for d in (24, 40))
    weight = randn(1, 2, 40, 24, seed=3, device="cuda")

    def run():
        mixed = xk.channel_mix(a, weight, add=b, backend=asked)
        return *xk.gram(a, b, backend=asked), xk.gram(b, b, symmetric=True, backend=asked)[0], mixed

    expected = run()
    for _ in range(100):
        for i, x in enumerate(run()):
            assert_bitwise(x, expected[i], f"result {i}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_waits_for_the_gpu(shape):
    p = make(shape)
    inputs = p.inputs()
    p.run(xfa)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(xfa(*inputs), inputs, p.dout)
        G, ssq, _ = xk.gram(p.q, p.k, backend=asked)
        xk.channel_mix(p.v, G, bias=ssq, backend=asked)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "each"),
    [
        ((1, 200_000, 2, 48), 1),
        ((4, 30_000, 4, 32), 1),
        ((64, 1024, 8, 48), 1),
        # partial maps of 256 KB: more parts are not worth their memory, see plan.split_tokens
        ((2, 20_000, 2, 256), 5),
    ],
    ids=str,
)
def test_peak_memory(shape, each, dtype):
    """The results, `each` MB per (b, h), and a little for the rounding of the allocator."""
    p = make(shape, dtype)
    inputs = p.inputs()
    p.run(xfa)
    B, N, H, D = shape
    one = B * N * H * D * dtype.itemsize
    allowed = (B * H * each + 4) * MB

    def start() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    before = start()
    out = xfa(*inputs)
    forward = torch.cuda.max_memory_allocated() - before
    before = start()
    grads = torch.autograd.grad(out, inputs, p.dout)
    backward = torch.cuda.max_memory_allocated() - before
    assert len(grads) == 4
    assert forward <= one + allowed, f"{(forward - one) / MB:.1f} MB beside the output"
    assert backward <= 3 * one + allowed, f"{(backward - 3 * one) / MB:.1f} MB beside the gradients"


def test_lengths_batches_and_heads_do_not_recompile(only_triton):
    """An eps of its own makes this test's variants new ones; both paths compile at the first shapes, then nothing."""
    from triton import knobs

    compiled = []

    def hook(*, fn, **_):
        compiled.append(fn.name)

    def run(shape):
        p = make(shape)
        inputs = p.inputs()
        torch.autograd.grad(xfa(*inputs, eps=1.25e-11), inputs, p.dout)

    before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, hook
    try:
        run((64, 196, 8, 32))
        run((1, 20000, 2, 32))
        first, compiled[:] = list(compiled), []
        for shape in ((1, 1, 1, 32), (1, 16, 1, 32), (3, 77, 5, 32), (128, 1, 16, 32), (2, 30011, 1, 32)):
            run(shape)
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert first, "the hook saw nothing compiled"
    assert not compiled, f"compiled anew: {compiled}"


@pytest.fixture
def tf32():
    """``tf32(True)`` allows it for matrix products, until the test ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32

    def allow(value):
        matmul.allow_tf32 = value

    yield allow
    allow(before)


def test_tf32_is_taken_where_it_is_allowed(tf32, only_triton):
    p = make((2, 5000, 4, 64), seed=1)
    tf32(False)
    exact = p.run(xfa)
    p.check(exact)
    tf32(True)
    result = p.run(xfa)
    for name in RESULTS[:-1]:
        error = ((result[name] - exact[name]).norm() / exact[name].norm()).item()
        assert 0 < error <= 3e-3, f"{name}: relative error {error:.1e}"


@pytest.mark.xdist_group("half of the memory")
class TestBeyond31Bits:
    """One (b, h) of more than 2^31 numbers, against float64 in chunks: sums in full, gradients at a few tokens."""

    N, D = 2**25 + 5000, 64
    CHUNK = 2**20
    # about the token where the offset of the first feature needs 31, and then 32 bits
    ROWS = (0, 1, 2**24 - 1, 2**24, 2**25 - 1, 2**25, 2**25 + 1, N - 1)

    def random(self, seed: int, *, like: torch.Tensor | None = None) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(1, 1, self.N, self.D, dtype=torch.bfloat16, device="cuda", generator=generator)
        return x if like is None else x.add_(like)

    def sums(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """a^T b of every pair in float64."""
        totals = [torch.zeros(self.D, self.D, dtype=torch.float64, device="cuda") for _ in pairs]
        for first in range(0, self.N, self.CHUNK):
            for total, pair in zip(totals, pairs, strict=True):
                a, b = (x[0, 0, first : first + self.CHUNK].double() for x in pair)
                total += a.T @ b
        return totals

    @pytest.fixture
    def memory(self):
        needed = 44 * 2**30
        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, there are {free >> 30}")
        yield
        torch.cuda.empty_cache()

    def test_xfa(self, memory):
        """Correlated inputs, so that no map is close to uniform."""
        k = self.random(0)
        q = self.random(1, like=k)
        v = self.random(2, like=k)
        dout = self.random(3, like=v)
        t = torch.full((1,), 3.0, device="cuda")
        rows = torch.tensor(self.ROWS, device="cuda")
        leaves = [x.requires_grad_() for x in (q, k, v, t)]
        out = xfa(*leaves)
        *grads, dt = torch.autograd.grad(out, leaves, dout)
        result = dict(zip(RESULTS, (x[0, 0, rows].detach() for x in (out, *grads)), strict=False))
        del out, grads

        q, k, v = (x.detach() for x in (q, k, v))
        qk, qq, kk, dA = self.sums((q, k), (q, q), (k, k), (dout, v))
        norm_q, norm_k = qq.diagonal().sqrt(), kk.diagonal().sqrt()
        cos = qk / norm_q[:, None] / norm_k[None, :]
        A = (3 * cos).softmax(-1)
        dS = A * (dA - (A * dA).sum(-1, keepdim=True))
        dcos = 3 * dS
        q, k, v, dout = (x[0, 0, rows].double() for x in (q, k, v, dout))
        unit_q, unit_k = q / norm_q, k / norm_k
        terms = {"dq": unit_k @ dcos.T / norm_q, "dk": unit_q @ dcos / norm_k}
        expected = {
            "out": v @ A.T,
            "dq": terms["dq"] - unit_q * (dcos * cos).sum(1) / norm_q,
            "dk": terms["dk"] - unit_k * (dcos * cos).sum(0) / norm_k,
            "dv": dout @ A,
        }
        for name, exact in expected.items():
            assert_close(result[name], exact.to(torch.bfloat16), exact, name, terms.get(name))
        error = (dt - (dS * cos).sum()).abs() / (dS * cos).square().sum().sqrt()
        assert error <= 1e-3, f"dtemperature: relative error {error.item():.1e}"

    def test_primitives(self, memory, only_triton):
        a = self.random(0)
        b = self.random(1, like=a)
        exact, squares, other = self.sums((a, b), (a, a), (b, b))
        G, ssq_a, ssq_b = (x[0, 0] for x in xk.gram(a, b, backend=asked))
        for name, x, y in (("G", G, exact), ("a", ssq_a, squares.diagonal()), ("b", ssq_b, other.diagonal())):
            error = ((x - y).abs().max() / y.abs().max()).item()
            assert error <= 1e-4, f"{name}: relative error {error:.1e}"
        weight = randn(1, 1, self.D, self.D, seed=2, device="cuda")
        rows = torch.tensor(self.ROWS, device="cuda")
        y = xk.channel_mix(a, weight, add=b, backend=asked)[0, 0, rows]
        exact = a[0, 0, rows].double() @ weight[0, 0].double().T + b[0, 0, rows].double()
        assert_close(y, exact.to(torch.bfloat16), exact, "y")
