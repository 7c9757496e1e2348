"""Attention layers of other packages before and after their attention is replaced, for each row of integrated_cases."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import randn
from integrated_cases import CASES, Case, FacebookXCA, assert_same, call, results
from test_nn import randomize
from torch import nn
from torch.nn.utils import parametrize

from xformer_kernels import dispatch
from xformer_kernels.integrations import is_replaced, replace_attention, restore_attention
from xformer_kernels.integrations.families import FAMILIES, OfParts
from xformer_kernels.testing import assert_close


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_families_recognised_by_parts_have_cases():
    by_parts = {name for name, family in FAMILIES.items() if isinstance(family.known, OfParts)}
    assert by_parts == {case.family for case in CASES.values()}


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_same_in_float64(case, form):
    for training in (False, True):
        theirs = case.model(torch.float64).train(training)
        ours = copy.deepcopy(theirs)
        assert replace_attention(ours, form=form) == 1
        args = case.args(torch.float64)
        expected = results(theirs, args)
        with dispatch.record() as ran:
            got = results(ours, args)
        assert {name for name, _ in ran} == {dispatch.choose("auto", "cpu", (torch.float64,), (12,))}
        assert_same(got, expected, case.tolerance)
        assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tolerance(case, dtype):
    """The output and all gradients, with the usual tolerance of the dtype."""
    theirs = case.model(dtype).eval()
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    args = case.args(dtype)
    oracle = results(copy.deepcopy(theirs).double(), args)
    eager, got = results(theirs, args, dtype), results(ours, args, dtype)
    for name, exact in oracle.items():
        assert got[name].dtype == dtype
        assert_close(got[name], eager[name], exact, name)


IMAGES = [name for name, case in CASES.items() if case.images]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_shape_and_memory_format_of_images(name, memory_format):
    model = CASES[name].model().to(memory_format=memory_format)
    args = [a.to(memory_format=memory_format) for a in CASES[name].args()]
    with torch.no_grad():
        expected = model(*args)
        assert replace_attention(model) == 1
        got = model(*args)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.stride() == expected.stride()
    assert got.is_contiguous(memory_format=memory_format)


def test_state_dict_copies_and_restore(case):
    model = case.model(torch.float64).eval()
    before = dict(model.named_parameters())
    keys, args, cls, held = list(model.state_dict()), case.args(torch.float64), type(model), dict(model.__dict__)
    with torch.no_grad():
        expected = call(model, args)
        assert replace_attention(model) == 1 and replace_attention(model) == 0
        assert list(model.state_dict()) == keys and type(model) is cls
        assert all(p is before[name] for name, p in model.named_parameters())
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert is_replaced(copied)
            torch.testing.assert_close(call(copied, args), expected)
        assert restore_attention(model) == 1 and restore_attention(model) == 0
        assert model.__dict__ == held
        assert torch.equal(call(model, args), expected)


class Wrapped(nn.Module):
    """Like the layer of an adapter: the base module and an additional term."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + self.base(x).tanh()


def hook_the_part(model, part, calls):
    getattr(model, part).register_forward_hook(lambda m, i, y: calls.append(y.shape) or 2 * y)


def hook_the_layer(model, part, calls):
    model.register_forward_hook(lambda m, i, y: calls.append(y.shape) or 3 * y)


def wrap_the_part(model, part, calls):
    setattr(model, part, Wrapped(getattr(model, part)))


def set_a_forward(model, part, calls):
    old = getattr(model, part).forward
    getattr(model, part).forward = lambda x: calls.append(x.shape) or 2 * old(x)


def parametrize_a_weight(model, part, calls):
    layer = next(m for m in getattr(model, part).modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)))
    parametrize.register_parametrization(layer, "weight", nn.Tanh())


CHANGES = [hook_the_part, hook_the_layer, wrap_the_part, set_a_forward, parametrize_a_weight]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.part])
def test_changed_parts_are_called(name, change):
    """Parts changed before or after replacement: calls and results are those of the original."""
    case, outcomes = CASES[name], []
    theirs = case.model(torch.float64).eval()
    for steps in (["change"], ["change", "replace"], ["replace", "change"]):
        model, calls = copy.deepcopy(theirs), []
        for step in steps:
            if step == "change":
                change(model, case.part, calls)
            else:
                replace_attention(model)
        outcomes.append((calls, results(model, case.args(torch.float64))))
    for calls, got in outcomes[1:]:
        assert calls == outcomes[0][0]
        assert_same(got, outcomes[0][1], case.tolerance)


@pytest.mark.parametrize("name", ["facebook XCA", "vit-pytorch", "DAT"])
def test_dropout_is_that_of_the_original(name):
    theirs = CASES[name].model(torch.float64).train()
    for m in theirs.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.4
    ours, got = copy.deepcopy(theirs), []
    assert replace_attention(ours) == 1
    for model in (theirs, ours):
        torch.manual_seed(3)
        got.append(results(model, CASES[name].args(torch.float64)))
    assert_same(got[1], got[0])


def test_global_hooks_see_the_calls_of_the_original(case):
    model, seen = case.model(torch.float64).eval(), []
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
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.one_in(2, slow=False)
def test_compiled(case):
    torch._dynamo.reset()
    model = case.model(torch.float64).eval()
    args = case.args(torch.float64)
    expected = results(model, args)
    assert replace_attention(model) == 1
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    args = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    y = compiled(*args)
    (grad,) = torch.autograd.grad(y, args[0], randn(*y.shape, seed=9, dtype=torch.float64))
    assert_same({"y": y, "dx0": grad}, {name: expected[name] for name in ("y", "dx0")}, case.tolerance)


@pytest.mark.parametrize("name", ["Florence-2", "Sana", "EfficientViT", "LoFTR, masks"])
def test_compiled_for_any_size_and_exported(name):
    torch._dynamo.reset()
    model, args = CASES[name].model().eval(), tuple(CASES[name].args())
    with torch.no_grad():
        expected = model(*args)
        assert replace_attention(model) == 1
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        for graph in (compiled, torch.export.export(model, args).module()):
            torch.testing.assert_close(graph(*args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["facebook XCA", "Retinexformer", "Sana"])
def test_a_compiled_module_is_replaced(name):
    """With module.compile() before and after replacement."""
    theirs, args = CASES[name].model(torch.float64).eval(), CASES[name].args(torch.float64)
    for first in ("compile", "replace"):
        torch._dynamo.reset()
        ours = copy.deepcopy(theirs)
        for step in (first, "replace" if first == "compile" else "compile"):
            if step == "compile":
                ours.compile(backend="eager")
            else:
                assert replace_attention(ours) == 1
        with torch.no_grad():
            torch.testing.assert_close(call(ours, args), call(theirs, args), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "name, names",
    [
        ("Retinexformer", ["x_in", "illu_fea_trans"]),
        ("Sana of two inputs", ["hidden_states", "encoder_hidden_states"]),
        ("LoFTR, masks", ["queries", "keys", "values", "q_mask", "kv_mask"]),
    ],
)
def test_inputs_by_name(name, names):
    """Inputs by keyword, as the models around these layers pass them; any number of the first ones by position."""
    model, args = CASES[name].model(torch.float64), CASES[name].args(torch.float64)
    expected = call(model, args)
    replace_attention(model)
    for first in range(len(args)):
        with dispatch.record() as ran:
            got = model(*args[:first], **dict(zip(names[first:], args[first:], strict=True)))
        assert ran
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if name != "Sana of two inputs":  # diffusers ignores them there
        with pytest.raises(TypeError, match="unexpected keyword"):
            model(*args, light=args[0])


def test_models_without_weights(case):
    """Weights loaded later. With fake tensors no trial is possible, and nothing is replaced."""
    theirs = case.model().eval()
    with torch.device("meta"):
        ours = case.made()
    assert replace_attention(ours) == 1
    ours = ours.to_empty(device="cpu").eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(*case.args()), theirs(*case.args()), rtol=1e-4, atol=1e-4)
    with torch._subclasses.FakeTensorMode():
        assert replace_attention(case.made()) == 0


def test_under_autocast(case):
    """Replaced under autocast too: the dtype is that of the original, and results are close to float32 ones."""
    model, args = case.model().eval(), case.args()
    exact = model(*args)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(*args)
        assert replace_attention(model) == 1
        got = model(*args)
    assert got.dtype == expected.dtype
    errors = [(y - exact).abs().max() for y in (got, expected)]
    assert errors[0] <= 2 * errors[1] + 1e-3 * exact.abs().max()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_replaced_in_other_modes(context):
    for name in ("facebook XCA", "Sana", "LoFTR"):
        model = CASES[name].model()
        with context():
            assert replace_attention(model) == 1


def test_copy_of_xca_in_a_block_of_timm():
    """A block of timm whose attention is not timm's calls the attention."""
    from timm.models.xcit import XCABlock

    theirs = XCABlock(48, 4)
    theirs.attn = FacebookXCA(48, 4)
    theirs = randomize(theirs).double().eval()
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    x = randn(2, 63, 48, seed=1, dtype=torch.float64)
    torch.testing.assert_close(ours(x, 7, 9), theirs(x, 7, 9), rtol=1e-8, atol=1e-8)
