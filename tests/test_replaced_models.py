"""Changes of models before and after their attention is replaced: results and calls must be those of the original.

Each row of the table SITUATIONS is tested for every kind of module, in both orders.
"""

from __future__ import annotations

import copy
import functools
import pickle
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xformer_kernels as xk
from xformer_kernels import dispatch
from xformer_kernels.integrations import is_replaced, replace_attention, restore_attention

pytest.importorskip("timm", reason="timm, whose models are converted, is not installed")
import timm
from replaced_cases import CALLS, HEADS, KINDS, SITUATIONS, TOKENS, C, Kind, Wrapped, note, results, wrap
from test_nn import randomize
from timm.models.xcit import XCA


def rows() -> list[Any]:
    for_blocks = ("norm", "drop_path", "layer scale", "layer norm")
    for_timm = ("attn_drop", "proj_drop", "temperature of", "temperature without", "temperature per", "weight is")
    return [
        pytest.param(KINDS[kind], change, id=f"{kind}-{name}")
        for kind in KINDS
        for name, change in SITUATIONS.items()
        if (kind.endswith("Block") or not any(word in name for word in for_blocks))
        and (kind != "MDTA" or not any(word in name for word in for_timm))
    ]  # fmt: skip


@pytest.mark.one_in(2, slow=False)
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize(("kind", "change"), rows())
def test_results_and_calls_are_those_of_the_original(kind, change, form):
    theirs = kind.model()
    change(kind, theirs)
    CALLS.clear()
    expected, calls = results(kind, theirs), list(CALLS)
    for first, second in (("replace", "change"), ("change", "replace")):
        ours = kind.model()
        for step in (first, second):
            change(kind, ours) if step == "change" else replace_attention(ours, form=form)
        for state in ("replaced", "restored"):
            CALLS.clear()
            got = results(kind, ours)
            assert calls == CALLS, f"{first} first, {state}"
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    got[name], value, rtol=1e-8, atol=1e-8,
                    msg=lambda m, at=f"{first} first, {state}, {name}": f"{at}: {m}",
                )  # fmt: skip
            assert ours.state_dict().keys() == theirs.state_dict().keys()
            restore_attention(ours)
        assert not any(is_replaced(m) for m in ours.modules())


class EagerBlock(nn.Module):
    """An eager XFABlock, with parts of the same names."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim, eps=1e-6), XCA(dim, num_heads)
        self.layer_scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.attn(self.norm(x))


OURS = {
    "XFA": (Kind(XCA, (TOKENS,)), xk.XFA),
    "XFABlock": (
        Kind(EagerBlock, (TOKENS,), "attn", norm="norm", layer_scale="layer_scale"),
        functools.partial(xk.XFABlock, layer_scale=1.0),
    ),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(name, change, id=f"{name}-{situation}")
        for name in OURS
        for situation, change in SITUATIONS.items()
        if "drop_path" not in situation
        and "temperature per" not in situation
        and "eps 0" not in situation
        and (name == "XFABlock" or not any(word in situation for word in ("norm", "layer scale")))
    ],
)
def test_our_modules_call_their_parts_too(name, change):
    """XFA and XFABlock stay equal to timm's layer and half block when their parts are changed."""
    kind, make = OURS[name]
    theirs = kind.model()
    ours = make(C, num_heads=HEADS).double().eval()
    ours.load_state_dict(theirs.state_dict())
    found = []
    for model in (theirs, ours):
        change(kind, model)
        CALLS.clear()
        found.append((results(kind, model), [{"XFA": "XCA", "XFABlock": "EagerBlock"}.get(x, x) for x in CALLS]))
    assert found[0][1] == found[1][1]
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, rtol=1e-8, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


def test_attn_drop_with_weights_sees_the_map_in_the_dtype_of_q():
    layer = xk.XFA(C, HEADS).bfloat16()
    layer.attn_drop = nn.LayerNorm(C // HEADS).bfloat16()
    assert layer(kind_x := KINDS["XCA"].x().bfloat16()).dtype == kind_x.dtype


@pytest.mark.parametrize("make", [xk.XFA, functools.partial(xk.XFABlock, layer_scale=0.5)], ids=["XFA", "XFABlock"])
def test_our_modules_are_traced_by_fx(make):
    """The traced graph calls the layer with its kernels."""
    model = make(C, num_heads=HEADS).double().eval()
    x = KINDS["XCA"].x()
    traced = torch.fx.symbolic_trace(model)
    assert any(getattr(node.target, "__name__", "") == "xfa_layer" for node in traced.graph.nodes)
    for version in (traced, copy.deepcopy(traced)):
        torch.testing.assert_close(version(x), model(x), rtol=1e-8, atol=1e-8)
    getattr(model, "attn", model).qkv.register_forward_hook(note)
    with pytest.raises(NotImplementedError, match=r"torch\.fx cannot trace XFA"):
        torch.fx.symbolic_trace(model)


class Annotated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # strings, in this file
        return 2 * x


@pytest.mark.parametrize("make", [xk.XFA, functools.partial(xk.XFABlock, layer_scale=0.5)], ids=["XFA", "XFABlock"])
def test_traced_modules_are_pickled(make):
    try:
        pickle.dumps(torch.fx.symbolic_trace(Annotated()))
    except AttributeError:  # PyTorch 2.10 and 2.11
        pytest.skip(f"torch.fx of PyTorch {torch.__version__} pickles no module whose annotations are strings")
    model = make(C, num_heads=HEADS).double().eval()
    x = KINDS["XCA"].x()
    loaded = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-8, atol=1e-8)


FUSED = ("nothing", "training", "partly frozen", "attn_drop in training", "hook of whole", "temperature of one element")


@pytest.mark.parametrize("situation", FUSED)
@pytest.mark.parametrize("kind", ["XCABlock", "SplitTransposeBlock"])
def test_changes_that_keep_the_formula_stay_fused(kind, situation):
    """The comparisons above would also pass if nothing was fused."""
    model = KINDS[kind].model()
    replace_attention(model, form="gram")
    SITUATIONS[situation](KINDS[kind], model)
    with dispatch.record() as ran:
        results(KINDS[kind], model)
    assert ("cpp", "layer_forward") in ran or dispatch.choose("auto", "cpu", (torch.float64,), ()) == "reference"


@pytest.mark.parametrize("kind", ["XCA", "XCABlock", "SplitTransposeBlock"])
@pytest.mark.parametrize("part", ["qkv", "proj"])
def test_kernels_run_between_called_projections(kind, part):
    """As with LoRA: the wrapped module computes q, k and v, which the kernel uses."""
    model = KINDS[kind].model()
    replace_attention(model)
    wrap(part, Wrapped)(KINDS[kind], model)
    with dispatch.record() as ran:
        results(KINDS[kind], model)
    assert any(op == "xfa_forward" for _, op in ran)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_one_head_with_a_temperature_of_any_dimensions(shape):
    theirs = randomize(XCA(C, num_heads=1)).double()
    theirs.temperature = nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    x = KINDS["XCA"].x()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)


@pytest.mark.nightly  # each program has to be compiled by the C++ compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "edgenext_xx_small"])
def test_aotinductor_calls_the_kernels(name, ran_auto, tmp_path):
    """A compiled program of a replaced model gives the results of the model and runs the same kernels."""
    model = timm.create_model(name).eval()
    for parameter in model.parameters():  # layer scales of 1e-6 would hide what the attention adds
        parameter.data += 0.02 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        assert replace_attention(model)
        program = torch.export.export(model, (x,))
        with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        with ran_auto("xfa_forward"):
            out = compiled(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
