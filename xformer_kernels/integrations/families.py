"""What :func:`replace_attention` serves: one table of families, and when the fused forward of one may run.

A family is recognised by class or by its parts, and then tried: the fused forward must give what the module's own
class computes, for small random numbers in float64. It runs where everything that torch would have run inside the
module is the class and state that it reproduces; otherwise the forward of the module's class runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xformer_kernels import ops, torch_internals, validate
from xformer_kernels.integrations.blocks import edgenext_block, xca, xcit_block
from xformer_kernels.integrations.bound import Replaced, bound_forward, how_replaced
from xformer_kernels.integrations.mdta import is_mdta_shaped, mdta
from xformer_kernels.layer.call import Call
from xformer_kernels.modules import dropout_p, has_global_hooks, runs_forward_of
from xformer_kernels.nn import may_fuse
from xformer_kernels.spec import Spec


class Family(NamedTuple):
    """Modules of one class of timm's, or of MDTA's parts."""

    fused: Callable[..., Tensor]  # (module, call, *inputs)
    serves: Callable[..., bool]  # (module, *inputs): whether it reproduces what the module would run
    path: str = ""  # where the class is, if the family has one
    name: str = ""
    arguments: dict[str, Any] = {}  # noqa: RUF012  of a small module to try
    inputs: tuple[Any, ...] = ((),)  # of that: the shape of x, and the rest
    whole_block: bool = False  # around a layer which is counted itself

    @property
    def original(self) -> Any:
        """The class; None where the module that it comes from is not loaded, so that no model can hold it."""
        return getattr(sys.modules.get(self.path), self.name, None)

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is of this class, or of a derived one with the same forward."""
        original = self.original
        return original is not None and isinstance(module, original) and type(module).forward is original.forward


def _is_served_tensor(x: Any, dims: int) -> bool:
    return isinstance(x, Tensor) and x.dim() == dims and x.dtype in validate.DTYPES and not ops.torch_only(x)


def _serves_xca(module: Any, x: Any) -> bool:
    return _is_served_tensor(x, 3) and _is_xca(module) and dropout_p(module.attn_drop) is not None


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
    if replaced is None or not agrees(replaced.family):
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
    return _is_served_tensor(x, 3) and _serves_half_block(module.attn, module.norm1, module.gamma1)


def _serves_edgenext_block(module: Any, x: Any) -> bool:
    return _is_served_tensor(x, 4) and _serves_half_block(module.xca, module.norm_xca, module.gamma_xca)


def _serves_mdta(module: Any, x: Any) -> bool:
    t = module.temperature
    return _is_served_tensor(x, 4) and t.shape == (module.num_heads, 1, 1) and not ops.torch_only(t)


FAMILIES: dict[str, Family] = {
    "XCA": Family(xca, _serves_xca, "timm.models.xcit", "XCA", {"dim": 8, "num_heads": 2}, ((2, 6, 8),)),
    "CrossCovarianceAttn": Family(
        xca, _serves_xca, "timm.models.edgenext", "CrossCovarianceAttn", {"dim": 8, "num_heads": 2}, ((2, 6, 8),)
    ),
    "XCABlock": Family(
        xcit_block, _serves_xcit_block, "timm.models.xcit", "XCABlock", {"dim": 8, "num_heads": 2},
        ((2, 6, 8), 2, 3), whole_block=True,
    ),
    "SplitTransposeBlock": Family(
        edgenext_block, _serves_edgenext_block, "timm.models.edgenext", "SplitTransposeBlock",
        {"dim": 8, "num_heads": 2, "num_scales": 3, "ls_init_value": 0.5}, ((2, 8, 2, 3),), whole_block=True,
    ),
    "MDTA": Family(mdta, _serves_mdta),
}  # fmt: skip


def family_of(module: nn.Module) -> str | None:
    """The family to replace `module` by; None for modules of none, or which compute something else."""
    if "forward" in module.__dict__:  # set on the instance: what it computes is not the class's to say
        return None
    for name, family in FAMILIES.items():
        if family.holds(module):
            return None if agrees(name) is False else name
    return "MDTA" if is_mdta_shaped(module) and _agrees_mdta(module) else None


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a replaced module runs: the fused forward of its family where that is the same, else its class's own."""
    replaced = how_replaced(module)
    if replaced is not None and not kwargs:
        family = FAMILIES[replaced.family]
        served = len(args) == len(family.inputs) and family.serves(module, *args)
        if served and (not family.name or agrees(replaced.family)):
            return family.fused(module, _call(replaced), *args)
    return type(module).forward(module, *args, **kwargs)


def _call(replaced: Replaced) -> Call:
    return Call(Spec(), None, 0.0, replaced.form, None, replaced.backend)


# --------------------------------------------------------------------------------------------------------------- trials

_verdicts: dict[Any, bool] = {}
"""By the forward of the original class, which a user may have changed."""


@torch.compiler.assume_constant_result
def agrees(name: str) -> bool | None:
    """Whether the installed class computes what the family does: tried once, on a small module with random weights.

    None where that cannot be tried now: under fake tensors, meta devices and global module hooks. Then it is tried
    again when next asked.
    """
    original = FAMILIES[name].original
    verdict = _verdicts.get(original.forward)
    if verdict is None and not has_global_hooks():
        verdict = _try(lambda: original(**FAMILIES[name].arguments), name)
        if verdict is not None:
            _verdicts[original.forward] = verdict
    return verdict


def _agrees_mdta(module: nn.Module) -> bool:
    """Whether the module's forward is MDTA's formula: tried with its shapes, and random weights."""
    x = (2, module.qkv.in_channels, 3, 5)  # type: ignore[union-attr]
    return _try(lambda: module, "MDTA", (x,)) or False


@torch.no_grad()
def _try(make: Callable[[], nn.Module], name: str, inputs: tuple[Any, ...] | None = None) -> bool | None:
    shape, *rest = inputs or FAMILIES[name].inputs
    if torch.compiler.is_compiling() or torch_internals.dispatch_modes():
        return None
    numbers = torch.Generator().manual_seed(0)
    # by the reference: the formula is tried, whatever backend the environment asks for
    call = _call(Replaced(name, "direct", "reference"))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            module = _for_trial(make(), numbers).eval()
            x = torch.randn(shape, generator=numbers, dtype=torch.float64)
            expected = type(module).forward(module, x, *rest)
            got = FAMILIES[name].fused(module, call, x, *rest)
    except Exception:  # another signature or other parts: a module that is not known
        return False
    if expected.is_meta or got.is_meta:
        return None
    return expected.shape == got.shape and bool(torch.allclose(got, expected, rtol=1e-9, atol=1e-9))


def _for_trial(module: nn.Module, numbers: torch.Generator) -> nn.Module:
    """A copy on the CPU with random weights in float64 that shares none with `module`, and calls no hooks."""

    def drawn(p: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.randn(p.shape, generator=numbers, dtype=torch.float64) / 2)

    parameters = {key: None if p is None else drawn(p) for key, p in module._parameters.items()}
    buffers = {key: None if b is None else b.double() for key, b in module._buffers.items()}
    children = {key: None if m is None else _for_trial(m, numbers) for key, m in module._modules.items()}
    cls = type(module)
    copied: nn.Module = object.__new__(type(cls.__name__, (cls,), {"__call__": cls.forward}))
    copied.__dict__.update(module.__dict__, _parameters=parameters, _buffers=buffers, _modules=children)
    return copied
