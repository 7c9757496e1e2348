"""Calls that the Triton backend serves, the reasons that it gives for others, and what its launches depend on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import CONFIGS, make_problem, packed, randn, random_mask

import xformer_kernels as xk
from bench import workloads
from xformer_kernels import dispatch

backend = pytest.importorskip("xformer_kernels.backends.triton", reason="triton is not installed")

from xformer_kernels.backends.triton import configs, launch, plan, table  # noqa: E402
from xformer_kernels.reference import accumulate_dtype  # noqa: E402
from xformer_kernels.testing import assert_bitwise, assert_close  # noqa: E402


def fresh(code: str, **environment: str) -> str:
    """The output of a new process, in which TRITON_INTERPRET is unset unless given."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env={**env, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ------------------------------------------------------------------------------------------------------------ reasons


def test_reasons_name_what_came_and_what_is_accepted(monkeypatch):
    f32 = (torch.float32,)
    monkeypatch.setattr(backend, "INTERPRETING", True)
    assert backend.unsupported("cpu", f32, (1, 256)) == []
    (reason,) = backend.unsupported("cuda", f32, (32,))
    assert "TRITON_INTERPRET" in reason and "cuda" in reason
    monkeypatch.setattr(backend, "INTERPRETING", False)
    (reason,) = backend.unsupported("cpu", f32, (32,))
    assert "cpu" in reason and "cuda" in reason and "TRITON_INTERPRET" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(backend.unsupported("cuda", f32, (32,)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert ["7.5" in reason and "8.0" in reason for reason in backend.unsupported("cuda", f32, (32,))] == [True]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backend.unsupported("cuda", f32, (32,)) == []
    reasons = backend.unsupported("cuda", (torch.float8_e4m3fn,), (0, 300))
    assert "0, 300" in str(reasons) and "256" in str(reasons) and "float8_e4m3fn" in str(reasons)


def test_every_reason_is_in_the_error_and_in_explain():
    p = make_problem((1, 9, 1, 300), layout="contiguous")
    with pytest.raises(RuntimeError, match="300 features per head"):
        xk.xfa(p.q, p.k, p.v, p.temperature, backend="triton")
    assert "300 features per head" in str(xk.explain(p.q, p.k, p.v, p.temperature))


WHY = """
    import warnings
    import torch, xformer_kernels as xk
    q = torch.ones(1, 1, 4, 3)
    xk.xfa(q, q, q, torch.ones(1))
    print(xk.explain(q, q, q, torch.ones(1)))
"""


def test_auto_never_takes_the_interpreter():
    """Automatic selection prefers even the reference to the interpreter, which is a thousand times slower."""
    code = "import sys; sys.modules['xformer_kernels._C'] = None\n" + textwrap.dedent(WHY)
    code = code.replace("import warnings", "import warnings; warnings.simplefilter('ignore')")
    text = fresh(code, TRITON_INTERPRET="1")
    assert text.startswith("reference serves") and "by name" in text


def test_triton_missing():
    text = fresh("import sys; sys.modules['triton'] = None\n" + textwrap.dedent(WHY))
    assert "triton is not installed" in text and "pip install" in text


def test_triton_too_old():
    text = fresh("import triton; triton.__version__ = '3.1.0'\n" + textwrap.dedent(WHY))
    assert "3.1.0 is too old" in text and "3.6" in text


def test_without_the_interpreter_cpu_tensors_are_refused_with_the_reason():
    text = fresh(WHY)
    assert "tensors are on cpu, the kernels run on cuda" in text


def test_calls_on_the_cpu_do_not_even_import_triton(need_backend):
    need_backend("cpp")
    code = """
        import sys, torch, xformer_kernels as xk
        q = torch.ones(1, 1, 4, 3)
        xk.xfa(q, q, q, torch.ones(1))
        print(any(name.startswith("xformer_kernels.backends.triton") for name in sys.modules))
    """
    assert fresh(code).strip() == "False"


# ------------------------------------------------------------------------------------- what launches may depend on

RECORDED = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch, aot
    from xformer_kernels.backends.triton import layer, linear, ops
    from xformer_kernels.spec import Spec

    linear_spec = Spec.of_linear_attention("softmax_tokens", True, 1.0, 1e-6)

    def variants(B, N, H, layout):
        shape = (B, N, 3, H, 32)
        qkv = torch.empty(shape, device="meta", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
        if layout == "contiguous":
            qkv = torch.empty((3, B, H, N, 32), device="meta", dtype=torch.bfloat16)
        q, k, v = qkv.unbind(0)
        t, spec = torch.empty(H, device="meta"), Spec()
        with aot.recording("sm_90") as recorded:
            out, stats = ops.xfa_forward(q, k, v, t, None, spec)
            ops.xfa_backward(out, q, k, v, t, stats, None, spec)
            tokens = (q[:, :, :99], k, v)
            out, stats = linear.linear_attention_forward(*tokens, None, None, linear_spec)
            linear.linear_attention_backward(out.transpose(1, 2), *tokens, stats, None, None, linear_spec)
            x, M = q[:, :1], torch.empty(B, 1, 32, 32, device="meta")
            layer.layer_gram(x, x, True, None, M[:, 0, 0], 1e-6)
            layer.layer_mix(x, M, M[:, :, 0], x, x, M.mT, M[:, 0, 0], 1e-6, True)
        return {{
            (x.kernel.__name__, tuple(sorted(aot.signature(x).items())), str(sorted(x.constants.items())), x.config)
            for x in recorded
        }}

    known = variants(1, 20000, 4, "packed")
    for B, N, H, layout in ((1, 20001, 4, "packed"), (3, 5000, 1, "packed"), (2, 2**33, 5, "packed"),
                            (7, 4097, 3, "contiguous")):
        assert variants(B, N, H, layout) == known, (B, N, H, layout)
    from xformer_kernels.backends.triton.kernels import backward, forward, gram, linear_backward, mix
    from xformer_kernels.backends.triton.kernels import layer as layer_kernels, linear as linear_kernels

    for kernel in (gram.gram_kernel, forward.apply_kernel, forward.forward_kernel, backward.map_backward_kernel,
                   backward.gradients_kernel, mix.channel_mix_kernel, linear_kernels.maxima_kernel,
                   linear_kernels.key_sums_kernel, linear_kernels.apply_sums_kernel,
                   linear_backward.query_gradients_kernel, linear_backward.key_gradients_kernel,
                   layer_kernels.layer_statistics_kernel, layer_kernels.layer_gram_kernel,
                   layer_kernels.layer_mix_kernel):
        for p in kernel.params:
            assert p.is_constexpr or (p.do_not_specialize and p.do_not_specialize_on_alignment), p.name
            assert p.is_constexpr or p.name.endswith("_ptr") or p.annotation_type == "i64", p.name
    print("one variant")
"""


def test_tokens_batches_heads_and_strides_compile_nothing_new():
    """Kernels, signatures, constexprs and configs are the same for every size (1, or beyond 2^31) and layout."""
    assert fresh(RECORDED.format(tests=str(Path(__file__).parent))).strip() == "one variant"


def test_alignment_is_what_all_rows_have():
    """ALIGN, on which the compiler relies, holds for every address that a kernel computes; 0: not contiguous."""

    def facts(*tensors):
        return list(launch.alignment(**dict(zip("abc", tensors, strict=False))).values())

    bf16 = [randn(2, 3, 8, 24, seed=i, dtype=torch.bfloat16) for i in range(3)]
    assert facts(*packed(*bf16)) == [8, 8, 8]
    assert facts(*packed(*(x.float() for x in bf16))) == [4, 4, 4]
    assert facts(*packed(*(x[..., :12].contiguous() for x in bf16))) == [4, 4, 4]
    assert facts(*packed(*(x[..., :9].contiguous() for x in bf16))) == [1, 1, 1]
    assert facts(bf16[0].transpose(2, 3)) == [0]
    assert facts(bf16[0][..., 2:10]) == [2]
    assert facts(bf16[0], bf16[1][..., 4:]) == [8, 4]
    expanded = bf16[0][:1, :1, :1].expand(2, 3, 8, 24)
    assert facts(expanded, bf16[0][..., :1].expand(2, 3, 8, 24), None) == [8, 0, 0]


BY_NUMBER = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch, aot
    from xformer_kernels.backends.triton import ops
    from xformer_kernels.spec import Spec

    def facts(function, *args):
        with aot.recording("sm_90") as recorded:
            function(*args)
        constants = [launched.constants.items() for launched in recorded]
        return [{{name[6:]: x for name, x in items if name[:6] == "ALIGN_"}} for items in constants]

    q, k, v = torch.empty(2, 5000, 3, 4, 32, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
    ones = torch.ones((), device="meta").expand(q.shape)  # the gradient of a sum
    t, W = torch.empty(4, device="meta"), torch.empty(2, 4, 32, 32, device="meta")
    for map in ("query_key", "key_value"):
        spec = Spec(map)
        with aot.recording("sm_90"):
            _, stats = ops.xfa_forward(q, k, v, t, None, spec)
        gram, gradients = (x for x in facts(ops.xfa_backward, ones, q, k, v, t, stats, None, spec) if x)
        assert gram == {{"A": 4, "B": 0, "C": 4}}, gram
        assert gradients == {{"Q": 4, "K": 4, "V": 4, "G": 0}}, gradients
    for gram in (facts(ops.gram, ones, q, False, None), facts(ops.gram, q, ones, False, None)):
        assert sorted(gram[0].values()) == [0, 0, 4] or sorted(gram[0].values()) == [0, 4, 4], gram
    (mix,) = facts(ops.channel_mix, ones, W, None, ones, None, q, W)
    assert mix == {{"X": 0, "X2": 4, "ADD": 0}}, mix
    (mix,) = facts(ops.channel_mix, q, W, None, None, None, None, None)
    assert mix == {{"X": 4, "X2": 0, "ADD": 0}}, mix
    print("right")
"""


def test_only_what_lies_apart_is_loaded_number_by_number():
    """An operand with non-contiguous features, such as the gradient of a sum, leaves others their vector loads."""
    assert fresh(BY_NUMBER.format(tests=str(Path(__file__).parent))).strip() == "right"


def test_explain_says_how_products_and_loads_are_done(monkeypatch, triton_runs):
    p = make_problem((1, 9, 1, 8), layout="token_contiguous")

    def explained(dtype=torch.float32):
        p_ = p.to(dtype)
        return str(xk.explain(p_.q, p_.k.contiguous(), p_.v, p_.temperature, backend="triton"))

    assert "products of float32 are in float32" in explained()
    assert "q, v: features lie apart" in explained()
    assert "products" not in explained(torch.float64)
    monkeypatch.setattr(launch, "target", lambda device: launch.Target("sm_90", 132))
    monkeypatch.setattr(launch, "tf32_allowed", lambda: True)
    assert "products of float32 are cut to tf32" in explained()


@pytest.mark.parametrize("N", [0, 1, 255, 256, 257, 5000, 10**6, 2**33])
@pytest.mark.parametrize("units", [1, 8, 1000])
def test_split_covers_the_tokens(N, units):
    """Whole chunks cover all tokens, no part is empty, and partial results are small: parts^2 record <= 2 N row."""
    record, row = 4 * 32 * 32, 4 * 32
    parts, chunk, _ = plan.split_tokens(N, units, record, row, 132)
    assert parts >= 1 and parts * chunk >= N and (parts - 1) * chunk < max(N, 1)
    assert chunk % plan.CHUNK == 0
    assert parts == 1 or parts * parts * record <= 2 * N * row
    assert parts <= max(plan.PARTS, plan.cdiv(132, units))


@pytest.mark.parametrize("resident", range(1, 7))
@pytest.mark.parametrize("shape", workloads.OP_SHAPES["gpu"], ids=str)
def test_programs_fill_a_device(shape, resident):
    """Splits fill 132 multiprocessors with one to six programs each; under 1024 tokens, they are less fine."""
    slots, units = 132 * resident, shape.B * shape.H
    for size in (2, 4):
        row = shape.D * size
        maps = ((plan.split_sums, shape.D**2 * 4, row), (plan.split_tokens, 3 * shape.D**2 * size, 3 * row))
        for split, record, bytes_of_token in maps:
            parts, chunk, _ = split(shape.N, units, record, bytes_of_token, slots, 64)
            assert plan.busy(units * parts, slots) > (0.95 if shape.many else 0.77)
            assert shape.N / (parts * chunk) > 0.87  # the last chunk is nearly as long as the others


LINEAR = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch, aot
    from xformer_kernels.backends.triton import linear, ops, plan
    from xformer_kernels.spec import Spec

    for B, N, H, D in ((8, 16384, 8, 32), (16, 16384, 16, 16), (32, 16384, 8, 32)):
        q, k, v, dout = (torch.empty(B, H, N, D, dtype=torch.bfloat16, device="meta") for _ in range(4))
        for feature_map in ("relu", "softmax_tokens"):
            spec = Spec.of_linear_attention(feature_map, True, 1.0, 1e-6)
            for resident in range(1, 7):
                with aot.recording("sm_90"):
                    asked, grids = [], []
                    ops._slots = lambda device, kernel, *_, **__: (asked.append(kernel), 132 * resident)[1]
                    ops._run = lambda kernel, grid, *_, **__: grids.append((kernel, grid))
                    _, stats = linear.linear_attention_forward(q, k, v, None, None, spec)
                    linear.linear_attention_backward(dout, q, k, v, stats, None, None, spec)
                assert asked == [kernel for kernel, _ in grids] and len(asked) == 4 + (feature_map != "relu")
                for kernel, grid in grids:
                    assert plan.busy(grid, 132 * resident) >= 0.95, (kernel, B, N, H, D, resident, grid)
    print("busy")
"""


def test_programs_of_linear_attention_fill_a_device():
    """Each launch has as many programs as its compiled kernel lets run at the same time, or a multiple of them."""
    assert fresh(LINEAR.format(tests=str(Path(__file__).parent))).strip() == "busy"


def test_programs_of_a_multiprocessor():
    """Occupancy agrees with NVIDIA's occupancy calculator and AMD's documentation."""
    hopper, radeon = launch.Target("sm_90", 132), launch.Target("gfx942", 304, 64 << 10)
    assert launch.resident(hopper, 4, 144, 32 << 10) == 3
    assert launch.resident(hopper, 4, 32, 0) == 16
    assert launch.resident(hopper, 4, 255, 0) == 2
    assert launch.resident(hopper, 4, 64, 90_112) == 2
    assert launch.resident(launch.Target("sm_120", 170, 100 << 10, 1536), 4, 32, 0) == 12
    assert launch.resident(radeon, 4, 128, 0) == 4
    assert launch.resident(radeon, 4, 128, 24 << 10) == 2
    assert launch.resident(hopper, 8, 255, 300_000) == 1


def test_offsets_within_a_tile_are_short_unless_tokens_lie_far_apart():
    def far(stride_n, stride_d, N=2, row=0):
        tokens = torch.empty_strided((1, 1, N, 3), (1, 1, stride_n, stride_d), device="meta")
        return launch.far(tokens, None, row=row)

    assert not far(96, 1) and not far(1, 1 << 22) and far(1, 1 << 23)
    assert not far((1 << 22) - 1, 1) and far(1 << 22, 1) and not far(1 << 22, 1, N=1)
    assert far(96, 1, row=1 << 22)


def test_dtemperature_of_more_batches_than_are_loaded_at_a_time(triton_runs, ran_backend):
    p = make_problem((130, 1, 1, 3))
    with ran_backend("triton", "xfa_backward"):
        p.check(p.run(partial(xk.xfa, backend="triton")))


@pytest.mark.parametrize("N", [0, 5000, 16384, 10**6, 2**33])
@pytest.mark.parametrize("units", [1, 64, 1000])
def test_no_sum_in_a_tensor_core_is_long(N, units):
    """Chunks have at most LONGEST tokens. If this makes many parts, they are summed before the next launch."""
    record, row = 4 * 32 * 32, 2 * 32
    parts, chunk, many = plan.split_sums(N, units, record, row, 132)
    assert chunk <= plan.LONGEST and chunk % plan.CHUNK == 0
    assert parts * chunk >= N and (parts - 1) * chunk < max(N, 1)
    assert many == (plan.split_tokens(N, units, record, row, 132).chunk > plan.LONGEST)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_many_parts_are_summed_first(config, monkeypatch, triton_runs, ran_backend):
    monkeypatch.setattr(plan, "LONGEST", 128)
    monkeypatch.setattr(plan, "SHORT", plan.CHUNK)
    p = make_problem((2, 600, 2, 8), config, masked=True)
    assert plan.split_sums(600, 4, 4 * 8 * 8, 4 * 8, 8, 128) == (3, plan.CHUNK, True)
    with ran_backend("triton", "xfa_forward", "xfa_backward"):
        p.check(p.run(partial(xk.xfa, backend="triton")))
    G, ssq, _ = xk.gram(p.q, p.k, backend="triton")
    q, k = p.q.double(), p.k.double()
    torch.testing.assert_close(G.double(), q.mT @ k, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ssq.double(), q.square().sum(-2), rtol=1e-5, atol=1e-4)


def linear(tensors, **kwargs):
    *leaves, dout = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = xk.linear_attention(*leaves, **kwargs)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def check_linear(tensors, ran_backend, **kwargs):
    """Checks all four results of the fused kernels against the reference."""
    with ran_backend("triton", "linear_attention_forward", "linear_attention_backward"):
        ours = linear(tensors, backend="triton", **kwargs)
    eager = linear(tensors, backend="reference", **kwargs)
    oracle = linear([x.double() for x in tensors], backend="reference", **kwargs)
    for name, *results in zip(("out", "dq", "dk", "dv"), ours, eager, oracle, strict=True):
        assert_close(*results, name)
    return ours


@pytest.mark.parametrize("feature_map", ["relu", "softmax_tokens"])
def test_many_parts_of_linear_attention_are_summed_first(feature_map, monkeypatch, triton_runs, ran_backend):
    """Results are right and reproducible if many parts are summed first. The maxima of parts are not summed."""
    tensors = [randn(2, 2, n, d, seed=i) for i, (n, d) in enumerate(((600, 8), (700, 8), (700, 5), (600, 5)))]
    kwargs = {"feature_map": feature_map, "query_mask": random_mask(2, 600, 1), "token_mask": random_mask(2, 700, 2)}
    results = []
    for longest in (plan.LONGEST, 128):
        monkeypatch.setattr(plan, "LONGEST", longest)
        monkeypatch.setattr(plan, "SHORT", plan.CHUNK)
        assert plan.split_sums(700, 4, 1, 1, 4).many == (longest == 128)
        results.append(check_linear(tensors, ran_backend, **kwargs))
        for again, before in zip(linear(tensors, backend="triton", **kwargs), results[-1], strict=True):
            assert_bitwise(again, before, "the same call")


def test_wide_linear_attention_is_composed(triton_runs, ran_backend):
    """Calls are composed of other ops if a program cannot hold the map, which depends on the larger of D and Dv."""
    for dtype, widest in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float64, 64)):
        for dims in ((widest, 3), (3, widest), (widest + 1, 3), (3, widest + 1)):
            q, k, v = (randn(1, 1, 9, d, seed=d, dtype=dtype) for d in (dims[0], *dims))
            fused = max(dims) <= widest
            assert dispatch.fuses_linear_attention("triton", ("relu", "relu"), dtype, dims) == fused
            with ran_backend("triton", *(("linear_attention_forward",) if fused else ("layer_gram", "channel_mix"))):
                xk.linear_attention(q, k, v, backend="triton")


def test_tf32_is_the_users_choice():
    """PyTorch's matmul setting, read at each call, decides whether float32 uses tf32; other dtypes ignore it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        assert launch.tokens_precision(torch.float32, "sm_90") == "ieee"
        assert launch.map_precision(torch.float32, "gfx942") == "ieee"
        torch.set_float32_matmul_precision("high")
        assert launch.tokens_precision(torch.float32, "sm_90") == "tf32"
        assert launch.map_precision(torch.float32, "sm_90") == "tf32"
        assert launch.tokens_precision(torch.float64, "sm_90") == "ieee"
        assert launch.tokens_precision(torch.float32, "interpreter") == "ieee"
        assert launch.tokens_precision(torch.float32, "gfx90a") == "ieee"  # has no tf32
        # norms are square roots of the diagonal
        assert launch.gram_precision(torch.float32, False, "sm_90", 64) == "tf32"
        assert launch.gram_precision(torch.float32, False, "sm_90", 64, symmetric=True) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.allow_tf32 = before


# ----------------------------------------------------------------------------------- the kernels at every table's row


def blocks(arch, dtype, D):
    """Block sizes of an architecture's rows. The interpreter ignores num_warps, num_stages and maxnreg."""
    rows = [name for (name, size), row in table.TABLE.items() if size == dtype.itemsize and configs.block(D) in row]
    return [configs.shipped(configs.Key(name, dtype, D, ""), arch)[:3] for name in rows]


ROWS = [
    (dtype, arch, D)
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for arch in ("sm_90", "gfx942")
    for D in (16, 24, 50, 100, 130)
    if arch == "sm_90" or blocks(arch, dtype, D) != blocks("sm_90", dtype, D)
]


@pytest.mark.nightly(slow=True)
@pytest.mark.skipif(not launch.INTERPRETING, reason="other architectures' rows run in Triton's interpreter only")
@pytest.mark.parametrize("dtype, arch, D", ROWS, ids=str)
def test_rows_of_real_architectures(dtype, arch, D, monkeypatch, ran_backend, triton_runs):
    """Results are right with the tiles of real architectures, in two launches and, if the map fits, in one."""
    one_launch = plan.fits_one_launch(D, accumulate_dtype(dtype).itemsize)
    for processors, shape in ((4, (1, 300, 1, D)), (1, (2, 70, 1, D)))[: 1 + one_launch]:
        monkeypatch.setattr(launch, "target", lambda device, n=processors: launch.Target(arch, n))
        p = make_problem(shape, dtype=dtype, masked=True)
        with ran_backend("triton", "xfa_forward", "xfa_backward"):
            result = p.run(xk.xfa, backend="triton")
        p.check(result)
    assert configs.shipped(configs.Key("gradients", dtype, D, ""), arch).block_n <= 64
    if plan.fits_linear_attention(D, dtype.itemsize):
        tensors = [randn(1, 1, n, D, seed=i, dtype=dtype) for i, n in enumerate((300, 270, 270, 300))]
        check_linear(tensors, ran_backend, feature_map="elu1", query_mask=random_mask(1, 300))
    assert dispatch.reasons_against("triton", "cpu", (dtype,), (D,)) == []
