"""Blocks of timm's models whose layer norm, attention, layer scale and residual are fused."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import randn
from test_nn import randomize, run
from torch import nn

from xformer_kernels.integrations import blocks as timm_blocks
from xformer_kernels.integrations import is_replaced, replace_attention, restore_attention

pytest.importorskip("timm", reason="timm, whose models are converted, is not installed")
from test_integrations import Holder, differences, replaced
from timm.models.edgenext import SplitTransposeBlock
from timm.models.xcit import XCABlock


def blocks():
    class XCiT(Holder):
        def forward(self, x):
            return self.inner(x, 20, 24)

    yield "XCABlock", XCiT(XCABlock(48, 4, qkv_bias=True, drop_path=0.5)), (2, 480, 48)
    yield "SplitTransposeBlock", Holder(SplitTransposeBlock(48, 3, 4, drop_path=0.5)), (2, 48, 20, 24)


BLOCKS = pytest.mark.parametrize(
    "kind, model, shape", list(blocks()), ids=lambda value: value if isinstance(value, str) else ""
)


@BLOCKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocks_are_fused(kind, model, shape, dtype, ran_auto, monkeypatch):
    """The layer norm and the layer are not called separately; results are those of the original."""
    model = randomize(copy.deepcopy(model)).to(dtype).eval()
    x = randn(*shape, seed=1, dtype=dtype)
    dy = randn(*shape, seed=2, dtype=dtype)
    new, count = replaced(model, form="gram")
    assert count == 1 and is_replaced(new.inner)
    with monkeypatch.context() as patched:
        patched.setattr(timm_blocks, "attend", None)
        with ran_auto("layer_forward", "layer_backward"):
            result = run(new, x, dy)
    eager = run(model, x, dy)
    oracle = run(copy.deepcopy(model).double(), x.double(), dy.double())
    ours, theirs = differences(result, oracle), differences(eager, oracle)
    assert max(ours.values()) <= 2 * max(theirs.values()) + 4 * torch.finfo(dtype).eps * (
        64 if dtype == torch.float64 else 1
    )


@BLOCKS
def test_drop_path_drops_the_same_images(kind, model, shape):
    model = randomize(copy.deepcopy(model)).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    new, _ = replaced(model, form="gram")
    x = randn(8, *shape[1:], seed=1, dtype=torch.float64)
    results = []
    for each in (model, new):
        torch.manual_seed(5)
        results.append(each(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@BLOCKS
@pytest.mark.parametrize("hooked", ["norm", "layer", "qkv"])
def test_hooks_of_parts_are_called(hooked, kind, model, shape):
    """For feature extraction and adapters: a part with a hook is called, and the result of the hook is used."""
    model = randomize(copy.deepcopy(model)).double().eval()
    x, called = randn(*shape, seed=1, dtype=torch.float64), []

    def twice(module, _, output):
        called.append(module)
        return 2 * output

    results = []
    for each in (model, replaced(model)[0]):
        inner = each.inner
        layer = inner.attn if kind == "XCABlock" else inner.xca
        norm = inner.norm1 if kind == "XCABlock" else inner.norm_xca
        {"norm": norm, "layer": layer, "qkv": layer.qkv}[hooked].register_forward_hook(twice)
        results.append(each(x))
    assert len(called) == 2
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@BLOCKS
def test_blocks_are_restored(kind, model, shape):
    model = randomize(copy.deepcopy(model)).double().eval()
    x, original = randn(*shape, seed=1, dtype=torch.float64), type(model.inner)
    expected = model(x)
    assert replace_attention(model) == 1 and is_replaced(model.inner) and type(model.inner) is original
    assert restore_attention(model) == 1 and not is_replaced(model.inner)
    assert torch.equal(model(x), expected)


def test_changed_blocks_are_not_replaced(monkeypatch):
    """If another release of timm changes a block, only its layer is replaced."""
    monkeypatch.setattr(XCABlock, "forward", lambda self, x, H, W: x + 2 * self.attn(self.norm1(x)))
    block = XCABlock(48, 4)
    assert replace_attention(block) == 1 and not is_replaced(block) and is_replaced(block.attn)
