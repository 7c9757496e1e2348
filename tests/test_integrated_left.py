"""What replace_attention leaves alone though it is like the layers of a family, and what it says about that."""

from __future__ import annotations

import copy

import pytest
import torch
from test_integrated_families import CASES, Case, FacebookXCA
from test_integrations import MDTA
from torch import nn

from xformer_kernels.integrations import replace_attention, restore_attention


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_other_formulas_are_left_alone(case):
    """The parts alone do not make a family: neither where outputs differ, nor where only gradients or modes do."""
    cls = type(case.make())

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
        model = case.make()
        model.__class__ = derived
        assert replace_attention(model) == 0, derived.__name__


@pytest.mark.parametrize("name, value", [("sizes", (8, 8)), ("act", torch.tanh), ("_maps", []), ("_maps", {})])
def test_modules_that_hold_more_than_numbers_are_left_alone(name, value):
    """As windows of other sizes than the trial's, or lists to which forward appends."""
    for model in (MDTA(8, 2, True), FacebookXCA(8, 2)):
        setattr(model, name, value)
        assert replace_attention(model) == 0


def test_monai_with_flash_attention_is_left_alone():
    """Its temperature is the mean over heads, and has no gradient."""
    cablock = pytest.importorskip("monai.networks.blocks.cablock", reason="MONAI is not installed")
    pytest.importorskip("einops", reason="MONAI's CABlock needs einops")
    for heads in (1, 2):
        assert replace_attention(cablock.CABlock(2, 8, heads, True, flash_attention=True)) == 0


def test_a_method_that_was_set_is_called():
    model = CASES["MONAI 2D"].make(torch.float64)
    x = CASES["MONAI 2D"].args(torch.float64)
    expected = model(*x)
    replace_attention(model)
    normal = model._attention_fn
    model._attention_fn = lambda q, k, v: normal(q, k, 0 * v)
    assert (model(*x) - expected).abs().max() > 1e-3
    model = CASES["MONAI 2D"].make()
    model._attention_fn = lambda q, k, v: v
    assert replace_attention(model) == 0


def test_a_change_of_the_softmax_of_vit_pytorch_counts():
    case = CASES["vit-pytorch"]
    theirs = case.make(torch.float64)
    ours = copy.deepcopy(theirs)
    replace_attention(ours)
    for model in (theirs, ours):
        model.attend = nn.Softmax(dim=-2)
    torch.testing.assert_close(ours(*case.args(torch.float64)), theirs(*case.args(torch.float64)))


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
