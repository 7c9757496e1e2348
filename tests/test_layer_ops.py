"""Ops of the layer with compile, export, autocast and checkpointing; saved memory; errors; the choice of the form."""

from __future__ import annotations

import pytest
import torch
from layer_cases import NAMES, make_layer
from test_memory import saved_bytes
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import xformer_kernels as xk
from xformer_kernels import backends
from xformer_kernels.layer import algebra, maps, passes
from xformer_kernels.layer import ops as layer_ops
from xformer_kernels.spec import Spec
from xformer_kernels.testing import assert_bitwise

_ops = torch.ops.xformer_kernels
FORMS = ("gram", "direct")
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture
def small(device):
    return make_layer((2, 40, 12, 3), block=True, masked=True, device=device)


def arguments(layer, backend, keep=None):
    tensors = [t if t is None else t.detach() for t in layer.tensors]
    return layer_ops.Operands(*tensors), (keep, layer.token_mask, Spec().text(), layer.ln_eps, True, "", backend)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("block", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["layer", "block"])
def test_opcheck(block, kernel, device, slow):
    """Schemas, fakes and autograd; slow kernels skip AOTAutograd, whose result does not depend on the backend."""
    tests = ("test_schema", "test_faketensor") if slow else ALL
    layer = make_layer((2, 20, 12, 3), block=block, masked=block, bias=block, device=device)
    operands, choices = arguments(layer, kernel)
    leaves = [t if t is None else t.requires_grad_() for t in operands]
    opcheck(_ops.layer_forward.default, (*leaves, *choices), test_utils=tests)
    with torch.no_grad():
        _, *saved = _ops.layer_forward(*operands, *choices)
    dy = layer.dy.clone().requires_grad_()
    opcheck(_ops.layer_backward.default, (dy, *leaves, *saved, *choices), test_utils=tests)


@pytest.mark.parametrize("form", (*FORMS, "auto"))
def test_compile_fullgraph_dynamic(form, device):
    """One graph for any number of tokens; with "auto", one more for sizes where the other form costs less."""
    check_compiled(form, "auto", device, "inductor")


@pytest.mark.needs(norm=None)
def test_compile_each_backend(kernel, device, slow):
    check_compiled("gram", kernel, device, "aot_eager" if slow else "inductor")


def check_compiled(form, backend, device, compiler):
    torch.manual_seed(0)
    block = xk.XFABlock(24, 3, layer_scale=0.5, form=form, backend=backend).to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=compiler)
    for N in (70, 90, 400):
        x = torch.randn(2, N, 24, device=device, requires_grad=True)
        parameters = (x, *block.parameters())
        ours = torch.autograd.grad(compiled(x).square().sum(), parameters)
        plain = torch.autograd.grad(block(x).square().sum(), parameters)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
def test_export(form, kernel, device, ran):
    torch.manual_seed(0)
    layer = xk.XFA(12, num_heads=3, form=form, backend=kernel).to(device).eval()
    dynamic = {"x": {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("N", min=2)}}
    program = torch.export.export(layer, (torch.randn(2, 30, 12, device=device),), dynamic_shapes=dynamic)
    op = "layer_forward" if form == "gram" else "xfa_forward"
    assert f"xformer_kernels.{op}" in str(program.graph)
    for B, N in ((1, 5), (4, 333)):
        x = torch.randn(B, N, 12, device=device)
        with ran(op):
            y = program.module()(x)
        torch.testing.assert_close(y, layer(x))


def test_export_of_auto_is_direct(device):
    layer = xk.XFA(12, num_heads=3).to(device).eval()
    dynamic = {"x": {1: torch.export.Dim("N", min=2)}}
    program = torch.export.export(layer, (torch.randn(2, 3000, 12, device=device),), dynamic_shapes=dynamic)
    assert "layer_forward" not in str(program.graph)


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing(form, kernel, device):
    layer = make_layer((2, 60, 24, 3), block=True, device=device)
    expected = layer.run(form=form, backend=kernel)
    leaves = layer.leaves()
    y = checkpoint(lambda *t: layer.call(list(t), form=form, backend=kernel), *leaves, use_reentrant=False)
    for name, g in zip(NAMES, torch.autograd.grad(y, leaves, layer.dy), strict=True):
        assert_bitwise(g, expected[f"d{name}"], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_autocast(form, dtype, kernel, device):
    """The layer casts x, as linear does; a block keeps the dtype of x. Errors are at most twice those of eager."""
    layer = make_layer((2, 60, 24, 3), device=device)
    exact = layer.oracle()["y"]
    with torch.autocast(device, dtype=dtype):
        y = layer.call(layer.leaves(), form=form, backend=kernel)
        eager = layer.by_reference(layer.leaves())
    assert y.dtype == eager.dtype == dtype
    assert (y.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()
    block = make_layer((2, 60, 24, 3), block=True, device=device)
    exact = block.oracle()
    with torch.autocast(device, dtype=dtype):
        leaves = block.leaves()
        y = block.call(leaves, form=form, backend=kernel)
        eager = block.by_reference(block.leaves())
    assert y.dtype == eager.dtype == torch.float32
    assert (y.double() - exact["y"]).abs().max() <= 2 * (eager.double() - exact["y"]).abs().max()
    for leaf, grad in zip(leaves, torch.autograd.grad(y, leaves, block.dy), strict=True):
        assert grad.dtype == leaf.dtype


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
def test_saved_memory_does_not_grow_with_the_tokens(block, kernel, device):
    saved = []
    for N in (40, 120):
        layer = make_layer((2, N, 24, 3), block=block, device=device)
        leaves = layer.leaves()
        there = [t for t in leaves if t is not None]
        size, y = saved_bytes(
            lambda *_, layer=layer, leaves=leaves: layer.call(leaves, form="gram", backend=kernel), there
        )
        assert y.grad_fn is not None
        saved.append(size)
    assert saved[0] == saved[1] <= 2 * 4 * 24 * 24 * 4 * 2


# -------------------------------------------------------------------------------------------------------------- errors


BAD = {
    "x of two dimensions": (dict(x=torch.randn(5, 12)), ValueError, "x must have 3 dimensions"),
    "x of integers": (dict(x=torch.ones(2, 5, 12, dtype=torch.int64)), TypeError, "x must have a floating point"),
    "other C": (dict(x=torch.randn(2, 5, 11)), ValueError, "qkv_weight must have shape (3 I, C) with C = 11"),
    "rows": (dict(qkv_weight=torch.randn(37, 12)), ValueError, "multiple of the 3 heads"),
    "proj": (dict(proj_weight=torch.randn(12, 11)), ValueError, "proj_weight must have shape (O, I) with I = 12"),
    "bias": (dict(qkv_bias=torch.randn(35)), ValueError, "qkv_bias must have shape (3 I,) = (36,)"),
    "temperature": (dict(temperature=torch.ones(1, 3)), ValueError, "temperature must have shape (H,) or (H, 1, 1)"),
    "dtype": (dict(qkv_weight=torch.randn(36, 12).double()), TypeError, "qkv_weight must have dtype torch.float32"),
    "ln": (dict(ln_weight=torch.randn(11)), ValueError, "ln_weight must have shape (C,) = (12,)"),
    "scale": (dict(layer_scale=torch.randn(1)), ValueError, "layer_scale must have shape (O,) = (12,)"),
    "form": (dict(form="gramm"), ValueError, "form must be one of 'auto', 'gram', 'direct'"),
    "map": (dict(map="key"), ValueError, "map must be one of"),
    "mask": (dict(token_mask=torch.ones(2, 39, dtype=torch.bool)), ValueError, "token_mask must have shape (B, N)"),
    "eps": (dict(eps=0), ValueError, "eps must be"),
    "dropout": (dict(dropout_p=1.0), ValueError, "dropout_p must be in [0, 1)"),
    "backend": (dict(backend="numpy"), ValueError, "backend must be one of"),
    "group": (dict(group="world"), TypeError, "group must be a torch.distributed.ProcessGroup"),
    "no gram form": (dict(form="gram", norm="feature"), ValueError, "form='gram' is not possible: norm='feature'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    changed, error, message = BAD[what]
    layer = make_layer((2, 40, 12, 3), block=True)
    tensors = dict(zip(NAMES, layer.tensors, strict=True))
    choices = {name: value for name, value in changed.items() if name not in NAMES}
    leaves = [changed.get(name, t) for name, t in tensors.items()]
    with pytest.raises(error) as raised:
        layer.call(leaves, **choices)
    assert message in str(raised.value)


def test_ln_eps_and_residual_are_checked():
    layer = make_layer((2, 40, 12, 3), block=True, out=5)
    with pytest.raises(ValueError, match="where x is added"):
        layer.call(list(layer.tensors))
    assert layer.call(list(layer.tensors), residual=False).shape == (2, 40, 5)
    layer = make_layer((2, 40, 12, 3), block=True)
    layer.ln_eps = -1.0
    with pytest.raises(ValueError, match="ln_eps must be"):
        layer.call(list(layer.tensors))


# ------------------------------------------------------------------------------------------------------------- choosing


def explained(shape, **choices):
    layer = make_layer(shape)
    return xk.explain_layer(*layer.tensors[:6], **choices)


def test_explain_shows_both_costs_and_the_choice(ran_auto):
    many, few = explained((1, 4096, 64, 4)), explained((4, 16, 64, 4))
    assert many.form == "gram" and few.form == "direct"
    assert many.gram.seconds < many.direct.seconds and few.gram.seconds > few.direct.seconds
    for text in ("form gram (asked for: auto)", "gram: ", "direct: ", "GFLOP", "MB", "serves this call"):
        assert text in str(many)
    named = explained((1, 4096, 64, 4), form="direct")
    assert named.form == "direct" and named.gram == many.gram
    without = explained((1, 4096, 64, 4), norm="feature")
    assert without.form == "direct" and "norm='feature'" in str(without)
    for shape, op in (((1, 4096, 64, 4), "layer_forward"), ((4, 16, 64, 4), "xfa_forward")):
        layer = make_layer(shape)
        with ran_auto(op):
            layer.call(list(layer.tensors))


def test_named_backend_uses_the_form_that_it_supports(ran_backend, need_backend):
    """The CPU kernels support 512 features: here the features of a head fit, those of a token do not."""
    need_backend("cpp")
    layer = make_layer((1, 1800, 520, 8))
    assert xk.explain_layer(*layer.tensors[:6], backend="reference").form == "gram"
    assert xk.explain_layer(*layer.tensors[:6], backend="cpp").form == "direct"
    with ran_backend("cpp", "xfa_forward"):
        layer.call(list(layer.tensors), backend="cpp")
    with pytest.raises(RuntimeError, match="520 features"):
        layer.call(list(layer.tensors), backend="cpp", form="gram")


def test_auto_prefers_the_form_with_kernels_to_the_reference(monkeypatch, need_backend, ran_backend, forget):
    """The limit of a backend is for the features of x in the Gram form, and for those of a head in the direct form."""
    cpp = need_backend("cpp") or backends.load("cpp")[0].module
    layer = make_layer((1, 1800, 96, 8))
    for widest, form, op in ((96, "gram", "layer_forward"), (95, "direct", "xfa_forward")):
        monkeypatch.setattr(cpp, "_WIDEST", widest)
        forget()
        said = xk.explain_layer(*layer.tensors[:6])
        assert (said.form, said.backend.backend) == (form, "cpp")
        assert ("not taken, no kernel computes it for the 96 features of x" in str(said)) == (form == "direct")
        with ran_backend("cpp", op):
            layer.call(list(layer.tensors))
    monkeypatch.setattr(cpp, "_WIDEST", 11)  # supports neither form: the cheaper one is chosen
    forget()
    said = xk.explain_layer(*layer.tensors[:6])
    assert (said.form, said.reason, said.backend.backend) == ("gram", "", "reference")
    with pytest.warns(RuntimeWarning, match="96 features per head"):
        layer.call(list(layer.tensors))


@pytest.mark.parametrize("form", ["gram", "direct", "auto"])
def test_compiled_graph_checks_the_number_of_features(form, monkeypatch, need_backend, forget):
    cpp = need_backend("cpp") or backends.load("cpp")[0].module
    monkeypatch.setattr(cpp, "_WIDEST", 2)
    forget()
    layer = make_layer((1, 300, 24, 3))
    compiled = torch.compile(
        lambda *args: layer.call(list(args), form=form, backend="cpp"), backend="aot_eager", dynamic=True
    )
    with pytest.raises(Exception, match="features per head, the kernels take 1 to 2"):
        compiled(*layer.tensors)


class Products(TorchDispatchMode):
    """Records the dtypes of matrix products by the shape of the right operand."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.dtypes.setdefault(tuple(args[1].shape[-2:]), set()).add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("map", ["query_key", "key_value"])
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_not_used_for_norms(tf32, map, monkeypatch):
    """x^T x and its products with weights do not use tf32, since the squares of norms are computed from them."""
    monkeypatch.setattr(backends, "tf32_allowed", lambda: tf32)
    with FakeTensorMode(), torch.device("cuda"):
        x, W, P = torch.empty(2, 700, 24), torch.empty(30, 24), torch.empty(7, 10)
        w = layer_ops._weights(layer_ops.Operands(x, W, None, torch.empty(2), P, None))
        with Products() as seen:
            one = x.unsqueeze(1)
            S, _, s = (
                t.squeeze(1) for t in passes.of("reference", torch.float32, 5).gram(one, one, True, None, None, None)
            )
            assert S.dtype == s.dtype == torch.float32
            sums = algebra.Sums(S, s, torch.empty(2, 1), torch.empty(2, 24))
            algebra.forward(sums, w, None, maps.Rule(map, "softmax", 1e-12), maps.layer_maps)
    wide = torch.float64 if tf32 else torch.float32
    assert seen.dtypes[700, 24] == seen.dtypes[24, 24] == {wide}


def test_costs_include_backward_in_training():
    layer = make_layer((1, 4096, 64, 4))
    without = xk.explain_layer(*layer.tensors[:6])
    training = xk.explain_layer(*layer.leaves()[:6])
    for name in ("gram", "direct"):
        assert getattr(training, name).flops > 2 * getattr(without, name).flops
    with torch.no_grad():
        assert xk.explain_layer(*layer.leaves()[:6]).gram == without.gram
