"""What :func:`replace_attention` serves: one table of families, and when the fused forward of one may run.

A family is recognised by class or by its parts, and then tried: the fused forward must give what the module's own
class computes, for small random numbers in float64 (:mod:`.trial`). It runs where everything that torch would have run
inside the module is the class and state that it reproduces; otherwise the forward of the module's class runs.
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
from xformer_kernels.integrations.mdta import is_mdta_shaped, mdta, mdta_trial, serves_mdta
from xformer_kernels.integrations.parts import serves_tensor
from xformer_kernels.layer.call import Call
from xformer_kernels.modules import dropout_p, has_global_hooks, runs_forward_of
from xformer_kernels.nn import may_fuse
from xformer_kernels.spec import Spec


class Family(NamedTuple):
    """Modules of one class of timm's, or of certain parts."""

    fused: Callable[..., Tensor]  # (module, call, *inputs)
    serves: Callable[..., bool]  # (module, *inputs): whether it reproduces what the module would run
    path: str = ""  # where the class is, if the family has one
    name: str = ""
    arguments: dict[str, Any] = {}  # noqa: RUF012  of a small module to try
    inputs: tuple[Any, ...] = ((),)  # of that: the shape of x, and the rest
    whole_block: bool = False  # around a layer which is counted itself
    shaped: Callable[[nn.Module], bool] | None = None  # whether a module has the parts, if these make the family
    trial: Callable[[nn.Module], tuple[Any, ...]] | None = None  # as `inputs`, for one of these modules
    args: int = 1  # how many inputs there are
    optional: int = 0  # how many of these, the last ones, may be left out: they are then None
    processor: bool = False  # whether diffusers keeps the computation in ``module.processor``

    @property
    def original(self) -> Any:
        """The class; None where the module that it comes from is not loaded, so that no model can hold it."""
        return getattr(sys.modules.get(self.path), self.name, None)

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is of this class, or of a derived one with the same forward."""
        original = self.original
        return original is not None and isinstance(module, original) and type(module).forward is original.forward


def _serves_xca(module: Any, x: Any) -> bool:
    return serves_tensor(x, 3) and _is_xca(module) and dropout_p(module.attn_drop) is not None


def _is_xca(module: Any) -> bool:
    """Whether the temperature is one of each head, or one of all, which is what xfa takes."""
    t = module.temperature
    return (
        isinstance(t, Tensor)
        and t.is_floating_point()
        and (t.shape == (module.num_heads, 1, 1) or (t.numel() == 1 and t.dim() <= 3))
        and not ops.torch_only(t)
    )


def _serves_half_block(attn: Any, norm: Any, layer_scale: Any) -> bool:
    """Whether `attn` is replaced, runs nothing but our forward, and can be fused with what is around it."""
    replaced = how_replaced(attn)
    if replaced is None or not FAMILIES[replaced.family].name or not agrees(replaced.family):
        return False
    family, forward = FAMILIES[replaced.family], bound_forward(attn)
    return (
        family.fused is xca
        and forward is not None
        and runs_forward_of(attn, family.original, forward=forward)
        and _is_xca(attn)
        and may_fuse(norm, attn, layer_scale)
    )


def _serves_xcit_block(module: Any, x: Any, H: Any, W: Any) -> bool:
    return serves_tensor(x, 3) and _serves_half_block(module.attn, module.norm1, module.gamma1)


def _serves_edgenext_block(module: Any, x: Any) -> bool:
    return serves_tensor(x, 4) and _serves_half_block(module.xca, module.norm_xca, module.gamma_xca)


FAMILIES: dict[str, Family] = {
    "XCA": Family(xca, _serves_xca, "timm.models.xcit", "XCA", {"dim": 8, "num_heads": 2}, ((2, 6, 8),)),
    "CrossCovarianceAttn": Family(
        xca, _serves_xca, "timm.models.edgenext", "CrossCovarianceAttn", {"dim": 8, "num_heads": 2}, ((2, 6, 8),)
    ),
    "XCABlock": Family(
        xcit_block, _serves_xcit_block, "timm.models.xcit", "XCABlock", {"dim": 8, "num_heads": 2},
        ((2, 6, 8), 2, 3), whole_block=True, args=3,
    ),
    "SplitTransposeBlock": Family(
        edgenext_block, _serves_edgenext_block, "timm.models.edgenext", "SplitTransposeBlock",
        {"dim": 8, "num_heads": 2, "num_scales": 3, "ls_init_value": 0.5}, ((2, 8, 2, 3),), whole_block=True,
    ),
    "MDTA": Family(mdta, serves_mdta, shaped=is_mdta_shaped, trial=mdta_trial),
    "XCA copy": Family(xca, _serves_xca, shaped=tokens.is_xca_shaped, trial=tokens.xca_trial),
    "XCAttention": Family(
        tokens.vit_xca, tokens.serves_vit_xca, shaped=tokens.is_vit_xca_shaped, trial=tokens.vit_xca_trial
    ),
    "FastChannelAttention": Family(
        tokens.fdat, tokens.serves_fdat, shaped=tokens.is_fdat_shaped, trial=tokens.fdat_trial, args=3
    ),
    "Adaptive_Channel_Attention": Family(
        tokens.dat, tokens.serves_dat, shaped=tokens.is_dat_shaped, trial=tokens.dat_trial, args=3
    ),
    "ISA": Family(tokens.isa, tokens.serves_isa, shaped=tokens.is_isa_shaped, trial=tokens.isa_trial),
    "CAB": Family(
        images.cross_mdta, images.serves_cross_mdta,
        shaped=images.is_cross_mdta_shaped, trial=images.cross_mdta_trial, args=2,
    ),
    "IG_MSA": Family(
        images.ig_msa, images.serves_ig_msa, shaped=images.is_ig_msa_shaped, trial=images.ig_msa_trial, args=2
    ),
    "ChannelAttention": Family(
        davit.channel_attention, davit.serves_channel_attention,
        shaped=davit.is_channel_attention_shaped, trial=davit.channel_attention_trial,
    ),
    "ChannelAttentionV2": Family(
        davit.channel_attention_v2, davit.serves_channel_attention_v2,
        shaped=davit.is_channel_attention_v2_shaped, trial=davit.channel_attention_trial,
    ),
    "LiteMLA": Family(
        linear.lite_mla, linear.serves_lite_mla, shaped=linear.is_lite_mla_shaped, trial=linear.lite_mla_trial
    ),
    "SanaMultiscaleLinearAttention": Family(
        linear.multiscale, linear.serves_multiscale,
        shaped=linear.is_multiscale_shaped, trial=linear.multiscale_trial, processor=True,
    ),
    "SanaLinearAttnProcessor2_0": Family(
        linear.sana, linear.serves_sana,
        shaped=linear.is_sana_shaped, trial=linear.sana_trial, args=3, optional=2, processor=True,
    ),
    "LinearAttention": Family(
        linear.loftr, linear.serves_loftr,
        shaped=linear.is_loftr_shaped, trial=linear.loftr_trial, args=5, optional=2,
    ),
}  # fmt: skip


class Found(NamedTuple):
    """What a module is: its family, if it is to be replaced; else why not, if it is like one."""

    family: str | None
    why: str = ""


def look(module: nn.Module) -> Found:
    """Which family to replace `module` by."""
    for name, family in FAMILIES.items():
        if family.holds(module):
            if "forward" in module.__dict__:  # set on the instance: what it computes is not the class's to say
                return Found(None, f"{name}, but a forward is set on the instance")
            changed = agrees(name) is False
            return Found(None, f"{name}, but the installed class computes something else") if changed else Found(name)
    for name, family in FAMILIES.items():
        if family.shaped is not None and family.trial is not None and family.shaped(module):
            if "forward" in module.__dict__:
                return Found(None, f"has the parts of {name}, but a forward is set on the instance")
            tried = trial.run(lambda: module, _by_reference(name), partial(family.trial, module), thorough=True)
            return Found(name) if tried.agrees else Found(None, f"has the parts of {name}, but {tried.why}")
    scaled = any(isinstance(getattr(module, name, None), Tensor) for name in ("temperature", "temp", "rescale"))
    return Found(None, "has a temperature, but not the parts of a family" if scaled else "")


def replace(module: Any, family: str, form: str, backend: str) -> None:
    """Makes `module`, of that family, compute with our kernels."""
    if FAMILIES[family].processor:
        names = tuple(inspect.signature(type(module.processor).__call__).parameters)[2:]
        module.processor = Processor(compute, Replaced(family, form, backend, names), module.processor)
    else:
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        bind(module, forward, Replaced(family, form, backend, names))


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    replaced, original = how_replaced(module), type(module).forward
    if replaced is None:
        return original(module, *args, **kwargs)
    return compute(module, replaced, original, args, kwargs)


def compute(
    module: nn.Module, replaced: Replaced, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The fused forward of the module's family where that is what ``original(module, ...)`` computes; else that."""
    family = FAMILIES[replaced.family]
    names = replaced.names[len(args) : family.args]
    required = replaced.names[len(args) : family.args - family.optional]
    if len(args) <= family.args and set(required) <= kwargs.keys() <= set(names):
        given = (*args, *(kwargs.get(name) for name in names))
        if family.serves(module, *given) and (not family.name or agrees(replaced.family)):
            return family.fused(module, _call(replaced), *given)
    return original(module, *args, **kwargs)


def _call(replaced: Replaced) -> Call:
    return Call(Spec(), None, 0.0, replaced.form, None, replaced.backend)


def _by_reference(name: str) -> Callable[..., Tensor]:
    """The fused forward; the formula is tried, whatever backend the environment asks for."""
    call = _call(Replaced(name, "direct", "reference"))
    return lambda module, *args: FAMILIES[name].fused(module, call, *args)


_verdicts: dict[Any, bool] = {}
"""By the forward of the original class, which a user may have changed."""


@torch.compiler.assume_constant_result
def agrees(name: str) -> bool | None:
    """Whether the installed class computes what the family does: tried once, on a small module with random weights.

    None where that cannot be tried now: under fake tensors, meta devices and global module hooks. Then it is tried
    again when next asked.
    """
    family = FAMILIES[name]
    verdict = _verdicts.get(family.original.forward)
    if verdict is None and not has_global_hooks():
        verdict = trial.run(
            lambda: family.original(**family.arguments), _by_reference(name), lambda: family.inputs
        ).agrees
        if verdict is not None:
            _verdicts[family.original.forward] = verdict
    return verdict
