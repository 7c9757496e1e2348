"""Replaced modules when models are copied, compiled, sharded, traced and cast."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import randn
from test_integrations import MDTA
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from xformer_kernels import backends, dispatch
from xformer_kernels.integrations import families, is_replaced, replace_attention

pytest.importorskip("timm", reason="timm, whose models are converted, is not installed")
from replaced_cases import CALLS, HEADS, KINDS, TOKENS, C, assert_same, note, results
from timm.utils import AttentionExtract


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def both(kind):
    """The original, and a copy of it with the attention replaced."""
    theirs = kind.model()
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    return theirs, ours


def test_copies_are_replaced_and_independent(kind, both):
    theirs, ours = both
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(is_replaced(a) == is_replaced(b) for a, b in zip(ours.modules(), copied.modules(), strict=True))
        with torch.no_grad():
            for p in copied.parameters():
                p.mul_(0.5)
        changed = copy.deepcopy(theirs)
        with torch.no_grad():
            for p in changed.parameters():
                p.mul_(0.5)
        assert_same(kind, copied, changed)
        assert_same(kind, ours, theirs)


def test_data_parallel_replicas_use_their_parameters(kind, both):
    """Replicates modules as nn.DataParallel does for each device, here all on the CPU."""
    theirs, ours = both

    def replica(module: nn.Module) -> nn.Module:
        new = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else replica(child)
        for name, p in module._parameters.items():
            setattr(new, name, None if p is None else p.detach() * 0.5)
        for name, b in module._buffers.items():
            new._buffers[name] = b
        return new

    with dispatch.record() as ran:
        got = replica(ours)(kind.x(), *kind.inputs[1:])
    assert any(op in ("xfa_forward", "layer_forward") for _, op in ran)
    torch.testing.assert_close(got, replica(theirs)(kind.x(), *kind.inputs[1:]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["", "dynamic"])
def test_compiled(kind, both, dynamic):
    theirs, ours = both
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with dispatch.record() as ran:
        got = results(kind, compiled)
    for name, value in results(kind, theirs).items():
        compiled_name = name if name in ("y", "dx") else f"d_orig_mod.{name[1:]}"
        torch.testing.assert_close(got[compiled_name], value, rtol=1e-8, atol=1e-8, msg=name)
    assert any(op in ("xfa_forward", "layer_forward") for _, op in ran)
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exported(kind, both, strict):
    theirs, ours = both
    args = (kind.x(), *kind.inputs[1:])
    with torch.no_grad():
        exported = torch.export.export(ours, args, strict=strict)
        torch.testing.assert_close(exported.module()(*args), theirs(*args), rtol=1e-8, atol=1e-8)
    assert any("xformer_kernels" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("kind", [KINDS[name] for name in ("XCA", "CrossCovarianceAttn", "XCABlock")])
def test_traced_by_fx(kind, both):
    """Tracing records torch's operations. The other originals cannot be traced: they iterate over shapes."""
    theirs, ours = both
    concrete = dict(zip(("H", "W"), kind.inputs[1:], strict=False))
    traced = torch.fx.symbolic_trace(ours, concrete_args=concrete)
    torch.testing.assert_close(traced(kind.x(), *kind.inputs[1:]), theirs(kind.x(), *kind.inputs[1:]))


def test_global_hooks_see_every_module(kind, both):
    seen: list[list[str]] = []
    outputs = []
    for model in both:
        seen.append([])
        handle = register_module_forward_hook(lambda module, *_: seen[-1].append(type(module).__name__))
        outputs.append(results(kind, model)["y"])
        handle.remove()
    assert seen[0] == seen[1]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)


def test_replacing_calls_no_user_hooks(kind):
    """Trials run on copies."""
    model = kind.model()
    for module in model.modules():
        module.register_forward_hook(note)
    CALLS.clear()
    handle = register_module_forward_hook(note)
    replace_attention(model)
    handle.remove()
    assert not CALLS


def test_counting_flops_does_not_change_what_runs(kind, both):
    for form in ("gram", "direct"):
        ours = copy.deepcopy(both[0])
        replace_attention(ours, form=form)
        with dispatch.record() as plain:
            ours(kind.x(), *kind.inputs[1:])
        with dispatch.record() as counted, FlopCounterMode(display=False):
            ours(kind.x(), *kind.inputs[1:])
        assert plain == counted


def test_subclasses_keep_their_attributes(kind):
    base: Any = type(kind.model())

    class Mine(base):
        def answer(self):
            return 42

        def __call__(self, *args):
            return 2 * super().__call__(*args)

    model = kind.model()
    model.__class__ = Mine
    expected = results(kind, model)["y"]
    assert replace_attention(model) == 1
    assert type(model) is Mine and model.answer() == 42
    torch.testing.assert_close(results(kind, model)["y"], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("first", ["replace", "shard"])
def test_fsdp(kind, first, tmp_path):
    """fully_shard on one rank, applied to the layer and to the module around it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    theirs, ours = kind.model(), kind.model()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for step in (first, *({"replace", "shard"} - {first})):
            if step == "replace":
                assert replace_attention(ours) == 1
            else:
                if kind.attn:
                    fully_shard(kind.layer(ours), mesh=mesh)
                fully_shard(ours, mesh=mesh)
        assert isinstance(ours, FSDPModule) and isinstance(kind.layer(ours), type(kind.layer(theirs)))
        assert hasattr(ours, "set_requires_gradient_sync")
        x = kind.x()
        got, expected = (model(x, *kind.inputs[1:]) for model in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
        got.sum().backward()
        expected.sum().backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-7, atol=1e-7, msg=name)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norms", [torch.float32, None], ids=["norms in float32", ""])
def test_autocast_runs_where_torch_does(kind, both, weights, norms):
    """Weights in a dtype other than that of autocast, and layer norms left in float32."""
    outputs = []
    for model in both:
        model = copy.deepcopy(model).to(weights)
        for module in model.modules():
            if norms is not None and isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                module.to(norms)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            try:
                outputs.append(model(kind.x().float(), *kind.inputs[1:]))
            except RuntimeError as error:
                outputs.append(str(error))
    theirs, ours = outputs
    if isinstance(theirs, str):
        assert theirs == ours, "what torch refuses"
        return
    assert ours.dtype == theirs.dtype
    exact = both[0](kind.x(), *kind.inputs[1:])
    error = [(y.double() - exact).abs().max() / exact.abs().max() for y in (theirs, ours)]
    assert error[1] <= 2 * error[0] + 2**-7


class Scaled(Tensor):
    """A minimal weight-only quantized tensor: it supports torch's operators, by dequantization, and no others."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: float) -> Any:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data: Tensor, scale: float) -> None:
        self.data_, self.scale = data, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} of {cls.__name__}")
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].data_, args[0].scale)
        plain = torch.utils._pytree.tree_map_only(Scaled, lambda t: t.data_ * t.scale, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


@pytest.mark.parametrize("tokens", [(4, 6), (64, 96)], ids=["few tokens", "many tokens"])
def test_weights_of_a_tensor_subclass(kind, both, tokens):
    """For weights such as quantized tensors or DTensors, torch's operators are used, for few and for many tokens."""
    h, w = tokens
    args = (randn(1, h * w, C, seed=1, dtype=torch.float64), h, w)
    args = args[: len(kind.inputs)] if kind.inputs[0] is TOKENS else (args[0].mT.reshape(1, C, h, w),)
    with torch.no_grad():
        expected = both[0](*args)
        for model in both:
            for part in ("qkv", "proj"):
                linear = kind.part(model, part)
                linear.weight = nn.Parameter(Scaled(linear.weight.detach() * 4, 0.25), requires_grad=False)
        for model in both:
            torch.testing.assert_close(model(*args), expected, rtol=1e-8, atol=1e-8)


def test_attention_maps_are_extracted():
    """AttentionExtract of timm, which hooks attn_drop, works."""
    theirs = KINDS["XCABlock"].model()
    ours = copy.deepcopy(theirs)
    replace_attention(ours)
    maps = []
    for model in (theirs, ours):
        extract = AttentionExtract(model, method="hook")
        model(KINDS["XCABlock"].x(), 10, 12)
        maps.append(extract.hooks.get_output(torch.device("cpu")))
    assert maps[0] and maps[0].keys() == maps[1].keys()
    for name in maps[0]:
        torch.testing.assert_close(maps[1][name], maps[0][name])


# Results of trials in a temporary state are not cached.


@pytest.fixture
def untried(monkeypatch):
    """Clears the cached results of trials."""
    monkeypatch.setattr(families, "_verdicts", {})


@pytest.mark.parametrize("state", ["fake", "meta", "empty weights", "global hook", "default device"])
def test_trial_in_a_temporary_state_is_repeated(state, kind, untried):
    with torch.no_grad():
        if state == "fake":
            with torch._subclasses.FakeTensorMode():
                replace_attention(kind.make(C, num_heads=HEADS))
        elif state == "meta":
            with torch.device("meta"):
                replace_attention(kind.make(C, num_heads=HEADS))
        elif state == "empty weights":
            from accelerate import init_empty_weights

            with init_empty_weights():
                replace_attention(kind.make(C, num_heads=HEADS))
        elif state == "global hook":
            handle = register_module_forward_hook(note)
            replace_attention(kind.model())
            handle.remove()
        else:
            torch.set_default_device("meta")
            try:
                replace_attention(kind.make(C, num_heads=HEADS))
            finally:
                torch.set_default_device(None)
    model = kind.model()
    assert replace_attention(model, form="gram") == 1
    with dispatch.record() as ran:
        results(kind, model)
    op = "xfa_forward" if kind is KINDS["MDTA"] else "layer_forward"
    assert any(name == op for _, name in ran)


@pytest.mark.parametrize("state", ["meta", "empty weights"])
def test_models_without_weights_are_replaced(state, kind):
    """The weights are loaded later, as for large models."""
    theirs = kind.model().float()
    with torch.device("meta"):
        ours = kind.make(C, num_heads=HEADS)
    assert replace_attention(ours) == 1
    ours = ours.to_empty(device="cpu").eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(
        ours(kind.x().float(), *kind.inputs[1:]), theirs(kind.x().float(), *kind.inputs[1:]), rtol=1e-4, atol=1e-4
    )


def test_environment_does_not_affect_trials(kind, untried, monkeypatch, forget):
    """Also if the environment requests a backend that supports GPUs only: the trial runs on the CPU."""
    module = backends.load("cuda")[0].module
    if module is None:
        pytest.skip("the CUDA backend is not built here, not even emulated")
    monkeypatch.setattr(module, "unsupported", lambda *_: ["tensors are on cpu"])
    monkeypatch.setenv("XFORMER_KERNELS_BACKEND", "cuda")
    assert replace_attention(kind.model()) == 1


def test_other_formula_hidden_by_zero_weights_is_not_replaced():
    """The trial uses random weights: with those of the module, projections of zero, any formula would agree."""

    class Almost(MDTA):
        def forward(self, x):
            return super().forward(1.5 * x)

    model = Almost(C, HEADS, True)
    for p in model.project_out.parameters():
        nn.init.zeros_(p)
    assert replace_attention(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mdta_is_recognised_under_autocast(dtype):
    with torch.autocast("cpu", dtype):
        assert replace_attention(MDTA(C, HEADS, True)) == 1
