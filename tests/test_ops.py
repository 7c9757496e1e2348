"""The ops with torch.library, torch.compile, torch.export, autocast and other parts of PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import CONFIGS, LOW_PRECISION, RESULTS, THOROUGH, Config, make_problem, randn, random_mask

import xformer_kernels as xk
from xformer_kernels import dispatch
from xformer_kernels.testing import assert_bitwise, assert_close

OPS = torch.ops.xformer_kernels


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------------ opcheck


def op_samples(kernel, device, dtype):
    """(op, arguments) that cover the schema: masks, absent operands, with and without gradients."""
    primitives = dispatch.has(kernel, "gram")
    with_norm = CONFIGS[3] if primitives else CONFIGS[2]  # over features, if the backend has it
    for config, masked, grad in ((CONFIGS[0], False, True), (with_norm, True, True), (CONFIGS[4], True, False)):
        p = make_problem((2, 9, 2, 4), config, dtype=dtype, masked=masked, device=device)
        q, k, v, t = p.inputs() if grad else (p.q, p.k, p.v, p.temperature)
        choices = (p.token_mask, config.spec.text(), kernel)
        yield OPS.xfa_forward, (q, k, v, t, *choices)
        _, stats = OPS.xfa_forward(p.q, p.k, p.v, p.temperature, *choices)
        yield OPS.xfa_backward, (p.dout.requires_grad_(grad), q, k, v, t, stats, *choices[:2], False, kernel)
    if not primitives:
        return
    a, b = (randn(2, 2, 9, d, seed=d, dtype=dtype, device=device).requires_grad_() for d in (3, 5))
    yield OPS.gram, (a, b, False, None, kernel)
    yield OPS.gram, (a, b, False, random_mask(2, 9, device=device), kernel)
    yield OPS.gram, (b, b, True, None, kernel)
    weight, weight2 = (randn(2, 2, 5, i, seed=i, dtype=dtype, device=device).requires_grad_() for i in (3, 5))
    bias = randn(2, 2, 5, seed=9, dtype=dtype, device=device).requires_grad_()
    yield OPS.channel_mix, (a, weight, None, None, None, None, None, kernel)
    yield OPS.channel_mix, (a, weight, bias, b, bias, b, weight2, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, kernel, device, slow):
    for op, args in op_samples(kernel, device, dtype):
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        # the result of AOTAutograd does not depend on the backend
        if dtype == torch.float32 and (THOROUGH or not slow):
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op.default, args, test_utils=tests)


def test_fake_tensors_have_the_strides_of_real_ones(kernel, device):
    """Shapes, dtypes, devices and strides of fake and real results are equal for inputs in any layout."""
    for layout in ("packed", "token_contiguous", "padded"):
        p = make_problem((2, 9, 3, 4), layout=layout, device=device)
        tensors = (p.q, p.k, p.v, p.temperature, randn(7, 4, seed=1, device=device))

        def results(q, k, v, t, w):
            yield xk.xfa(q, k, v, t, backend=kernel)
            if dispatch.has(kernel, "gram"):
                yield from xk.gram(q, k, backend=kernel)
                yield xk.channel_mix(q, w, backend=kernel)

        real = list(results(*tensors))
        with torch._subclasses.FakeTensorMode() as mode:
            fake = list(results(*map(mode.from_tensor, tensors)))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


# ------------------------------------------------------------------------------------------------------------ compile


def everything(q, k, v, temperature, weight, mask, backend):
    """Calls each public function, with operations for the compiler between them."""
    out = xk.xfa(q * 1.5, k, v, temperature, token_mask=mask, backend=backend)
    out = out + xk.xfa(q, k, v, temperature, map="key_value", norm="feature", backend=backend)
    G, ssq, _ = xk.gram(out, v, backend=backend)
    out = xk.channel_mix(out, weight, add=v, backend=backend).sigmoid()
    return (
        xk.xfa(out, k, v, temperature, map_fn=lambda S: S.softmax(-1), backend=backend).sum()
        + G.tanh().sum()
        + ssq.sum()
    )


@pytest.mark.needs(norm=None, dtype=torch.float64)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile_fullgraph_dynamic(compiler, backend, device, ran, slow):
    """One graph, compiled once for all numbers of tokens and batch sizes, forward and backward."""
    if slow and compiler == "inductor":
        pytest.skip("the graph, and so the code around the kernels, is the same as for the other backends")
    if backend == "reference" and not THOROUGH:
        pytest.skip("the reference has no kernels; runs with XFORMER_KERNELS_THOROUGH=1")
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=compiler)
    for i, (B, N) in enumerate(((2, 50), (3, 77), (5, 130), (2, 300 if slow else 1025))):
        p = make_problem((B, N, 3, 8), dtype=torch.float64, masked=True, device=device, seed=i)
        inputs = (*p.inputs(), randn(8, 8, seed=7, dtype=torch.float64, device=device).requires_grad_())
        expected = everything(*inputs, p.token_mask, backend)
        wanted = torch.autograd.grad(expected, inputs)
        stance = "default" if i == 0 else "fail_on_recompile"
        with torch.compiler.set_stance(stance), ran("xfa_forward", "xfa_backward", "gram", "channel_mix"):
            result = compiled(*inputs, p.token_mask, backend)
            grads = torch.autograd.grad(result, inputs)
        for name, got, want in zip(
            ("value", *RESULTS[1:], "dweight"), (result, *grads), (expected, *wanted), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_compiled_layer_in_low_precision_autocast(kernel, device, ran, slow):
    """A compiled module under bfloat16 autocast, forward and backward."""
    torch.manual_seed(0)
    layer = xk.XFA(24, num_heads=3, backend=kernel).to(device)
    x = randn(2, 70, 24, seed=1, device=device)

    def run(module, x, enabled=True):
        x = x.detach().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            y = module(x)
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *module.parameters()))

    # the code that inductor generates is the same for all backends
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager" if slow else "inductor")
    with ran("xfa_forward", "xfa_backward"):
        ours = run(compiled, x)
    plain = copy.deepcopy(layer)
    plain.backend = "reference"
    eager = run(plain, x)
    oracle = run(copy.deepcopy(plain).double(), x.double(), enabled=False)
    for i, (a, b, c) in enumerate(zip(ours, eager, oracle, strict=True)):
        assert a.dtype == b.dtype
        assert_close(a, b, c, f"result {i}")


def test_export(kernel, device, ran):
    """The exported graph contains the op, and runs for any batch size and number of tokens."""
    torch.manual_seed(0)
    layer = xk.XFA(12, num_heads=3, backend=kernel).to(device).eval()
    dynamic = {"x": {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("N", min=2)}}
    program = torch.export.export(layer, (randn(2, 30, 12, seed=1, device=device),), dynamic_shapes=dynamic)
    assert "xformer_kernels.xfa_forward" in str(program.graph)
    for B, N in ((1, 5), (4, 333)):
        x = randn(B, N, 12, seed=2, device=device)
        with ran("xfa_forward"):
            y = program.module()(x)
        torch.testing.assert_close(y, layer(x))


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("inputs", [torch.float32, "mixed"], ids=str)
def test_autocast_casts_q_k_and_v(inputs, dtype, backend, device, ran):
    """q, k and v are cast, as for scaled_dot_product_attention; the temperature is not."""
    p = make_problem((2, 40, 3, 8), device=device)
    q, k, v, t = p.inputs()
    if inputs == "mixed":
        q = p.q.to(dtype).requires_grad_()
    with torch.autocast(device, dtype=dtype), ran("xfa_forward", "xfa_backward"):
        out = xk.xfa(q, k, v, t, backend=backend)
        grads = torch.autograd.grad(out, (q, k, v, t), p.dout.to(dtype))
    assert out.dtype == dtype
    cast = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    expected = xk.xfa(*cast, t, backend=backend)
    wanted = torch.autograd.grad(expected, (*cast, t), p.dout.to(dtype))
    assert_bitwise(out.detach(), expected.detach(), "out")
    for leaf, got, want in zip((q, k, v, t), grads, wanted, strict=True):
        assert got.dtype == leaf.dtype
        assert_bitwise(got, want.to(leaf.dtype), "gradient")


@pytest.mark.needs(dtype=torch.float64)
def test_autocast_leaves_float64_and_disabled_regions_alone(backend, device):
    p = make_problem((2, 40, 3, 8), device=device)
    args = (p.q, p.k, p.v, p.temperature)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert xk.xfa(*(x.double() for x in args), backend=backend).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert_bitwise(xk.xfa(*args, backend=backend), xk.xfa(*args, backend=backend), "disabled")
            assert xk.xfa(*args, backend=backend).dtype == torch.float32


@pytest.mark.needs(norm=None)
def test_autocast_of_primitives(backend, device):
    """Errors are within those of a matmul under autocast; statistics stay in float32."""
    a, b = randn(2, 2, 30, 8, seed=1, device=device), randn(2, 2, 30, 6, seed=2, device=device)
    weight = randn(6, 8, seed=3, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        G, ssq_a, ssq_b = xk.gram(a, b, backend=backend)
        y = xk.channel_mix(a, weight, add=b, backend=backend)
    assert G.dtype == ssq_a.dtype == ssq_b.dtype == torch.float32
    assert y.dtype in (torch.float32, torch.bfloat16)
    torch.testing.assert_close(G, a.transpose(2, 3) @ b, rtol=0.03, atol=0.2)
    torch.testing.assert_close(y.float(), a @ weight.T + b, rtol=0.03, atol=0.1)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("form", ["gram", "direct"])
def test_autocast_casts_weights_as_linear_layers_do(form, backend, device):
    """Weights in a dtype other than that of autocast and float32, as of a model trained in the other 16-bit dtype."""
    x, t = randn(2, 30, 24, seed=1, device=device), torch.ones(3, device=device, dtype=torch.float16)
    W, P, b = (randn(*s, seed=i, device=device) / 5 for i, s in enumerate(((72, 24), (24, 24), (24,))))
    halves = [w.half() for w in (W, P, b)]

    def run(W, P, b):
        yield xk.xfa_layer(x, W, None, t, P, b, form=form, backend=backend)
        yield xk.xfa_block(x, b, None, 1e-5, W, None, t, P, b, layer_scale=b, form=form, backend=backend)
        yield xk.channel_mix(x, P, bias=b, add=x, add_scale=b, x2=x, weight2=P, backend=backend)

    with torch.autocast(x.device.type, torch.bfloat16):
        expected, got = list(run(W, P, b)), list(run(*halves))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.05)
    with pytest.raises(TypeError, match="qkv_weight must have dtype"):
        xk.xfa_layer(x, halves[0], None, t, P, b, backend=backend)


# -------------------------------------------------------------------------------------------------- the rest of PyTorch


def test_torch_function_and_dispatch_modes_see_the_ops(kernel, device):
    """Dispatch modes, as used by FLOP counters and quantisers, see the ops."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    p = make_problem((1, 10, 2, 4), device=device)
    with Names():
        p.run(xk.xfa, backend=kernel)
    assert "xformer_kernels::xfa_forward" in seen and "xformer_kernels::xfa_backward" in seen


def test_profiler_shows_the_ops(kernel, device):
    p = make_problem((1, 10, 2, 4), device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        p.run(xk.xfa, backend=kernel)
    seen = {event.name for event in profile.events()}
    assert {"xformer_kernels::xfa_forward", "xformer_kernels::xfa_backward"} <= seen


def test_tensor_subclasses(kernel, device):
    class Tagged(torch.Tensor):
        pass

    p = make_problem((1, 10, 2, 4), Config(), device=device)
    expected = xk.xfa(p.q, p.k, p.v, p.temperature, backend=kernel)
    out = xk.xfa(p.q.as_subclass(Tagged), p.k, p.v, p.temperature, backend=kernel)
    assert_bitwise(out.as_subclass(torch.Tensor), expected, "subclass")


@pytest.mark.filterwarnings("ignore:Casting complex:UserWarning")
def test_negated_views(kernel, device):
    """The imaginary part of a conjugate is a view with the negative bit set."""
    p = make_problem((1, 10, 2, 4), device=device)
    q, k, v = (torch.complex(x, -x).conj().imag for x in (p.q, p.k, p.v))
    assert q.is_neg()
    for record in (False, True):
        out = xk.xfa(q.requires_grad_(record), k, v, p.temperature, backend=kernel)
        assert_bitwise(out.detach(), xk.xfa(p.q, p.k, p.v, p.temperature, backend=kernel), "negated views")


def test_default_device_is_ignored(kernel, device):
    p = make_problem((1, 10, 2, 4), device=device)
    expected = p.run(xk.xfa, backend=kernel)
    with torch.device("meta"):
        result = p.run(xk.xfa, backend=kernel)
    for name, x in result.items():
        assert_bitwise(x, expected[name], name)


@pytest.mark.needs(norm=None)
def test_default_device_is_ignored_by_gram(kernel, device):
    p = make_problem((1, 10, 2, 4), device=device)
    G = xk.gram(p.q, p.k, backend=kernel)[0]
    with torch.device("meta"):
        result = xk.gram(p.q, p.k, backend=kernel)[0]
    assert_bitwise(result, G, "G")


def test_layer_pickles_and_copies(kernel, device):
    layer = xk.XFA(12, num_heads=3, backend=kernel).to(device)
    x = randn(2, 9, 12, seed=1, device=device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise(other(x).detach(), layer(x).detach(), "copy")
