"""Swap modules for fused ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from xformer.attention import XFAHalf
from xformer.fused.blocks import FusedXFABlock, FusedXFAHalf, FusedXFBlock
from xformer.fused.layers import (
    Fused,
    FusedConvNorm,
    FusedDenseConvNorm,
    FusedLinear,
    FusedMBConv,
    FusedMlp,
    FusedPointwise,
    FusedSequential,
)
from xformer.layers import ConvNorm, MBConv, Mlp, Pointwise, XFBlock
from xformer_kernels import XFA, XFABlock

FUSED: dict[type[nn.Module], tuple[type[Fused], ...]] = {
    nn.Linear: (FusedLinear,),
    Pointwise: (FusedPointwise,),
    ConvNorm: (FusedConvNorm, FusedDenseConvNorm),
    MBConv: (FusedMBConv,),
    Mlp: (FusedMlp,),
    XFABlock: (FusedXFABlock,),
    XFAHalf: (FusedXFAHalf,),
    XFBlock: (FusedXFBlock,),
    nn.Sequential: (FusedSequential,),
}
"""Candidates by the class of the folded layer; the first that supports it is used."""

PLAIN: dict[type[nn.Module], type[nn.Module]] = {fused: plain for plain, several in FUSED.items() for fused in several}


def fused(module: nn.Module) -> nn.Module:
    """Return the fused version of `module`, or `module` itself; children are swapped in place."""
    for kind in FUSED.get(type(module), ()):
        _replace(module, fused, kind.inside)
        found = kind.of(module)
        if found is not None:
            return found
    if not isinstance(module, (Fused, XFA)):  # their forwards read the parameters of their children
        _replace(module, fused)
    return module


def plain(module: nn.Module) -> nn.Module:
    """Undo :func:`fused`."""
    _replace(module, plain)
    kind = PLAIN.get(type(module))
    if kind is None:
        return module
    result = kind.__new__(kind)
    kept = ("kernels", "all_kernels", "programs")
    result.__dict__.update((name, value) for name, value in module.__dict__.items() if name not in kept)
    return result


def _replace(module: nn.Module, by: Callable[[nn.Module], nn.Module], names: Iterable[str] | None = None) -> None:
    """Replace the children with these names, or all children."""
    for name, child in list(module.named_children()):
        other = by(child) if names is None or name in names else child
        if other is not child:
            setattr(module, name, other)
