"""Attention layers of other packages than timm, before and after their attention is replaced."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from test_nn import randomize
from torch import Tensor, nn

from xformer_kernels import dispatch
from xformer_kernels.integrations import is_replaced, replace_attention, restore_attention
from xformer_kernels.testing import assert_close

SPANDREL = "spandrel.architectures"


class FacebookXCA(nn.Module):
    """XCiT's layer, from section 3.2 of its paper (arXiv 2106.09681), with the attributes of facebookresearch/xcit."""

    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        attention = self.attn_drop((scores * self.temperature).softmax(-1))
        return self.proj_drop(self.proj((attention @ v).permute(0, 3, 1, 2).reshape(b, n, c)))


@dataclass(frozen=True)
class Case:
    """A class of a package with its arguments, and what goes into it: shapes and other arguments."""

    where: str
    name: str
    arguments: tuple[Any, ...]
    inputs: tuple[Any, ...]
    linear: str = ""  # a part to hook
    op: str = "xfa_forward"

    def cls(self) -> Any:
        if not self.where:
            return globals()[self.name]
        package = self.where.split(".")[0]
        pytest.importorskip(package, reason=f"{package}, whose {self.name} is converted, is not installed")
        pytest.importorskip("einops", reason=f"{package}'s {self.name} needs einops")
        return getattr(importlib.import_module(self.where), self.name)

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = randomize(self.cls()(*self.arguments))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.rpartition(".")[2] in ("temp", "rescale"):
                    parameter.add_(1.0)
        return model.to(dtype)

    def args(self, dtype: torch.dtype = torch.float32) -> list[Any]:
        return [randn(*a, seed=i, dtype=dtype) if isinstance(a, tuple) else a for i, a in enumerate(self.inputs, 1)]


CASES = {
    "facebook XCA": Case("", "FacebookXCA", (48, 4), ((2, 63, 48),), "qkv"),
    "vit-pytorch": Case("vit_pytorch.xcit", "XCAttention", (48, 3, 24), ((2, 7, 9, 48),), "to_qkv"),
    "MONAI 2D": Case("monai.networks.blocks.cablock", "CABlock", (2, 48, 4, True), ((2, 48, 7, 9),), "qkv"),
    "MONAI 3D": Case("monai.networks.blocks.cablock", "CABlock", (3, 24, 2, False), ((2, 24, 3, 4, 5),), "qkv"),
    "Restormer": Case(
        "spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch", "Attention", (48, 2, False),
        ((2, 48, 7, 9),), "qkv",
    ),
    "M3SNet": Case(
        "spandrel_extra_arches.architectures.M3SNet.__arch.M3SNet", "Attention", (48, 2, True), ((2, 48, 7, 9),), "qkv"
    ),
    "KBNet": Case(f"{SPANDREL}.KBNet.__arch.kbnet_l", "TransAttention", (48, 2, True), ((2, 48, 7, 9),), "qkv"),
    "HVI-CIDNet": Case(f"{SPANDREL}.HVICIDNet.__arch.LCA", "CAB", (48, 4, True), ((2, 48, 7, 9),) * 2, "kv"),
    "Retinexformer": Case(
        f"{SPANDREL}.RetinexFormer.__arch.retinexformer_arch", "IG_MSA", (48, 24, 2), ((2, 7, 9, 48),) * 2, "to_v"
    ),
    "DAT": Case(
        f"{SPANDREL}.DAT.__arch.DAT", "Adaptive_Channel_Attention", (48, 4, True), ((2, 63, 48), 7, 9), "qkv"
    ),
    "FDAT": Case(f"{SPANDREL}.FDAT.__arch.fdat", "FastChannelAttention", (48, 4, True), ((2, 63, 48), 7, 9), "qkv"),
    "DITN": Case(f"{SPANDREL}.DITN.__arch.DITN_Real", "ISA", (36, True), ((2, 36, 7, 9),), "qkv"),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def results(model: nn.Module, args: list[Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Output and all gradients by name."""
    args = [a.detach().to(dtype).requires_grad_() if isinstance(a, Tensor) else a for a in args]
    y = model(*args)
    leaves = {f"x{i}": a for i, a in enumerate(args) if isinstance(a, Tensor)} | dict(model.named_parameters())
    grads = torch.autograd.grad(y, list(leaves.values()), randn(*y.shape, seed=9, dtype=torch.float64).to(dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_same_in_float64(case, training, form):
    theirs = case.make(torch.float64).train(training)
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours, form=form) == 1
    args = case.args(torch.float64)
    expected = results(theirs, args)
    with dispatch.record() as ran:
        got = results(ours, args)
    assert any(op in ("xfa_forward", "layer_forward", "xfa") for _, op in ran)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    for (name, a), b in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_the_rule(case, dtype):
    """Output and every gradient, in the accuracy of the dtype."""
    theirs = case.make(dtype).eval()
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    args = case.args(dtype)
    oracle = results(copy.deepcopy(theirs).double(), args)
    eager, got = results(theirs, args, dtype), results(ours, args, dtype)
    for name, exact in oracle.items():
        assert got[name].dtype == dtype
        assert_close(got[name], eager[name], exact, name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_shape_and_memory_format_of_images(case, memory_format):
    shape = case.inputs[0]
    if len(shape) != 4 or case.name in ("XCAttention", "IG_MSA"):
        pytest.skip("takes no images of (B, C, h, w)")
    model = case.make().to(memory_format=memory_format)
    args = [a.to(memory_format=memory_format) for a in case.args()]
    with torch.no_grad():
        expected = model(*args)
        replace_attention(model)
        got = model(*args)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.is_contiguous(memory_format=memory_format)


def test_state_dict_and_restore(case):
    model = case.make(torch.float64).eval()
    before = {name: p for name, p in model.named_parameters()}
    keys, args, cls = list(model.state_dict()), case.args(torch.float64), type(model)
    with torch.no_grad():
        expected = model(*args)
        assert replace_attention(model) == 1 and replace_attention(model) == 0
        assert list(model.state_dict()) == keys and type(model) is cls
        assert all(p is before[name] for name, p in model.named_parameters())
        copied = copy.deepcopy(model)
        assert is_replaced(copied)
        torch.testing.assert_close(copied(*args), expected)
        assert restore_attention(model) == 1 and "forward" not in model.__dict__
        assert torch.equal(model(*args), expected)


def test_hooks_are_called(case):
    """Of a part and of the whole, before and after replacement, with the numbers of the original."""
    theirs = case.make(torch.float64).eval()
    outcomes = []
    for first in ("nothing", "replace", "hook"):
        model, calls = copy.deepcopy(theirs), []
        if first == "replace":
            assert replace_attention(model) == 1
        model.get_submodule(case.linear).register_forward_hook(lambda m, i, y, c=calls: c.append(y.shape) or 2 * y)
        model.register_forward_hook(lambda m, i, y, c=calls: c.append(y.shape) or 3 * y)
        if first == "hook":
            assert replace_attention(model) == 1
        outcomes.append((calls, results(model, case.args(torch.float64))))
    for calls, got in outcomes[1:]:
        assert calls == outcomes[0][0] and len(calls) == 2
        for name, value in outcomes[0][1].items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_is_that_of_the_original(case):
    theirs = case.make(torch.float64).train()
    dropouts = [m for m in theirs.modules() if isinstance(m, nn.Dropout)]
    if not dropouts:
        pytest.skip("has no dropout")
    for m in dropouts:
        m.p = 0.4
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    got = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        got.append(results(model, case.args(torch.float64)))
    for name, value in got[0].items():
        torch.testing.assert_close(got[1][name], value, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_global_hooks_see_the_calls_of_the_original(case):
    model, seen = case.make(torch.float64).eval(), []
    with torch.no_grad():
        for replaced in (False, True):
            if replaced:
                assert replace_attention(model) == 1
            names: list[str] = []
            handle = nn.modules.module.register_module_forward_hook(lambda m, i, y, n=names: n.append(type(m).__name__))
            try:
                y = model(*case.args(torch.float64))
            finally:
                handle.remove()
            seen.append((names, y))
    assert seen[0][0] == seen[1][0]
    torch.testing.assert_close(seen[0][1], seen[1][1])


def test_compiled(case):
    torch._dynamo.reset()
    model = case.make(torch.float64).eval()
    args = case.args(torch.float64)
    expected = results(model, args)
    assert replace_attention(model) == 1
    got = results(torch.compile(model, backend="aot_eager", fullgraph=True), args)
    for (name, value), other in zip(expected.items(), got.values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_a_compiled_module_is_replaced(case):
    """By module.compile(), before and after."""
    theirs = case.make(torch.float64).eval()
    args = case.args(torch.float64)
    for first in ("compile", "replace"):
        torch._dynamo.reset()
        ours = copy.deepcopy(theirs)
        for step in (first, "replace" if first == "compile" else "compile"):
            if step == "compile":
                ours.compile(backend="eager")
            else:
                assert replace_attention(ours) == 1
        with torch.no_grad():
            torch.testing.assert_close(ours(*args), theirs(*args), rtol=1e-8, atol=1e-8)


def test_inputs_by_name():
    """As Retinexformer calls its attention."""
    case = CASES["Retinexformer"]
    model = case.make(torch.float64)
    x, light = case.args(torch.float64)
    expected = model(x, illu_fea_trans=light)
    replace_attention(model)
    for call in (lambda: model(x, illu_fea_trans=light), lambda: model(illu_fea_trans=light, x_in=x)):
        with dispatch.record() as ran:
            torch.testing.assert_close(call(), expected, rtol=1e-8, atol=1e-8)
        assert ran
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(x, light=light)


def test_models_without_weights(case):
    """To be loaded later; under fake tensors nothing can be tried, and nothing is replaced."""
    theirs = case.make().eval()
    with torch.device("meta"):
        ours = case.cls()(*case.arguments)
    assert replace_attention(ours) == 1
    ours = ours.to_empty(device="cpu").eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(*case.args()), theirs(*case.args()), rtol=1e-4, atol=1e-4)
    with torch._subclasses.FakeTensorMode():
        assert replace_attention(case.cls()(*case.arguments)) == 0


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_replaced_in_other_modes(case, context):
    model = case.make()
    with context():
        assert replace_attention(model) == 1


def test_a_copy_of_xca_in_a_block_of_timms():
    """The block is timm's, but its attention is not: the block calls it."""
    xcit = pytest.importorskip("timm.models.xcit", reason="timm is not installed")
    theirs = xcit.XCABlock(48, 4)
    theirs.attn = FacebookXCA(48, 4)
    theirs = randomize(theirs).double().eval()
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    x = randn(2, 63, 48, seed=1, dtype=torch.float64)
    torch.testing.assert_close(ours(x, 7, 9), theirs(x, 7, 9), rtol=1e-8, atol=1e-8)
