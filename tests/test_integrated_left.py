"""Modules similar to the layers of a family that replace_attention must not replace, and its messages about them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from cases import randn
from integrated_cases import CASES, Case, FacebookXCA, results
from test_integrations import MDTA
from torch import nn

from xformer_kernels.integrations import replace_attention, restore_attention, trial


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_other_formulas_are_not_replaced(case):
    """Having the parts is not sufficient: outputs, gradients and both modes must be those of the family."""
    cls = type(case.model())

    class Louder(cls):
        def forward(self, *args):
            return 1.5 * super().forward(*args)

    class Detached(cls):
        def forward(self, x, *args):
            return super().forward(x.detach(), *args)

    class InTraining(cls):
        def forward(self, *args):
            return super().forward(*args) * (1 + self.training)

    class Keeps(cls):
        def forward(self, *args):
            self.kept = super().forward(*args)
            return self.kept

    for derived in (Louder, Detached, InTraining, Keeps):
        model = case.model()
        model.__class__ = derived
        assert replace_attention(model) == 0, derived.__name__


@pytest.mark.parametrize("name, value", [("sizes", (8, 8)), ("act", torch.tanh), ("_maps", []), ("_maps", {})])
def test_modules_with_other_attributes_are_not_replaced(name, value):
    """For example sizes of windows other than in the trial, or lists to which forward appends."""
    for model in (MDTA(8, 2, True), FacebookXCA(8, 2)):
        setattr(model, name, value)
        assert replace_attention(model) == 0


def test_monai_with_flash_attention_is_not_replaced():
    """Its temperature is the mean over heads, and has no gradient."""
    from monai.networks.blocks.cablock import CABlock

    for heads in (1, 2):
        assert replace_attention(CABlock(2, 8, heads, True, flash_attention=True)) == 0


def test_overridden_method_is_called():
    model = CASES["MONAI 2D"].model(torch.float64)
    x = CASES["MONAI 2D"].args(torch.float64)
    expected = model(*x)
    replace_attention(model)
    normal = model._attention_fn
    model._attention_fn = lambda q, k, v: normal(q, k, 0 * v)
    assert (model(*x) - expected).abs().max() > 1e-3
    model = CASES["MONAI 2D"].model()
    model._attention_fn = lambda q, k, v: v
    assert replace_attention(model) == 0


def test_changed_softmax_of_vit_pytorch():
    case = CASES["vit-pytorch"]
    theirs = case.model(torch.float64)
    ours = copy.deepcopy(theirs)
    replace_attention(ours)
    for model in (theirs, ours):
        model.attend = nn.Softmax(dim=-2)
    torch.testing.assert_close(ours(*case.args(torch.float64)), theirs(*case.args(torch.float64)))


@pytest.mark.parametrize(
    "name, change",
    [
        ("EfficientViT", lambda m: setattr(m, "kernel_func", nn.Sigmoid())),
        ("DC-AE", lambda m: setattr(m, "nonlinearity", nn.Sigmoid())),
        ("LoFTR", lambda m: setattr(m, "feature_map", torch.exp)),
        ("DC-AE", lambda m: setattr(m, "processor", lambda attn, x: 2 * x)),
        ("Sana", lambda m: m.set_processor(lambda attn, x, **others: 2 * x)),
    ],
)
def test_changed_feature_map_or_processor(name, change):
    """A change after replacement takes effect; a model changed before is not replaced."""
    theirs, args = CASES[name].model(torch.float64), CASES[name].args(torch.float64)
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    for model in (theirs, ours):
        change(model)
    torch.testing.assert_close(ours(*args), theirs(*args), rtol=1e-4, atol=1e-5)
    assert replace_attention(theirs) == 0


def test_changed_attention_function_of_transformers(monkeypatch):
    case = CASES["Florence-2"]
    model, x = case.model(), case.args()
    functions = sys.modules[case.where].ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(functions, "mine", lambda module, q, k, v, **others: (v.transpose(1, 2), None))
    model.config._attn_implementation = "mine"
    expected = model(*x)
    assert replace_attention(model) == 0
    model.config._attn_implementation = "sdpa"
    assert replace_attention(model) == 1
    model.config._attn_implementation = "mine"
    torch.testing.assert_close(model(*x), expected)


def test_masks_of_loftr_that_are_not_bool():
    """Masks of other dtypes may contain weights, so the original forward is called."""
    model, (q, k, v, q_mask, kv_mask) = CASES["LoFTR, masks"].model(), CASES["LoFTR, masks"].args()
    masks = (q_mask.float(), 0.5 * kv_mask)
    expected = model(q, k, v, *masks)
    assert replace_attention(model) == 1
    torch.testing.assert_close(model(q, k, v, *masks), expected)


def test_inputs_of_loftr_that_broadcast():
    """Inputs that broadcast are passed to the original forward."""
    from kornia.feature.loftr.loftr_module.linear_attention import LinearAttention

    module = LinearAttention()
    q, k = randn(2, 20, 4, 8, seed=1), randn(2, 30, 4, 8, seed=2)
    mask = torch.arange(20)[None] % 3 != 1
    expected = module(q, k, k, mask), module(q[:1], k, k)
    assert replace_attention(module) == 1
    assert torch.equal(module(q, k, k, mask), expected[0]) and torch.equal(module(q[:1], k, k), expected[1])


def test_class_changed_in_training_only(monkeypatch):
    """The trial includes training mode."""
    from timm.models.xcit import XCA

    forward = XCA.forward
    monkeypatch.setattr(XCA, "forward", lambda self, x: forward(self, x) * (2 if self.training else 1))
    assert replace_attention(XCA(16, num_heads=2)) == 0


@pytest.mark.parametrize("name", ["EfficientViT", "DC-AE"])
@pytest.mark.parametrize("pixels", [(1, 1), (3, 4), (1, 13)])
def test_few_pixels(name, pixels):
    """With no more pixels than features per head, DC-AE computes a pixels x pixels map, and so does the replacement."""
    theirs = CASES[name].model(torch.float64)
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    x = [torch.randn(2, 48, *pixels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    for key, value in results(theirs, x).items():
        torch.testing.assert_close(results(ours, x)[key], value, rtol=1e-4, atol=1e-5)


def test_float16_of_sana_is_clipped_as_before():
    theirs = CASES["Sana"].model(torch.float16)
    x = [1e4 * CASES["Sana"].args(torch.float16)[0].sign()]
    with torch.no_grad():
        theirs.to_out[0].weight.mul_(1e3)
        expected = theirs(*x)
        assert replace_attention(theirs) == 1
        got = theirs(*x)
    assert expected.isfinite().all() and expected.abs().max() == 65504
    assert ((got - expected).abs() <= 0.02 * expected.abs().max()).all()


@pytest.mark.parametrize("name", ["facebook XCA", "LoFTR", "Sana", "EfficientViT", "Florence-2"])
def test_layers_of_one_kind_are_tried_once(name, monkeypatch):
    runs = []
    run = trial.run
    monkeypatch.setattr(trial, "run", lambda *args, **choices: runs.append(args) or run(*args, **choices))
    layer = CASES[name].model()
    model = nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(2))])
    if name == "Florence-2":
        for other in model:
            other.config = layer.config
    if name == "Sana":
        for other in model:
            other.processor = type(layer.processor)()
    assert replace_attention(model) == 3
    assert len(runs) == 1


@pytest.mark.parametrize(
    "name, change",
    [
        ("facebook XCA", lambda m: setattr(m, "num_heads", 2)),
        ("facebook XCA", lambda m: setattr(m, "num_heads", 4.0)),
        ("facebook XCA", lambda m: setattr(m, "proj_drop", nn.ReLU())),
        ("facebook XCA", lambda m: setattr(m.proj, "forward", lambda x: x)),
        ("facebook XCA", lambda m: setattr(m, "proj", nn.Linear(48, 48, bias=False))),
        ("facebook XCA", lambda m: setattr(m, "__class__", type("Derived", (type(m),), {}))),
        ("LoFTR", lambda m: setattr(m, "feature_map", torch.exp)),
        ("Sana", lambda m: m.set_processor(type("Derived", (type(m.processor),), {})())),
        ("Sana", lambda m: setattr(m.processor, "scale", 2.0)),
        ("Florence-2", lambda m: setattr(m, "config", copy.deepcopy(m.config))),
    ],
)
def test_layers_of_different_kinds_are_tried_separately(name, change):
    model = CASES[name].model()
    before = trial.kind(model)
    assert before == trial.kind(model)
    change(model)
    assert trial.kind(model) != before


# ------------------------------------------------------------------------------------------------------------ verbose


class Unlike(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))


def test_verbose(capsys):
    class Almost(MDTA):
        def forward(self, x):
            return super().forward(x) + x

    own_forward = MDTA(8, 2, True)
    own_forward.forward = lambda x: x
    model = nn.ModuleDict(
        {"a": MDTA(8, 2, True), "b": Almost(8, 2, True), "c": own_forward, "d": Unlike(), "e": nn.Linear(2, 2)}
    )
    assert replace_attention(model) == 1
    restore_attention(model)
    assert capsys.readouterr().out == ""
    assert replace_attention(model, verbose=True) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "a: MDTA, replaced (MDTA)",
        "b: Almost, left: has the parts of MDTA, but it computes something else (outputs differ)",
        "c: MDTA, left: has the parts of MDTA, but a forward is set on the instance",
        "d: Unlike, left: has a temperature, but not the parts of a family",
    ]
    assert replace_attention(model["a"], verbose=True) == 0
    assert capsys.readouterr().out == "(the model): MDTA, left: is replaced already\n"
