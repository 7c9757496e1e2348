"""Cases for layers, half blocks and whole models: the providers, and the check of their results.

As in :mod:`bench.providers`, the baseline is ``eager``; in float64 it is also the oracle. Of our layers, ``cpp`` (or
another backend) is the default, and ``cpp-gram`` and ``cpp-direct`` are the two forms that it chooses from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

import xformer_kernels as xk
from bench import mdta
from bench.providers import Case, Errors, Function, compiled
from bench.workloads import BlockShape, LayerShape, ModelShape
from xformer_kernels import dispatch
from xformer_kernels.integrations import is_replaced, replace_attention

KERNELS = tuple(name for name in dispatch.names() if name != "reference")
FORMS = ("gram", "direct")
SDPA_MAP = 2**26
"""Maximum number of elements of the map of softmax attention, which the check of its gradients keeps in float64;
larger cases are skipped."""
ULPS = 8
"""Error that :func:`check_gradients` allows in addition to twice the error of the baseline."""
HALVES = (("norm1", "attn", "gamma1"), ("norm_xca", "xca", "gamma_xca"))
"""Names of norm, attention and layer scale in XCiT and EdgeNeXt of timm."""


class HalfBlock(nn.Module):
    """``x + layer_scale * attn(norm(x))`` as timm computes it.

    The state dict is that of :class:`xformer_kernels.XFABlock`, if the one of `attn` is that of its attention.
    """

    def __init__(self, norm: nn.Module, attn: nn.Module, layer_scale: nn.Parameter | None) -> None:
        super().__init__()
        self.layer_scale = layer_scale
        self.attn = attn
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(self.norm(x))
        return x + (y if self.layer_scale is None else self.layer_scale * y)


# --------------------------------------------------------------------------------------------------------------- layers


def layer_cases(shape: LayerShape, dtype: torch.dtype, device: str, wanted: set[str]) -> Iterator[Case]:
    """XCA of timm, alone or in a half block; the layers of all providers have its weights.

    ``sdpa`` is timm's attention over tokens, of the same size.
    """
    from timm.models.vision_transformer import Attention
    from timm.models.xcit import XCA

    torch.manual_seed(0)
    block = isinstance(shape, BlockShape)
    eager: nn.Module = XCA(shape.C, shape.heads, qkv_bias=True)
    if block:
        eager = HalfBlock(nn.LayerNorm(shape.C, eps=1e-6), eager, nn.Parameter(torch.full((shape.C,), 0.5)))
    eager = eager.to(device, dtype)
    x = torch.randn(shape.B, shape.N, shape.C, device=device).to(dtype)
    baseline = Baseline(eager, x)
    yield from _baseline_cases(baseline, wanted)
    for name in KERNELS:
        for form in ("auto", *FORMS):
            provider = name if form == "auto" else f"{name}-{form}"
            dims = (shape.C,) if form == "gram" else (shape.C // shape.heads,)
            norm = None if form == "gram" else "token"
            if provider in wanted and not dispatch.reasons_against(name, device, (dtype,), dims, norm):
                ours = _our_layer(shape, eager, form, name)
                yield _module_case(provider, ours, baseline, form=_form_of(ours, x))
    if "sdpa" in wanted and not block and shape.B * shape.heads * shape.N**2 <= SDPA_MAP:
        attention = Attention(shape.C, shape.heads, qkv_bias=True).to(device, dtype)
        plain = copy.deepcopy(attention)
        plain.__dict__["fused_attn"] = False  # the unfused implementation
        yield _module_case("sdpa", attention, Baseline(plain, x))


def _our_layer(shape: LayerShape, eager: nn.Module, form: str, backend: str) -> nn.Module:
    ours: nn.Module
    if isinstance(shape, BlockShape):
        ours = xk.XFABlock(shape.C, shape.heads, True, layer_scale=0.0, form=form, backend=backend)
    else:
        ours = xk.XFA(shape.C, shape.heads, True, form=form, backend=backend)
    like = next(eager.parameters())
    ours.to(like.device, like.dtype).load_state_dict(eager.state_dict())
    return ours


def _form_of(ours: nn.Module, x: Tensor) -> Callable[[], str]:
    layer = ours.attn if isinstance(ours, xk.XFABlock) else ours
    assert isinstance(layer, xk.XFA)
    return lambda: xk.explain_layer(x, *layer.weights(), form=layer.form, backend=layer.backend).form


# --------------------------------------------------------------------------------------------------------------- models


def model_cases(shape: ModelShape, dtype: torch.dtype, device: str, wanted: set[str]) -> Iterator[Case]:
    """A model before and after replace_attention, and the attention of the original alone, to compute its share."""
    model = create_model(shape.name).to(device, dtype)
    x = torch.randn(shape.B, 3, shape.size, shape.size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    baseline = Baseline(model, x)
    yield from _baseline_cases(baseline, wanted)
    replaced = None
    for name in KERNELS:
        named = {name, f"{name}+compile"} & wanted
        if not named or dispatch.reasons_against(name, device, (dtype,), (), "token"):
            continue
        replaced = copy.deepcopy(model)
        replace_attention(replaced, backend=name)
        for provider in sorted(named):
            yield _module_case(provider, replaced, baseline, compile=provider != name)
    if replaced is not None and "eager" in wanted:
        yield _attention_case(model, replaced, x)


def create_model(name: str, pretrained: bool = False) -> nn.Module:
    """A model in eval mode. In untrained models, layer scales are set to 0.5; at 1e-6 the layers hardly contribute."""
    torch.manual_seed(0)
    if name == "mdta_48":
        return mdta.mdta_48().eval()
    import timm

    model: nn.Module = timm.create_model(name, pretrained=pretrained).eval()
    if not pretrained:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "gamma" in key:
                    parameter.fill_(0.5)
    return model


def replaced_parts(model: nn.Module, replaced: nn.Module) -> list[nn.Module]:
    """The original of each module that replace_attention replaced: attention layers, or half blocks where replaced."""
    changed = {path for path, module in replaced.named_modules() if is_replaced(module)}
    parts: list[nn.Module] = []
    for path, parent in model.named_modules():
        for name, attention in parent.named_children():
            whole = f"{path}.{name}" if path else name
            if whole not in changed or any(other.startswith(f"{whole}.") for other in changed):
                continue
            half = next((names for names in HALVES if names[1] == name and hasattr(parent, names[0])), None)
            if path in changed and half is not None:
                norm, _, scale = (getattr(parent, key) for key in half)
                parts.append(HalfBlock(norm, attention, scale))
            else:
                parts.append(attention)
    return parts


def _attention_case(model: nn.Module, replaced: nn.Module, x: Tensor) -> Case:
    """All replaced modules of the original, called in sequence, each with the input that it receives for x."""
    parts = replaced_parts(model, replaced)
    inputs: dict[nn.Module, Tensor] = {}
    hooked = {part.norm if isinstance(part, HalfBlock) else part: part for part in parts}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, part=part: inputs.update({part: given[0].detach()}))
        for module, part in hooked.items()
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    leaves = {part: given.clone().requires_grad_() for part, given in inputs.items()}
    random = torch.Generator().manual_seed(1)
    grads = {part: torch.randn(given.shape, generator=random).to(x) for part, given in inputs.items()}

    def forward() -> object:
        with torch.no_grad():
            return [part(given) for part, given in inputs.items()]

    def both() -> list[Tensor]:
        return [
            g
            for part, leaf in leaves.items()
            for g in torch.autograd.grad(part(leaf), (leaf, *part.parameters()), grads[part])
        ]

    return Case("attention", forward, both, lambda: None, part=True)


# -------------------------------------------------------------------------------------------------------------- modules


class Baseline:
    """A module, its input and an output gradient; the expected results are computed once, on first use."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x, self.leaf = module, x, x.detach().requires_grad_()
        with torch.no_grad():
            y = module(x)
        generator = torch.Generator(x.device).manual_seed(1)
        self.dy = torch.randn(y.shape, generator=generator, device=x.device).to(x)

    @cached_property
    def eager(self) -> list[Tensor]:
        return _gradients(self.module, self.module, self.leaf, self.dy)

    @cached_property
    def oracle(self) -> list[Tensor]:
        wide = copy.deepcopy(self.module).double()
        return _gradients(wide, wide, self.x.double().requires_grad_(), self.dy.double())


def _gradients(module: nn.Module, function: Function, leaf: Tensor, dy: Tensor) -> list[Tensor]:
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y, (leaf, *module.parameters()), dy)]


def _baseline_cases(eager: Baseline, wanted: set[str]) -> Iterator[Case]:
    for provider in ("eager", "compile"):
        if provider in wanted:
            yield _module_case(provider, eager.module, eager, compile=provider == "compile")


def _module_case(
    provider: str,
    module: nn.Module,
    baseline: Baseline,
    compile: bool = False,
    form: Callable[[], str] | None = None,
) -> Case:
    function = compiled(module) if compile else module

    def check() -> Errors:
        names = ["y", "dx", *(f"d{name}" for name, _ in module.named_parameters())]
        return check_gradients(names, gradients(), baseline.eager, baseline.oracle)

    def gradients() -> list[Tensor]:
        return _gradients(module, function, baseline.leaf, baseline.dy)

    def forward() -> object:
        with torch.no_grad():
            return function(baseline.x)

    return Case(provider, forward, gradients, check, weights_from=2, form=form)


def check_gradients(names: list[str], result: list[Tensor], eager: list[Tensor], oracle: list[Tensor]) -> Errors:
    """Checks the results of a deep model together, since each gradient contains the errors of all layers.

    The largest error, relative to the largest element of its tensor, may be at most twice that of the baseline plus a
    few ulp (:data:`ULPS`). Gradients that are zero up to rounding are ignored. The first tensor is the output.

    Returns:
        The relative differences of the output, and of the worst gradient, from the baseline.

    Raises:
        AssertionError: the error is larger, or a result is not finite.
    """
    largest = max(x.abs().max().item() for x in oracle)

    def errors(tensors: list[Tensor], exact: list[Tensor]) -> list[tuple[float, str]]:
        found = []
        for name, x, other, unit in zip(names, tensors, exact, units, strict=True):
            if not x.isfinite().all():
                raise AssertionError(f"{name} is not finite")
            zero = unit <= 1e-12 * largest
            found.append((0.0 if zero else ((x.double() - other).abs().max() / unit).item(), name))
        return found

    units = [x.abs().max().item() for x in oracle]
    error, where = max(errors(result, oracle))
    allowed = 2 * max(errors(eager, oracle))[0] + ULPS * torch.finfo(result[0].dtype).eps
    if not error <= allowed:
        raise AssertionError(f"relative error {error:.2e} of {where} > {allowed:.2e}")
    output, *gradients = errors(result, eager)
    return Errors(output[0], max((gradient for gradient, _ in gradients), default=0.0))
