"""The module families that :func:`replace_attention` supports, and the conditions for running their fused forwards.

A family is recognised by its class or its submodules, and then tested: the fused forward must match the forward of the
module's own class for small random inputs in float64 (:mod:`.trial`). The fused forward runs if everything that torch
would run inside the module has the class and state that it reproduces; otherwise the forward of the module's class
runs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xformer_kernels import ops
from xformer_kernels.integrations import davit, images, linear, tokens, trial
from xformer_kernels.integrations.blocks import edgenext_block, xca, xcit_block
from xformer_kernels.integrations.bound import Processor, Replaced, bind, bound_forward, how_replaced
from xformer_kernels.integrations.mdta import is_mdta_shaped, mdta, mdta_inputs, serves_mdta
from xformer_kernels.integrations.parts import serves_tensor
from xformer_kernels.layer.call import Call
from xformer_kernels.modules import dropout_p, has_global_hooks, runs_forward_of
from xformer_kernels.nn import may_fuse
from xformer_kernels.spec import Spec


class OfClass(NamedTuple):
    """Recognises modules of one timm class. The class is tested once, on a small module."""

    path: str  # of the Python module that defines it
    name: str
    arguments: dict[str, Any]  # constructor arguments of the module to test
    inputs: tuple[Any, ...]  # inputs of that module, see trial.run

    @property
    def original(self) -> Any:
        """The class; None if its Python module is not loaded, so that no model can contain it."""
        return getattr(sys.modules.get(self.path), self.name, None)

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is an instance of this class, or of a derived class with the same forward."""
        original = self.original
        return original is not None and isinstance(module, original) and type(module).forward is original.forward


class OfParts(NamedTuple):
    """Recognises modules of any class by their submodules. Each module is tested itself."""

    shaped: Callable[[nn.Module], bool]  # whether a module has the submodules
    inputs: Callable[[nn.Module], tuple[Any, ...]]  # inputs for the test, see trial.run


class Family(NamedTuple):
    """Modules that one function serves."""

    fused: Callable[..., Tensor]  # (module, call, *inputs); inputs that have a default may be omitted
    serves: Callable[..., bool]  # (module, *inputs): whether `fused` reproduces what the module would run
    known: OfClass | OfParts
    whole_block: bool = False  # a block around a layer, which is counted instead
    processor: bool = False  # whether diffusers keeps the computation in ``module.processor``


def _serves_xca(module: Any, x: Any) -> bool:
    return serves_tensor(x, 3) and _is_xca(module) and dropout_p(module.attn_drop) is not None


def _is_xca(module: Any) -> bool:
    """Whether there is one temperature per head or one for all heads, as xfa requires."""
    t = module.temperature
    return (
        isinstance(t, Tensor)
        and t.is_floating_point()
        and (t.shape == (module.num_heads, 1, 1) or (t.numel() == 1 and t.dim() <= 3))
        and not ops.torch_only(t)
    )


def _serves_half_block(attn: Any, norm: Any, layer_scale: Any) -> bool:
    """Whether `attn` is replaced, runs only our forward, and can be fused with the surrounding operations."""
    replaced, forward = how_replaced(attn), bound_forward(attn)
    if replaced is None or forward is None:
        return False
    family = FAMILIES[replaced.family]
    return (
        family.fused is xca
        and isinstance(family.known, OfClass)
        and agrees(replaced.family, family.known)
        and runs_forward_of(attn, family.known.original, forward=forward)
        and _is_xca(attn)
        and may_fuse(norm, attn, layer_scale)
    )


def _serves_xcit_block(module: Any, x: Any, H: Any, W: Any) -> bool:
    return serves_tensor(x, 3) and _serves_half_block(module.attn, module.norm1, module.gamma1)


def _serves_edgenext_block(module: Any, x: Any) -> bool:
    return serves_tensor(x, 4) and _serves_half_block(module.xca, module.norm_xca, module.gamma_xca)


_SPEC = Spec()
_SMALL = {"dim": 8, "num_heads": 2}
FAMILIES: dict[str, Family] = {
    "XCA": Family(xca, _serves_xca, OfClass("timm.models.xcit", "XCA", _SMALL, ((2, 6, 8),))),
    "CrossCovarianceAttn": Family(
        xca, _serves_xca, OfClass("timm.models.edgenext", "CrossCovarianceAttn", _SMALL, ((2, 6, 8),))
    ),
    "XCABlock": Family(
        xcit_block, _serves_xcit_block, OfClass("timm.models.xcit", "XCABlock", _SMALL, ((2, 6, 8), 2, 3)),
        whole_block=True,
    ),
    "SplitTransposeBlock": Family(
        edgenext_block, _serves_edgenext_block,
        OfClass(
            "timm.models.edgenext", "SplitTransposeBlock", {**_SMALL, "num_scales": 3, "ls_init_value": 0.5},
            ((2, 8, 2, 3),),
        ),
        whole_block=True,
    ),
    "XCA copy": Family(xca, _serves_xca, OfParts(tokens.is_xca_shaped, tokens.xca_inputs)),
    "XCAttention": Family(
        tokens.vit_xca, tokens.serves_vit_xca, OfParts(tokens.is_vit_xca_shaped, tokens.vit_xca_inputs)
    ),
    "FastChannelAttention": Family(tokens.fdat, tokens.serves_fdat, OfParts(tokens.is_fdat_shaped, tokens.fdat_inputs)),
    "Adaptive_Channel_Attention": Family(
        tokens.dat, tokens.serves_dat, OfParts(tokens.is_dat_shaped, tokens.dat_inputs)
    ),
    "ISA": Family(tokens.isa, tokens.serves_isa, OfParts(tokens.is_isa_shaped, tokens.isa_inputs)),
    "MDTA": Family(mdta, serves_mdta, OfParts(is_mdta_shaped, mdta_inputs)),
    "CAB": Family(
        images.cross_mdta, images.serves_cross_mdta, OfParts(images.is_cross_mdta_shaped, images.cross_mdta_inputs)
    ),
    "IG_MSA": Family(images.ig_msa, images.serves_ig_msa, OfParts(images.is_ig_msa_shaped, images.ig_msa_inputs)),
    "ChannelAttention": Family(
        davit.channel_attention, davit.serves_channel_attention,
        OfParts(davit.is_channel_attention_shaped, davit.channel_attention_inputs),
    ),
    "ChannelAttentionV2": Family(
        davit.channel_attention_v2, davit.serves_channel_attention_v2,
        OfParts(davit.is_channel_attention_v2_shaped, davit.channel_attention_inputs),
    ),
    "LiteMLA": Family(
        linear.lite_mla, linear.serves_lite_mla, OfParts(linear.is_lite_mla_shaped, linear.lite_mla_inputs)
    ),
    "SanaMultiscaleLinearAttention": Family(
        linear.multiscale, linear.serves_multiscale, OfParts(linear.is_multiscale_shaped, linear.multiscale_inputs),
        processor=True,
    ),
    "SanaLinearAttnProcessor2_0": Family(
        linear.sana, linear.serves_sana, OfParts(linear.is_sana_shaped, linear.sana_inputs), processor=True
    ),
    "LinearAttention": Family(linear.loftr, linear.serves_loftr, OfParts(linear.is_loftr_shaped, linear.loftr_inputs)),
}  # fmt: skip


class Found(NamedTuple):
    """The result of :func:`look`: the family if the module is to be replaced; else why not, if it resembles one."""

    family: str | None
    why: str = ""


def look(module: nn.Module, tried: dict[Any, trial.Trial]) -> Found:
    """The family by which to replace `module`. tried: trials of the model's other modules."""
    for name, family in FAMILIES.items():
        known = family.known
        if not (known.holds(module) if isinstance(known, OfClass) else known.shaped(module)):
            continue
        like = name if isinstance(known, OfClass) else f"has the parts of {name}"
        if "forward" in module.__dict__:  # set on the instance: it may compute something other than the class
            return Found(None, f"{like}, but a forward is set on the instance")
        if isinstance(known, OfClass):
            changed = agrees(name, known) is False
            return Found(None, f"{name}, but the installed class computes something else") if changed else Found(name)
        key = (name, trial.kind(module))
        if key not in tried:
            tried[key] = trial.run(lambda: module, _by_reference(name), partial(known.inputs, module), thorough=True)
        return Found(name) if tried[key].agrees else Found(None, f"{like}, but {tried[key].why}")
    scaled = any(isinstance(getattr(module, name, None), Tensor) for name in ("temperature", "temp", "rescale"))
    return Found(None, "has a temperature, but not the parts of a family" if scaled else "")


def replace(module: Any, family: str, form: str, backend: str) -> None:
    """Makes `module`, of that family, compute with our kernels."""
    fused, *_, processor = FAMILIES[family]
    original = type(module.processor).__call__ if processor else type(module).forward
    inputs = list(inspect.signature(fused).parameters.values())[2:]
    names = list(inspect.signature(original).parameters)[2 if processor else 1 :]
    required = sum(parameter.default is parameter.empty for parameter in inputs)
    replaced = Replaced(family, form, backend, tuple(names[: len(inputs)]), required)
    if processor:
        module.processor = Processor(compute, replaced, module.processor)
    else:
        bind(module, forward, replaced)


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a replaced module runs."""
    replaced, original = how_replaced(module), type(module).forward
    if replaced is None:
        return original(module, *args, **kwargs)
    return compute(module, replaced, original, args, kwargs)


def compute(
    module: nn.Module, replaced: Replaced, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The family's fused forward if it reproduces ``original(module, ...)``; otherwise ``original`` itself."""
    fused, serves, known, *_ = FAMILIES[replaced.family]
    names = replaced.names[len(args) :]
    if len(args) <= len(replaced.names) and {*replaced.names[len(args) : replaced.required]} <= kwargs.keys() <= {
        *names
    }:
        given = (*args, *(kwargs.get(name) for name in names))
        if serves(module, *given) and (isinstance(known, OfParts) or agrees(replaced.family, known)):
            return fused(module, _call(replaced), *given)
    return original(module, *args, **kwargs)


def _call(replaced: Replaced) -> Call:
    return Call(_SPEC, None, 0.0, replaced.form, None, replaced.backend)


def _by_reference(name: str) -> Callable[..., Tensor]:
    """The fused forward with the reference backend: only the formula is tested, whatever the environment requests."""
    call = _call(Replaced(name, "direct", "reference"))
    return lambda module, *args: FAMILIES[name].fused(module, call, *args)


_verdicts: dict[Any, bool] = {}
"""Keyed by the forward of the original class, which a user may have changed."""


@torch.compiler.assume_constant_result
def agrees(name: str, known: OfClass) -> bool | None:
    """Whether the installed class computes the family's formula: tested once, on a small module with random weights.

    None if that cannot be tested now: under fake tensors, meta devices and global module hooks. It is then tested at
    the next call.
    """
    verdict = _verdicts.get(known.original.forward)
    if verdict is None and not has_global_hooks():
        small = partial(known.original, **known.arguments)
        verdict = trial.run(small, _by_reference(name), lambda: known.inputs, thorough=True).agrees
        if verdict is not None:
            _verdicts[known.original.forward] = verdict
    return verdict
