"""Kernels bound to the parameters of torch modules.

Parameters are checked and packed when they change, not in every call. Inputs are contiguous with their features last:
tokens (B, N, C), images (B, H, W, C). A kernel that is called with a :class:`~xformer_kernels.backends.program.Value`
instead of a tensor records the call into a program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xformer.fused import onednn
from xformer_kernels import dispatch, inference, ops
from xformer_kernels.backends.program import Unrecordable, Value
from xformer_kernels.layer.call import Call
from xformer_kernels.layer.functional import checked
from xformer_kernels.layer.ops import Operands
from xformer_kernels.nn import XFABlock, weights

_AVX2 = inference.KERNELS is not None and inference.KERNELS.LEVEL == "x86_64_v3"
MOST = {1: sys.maxsize if _AVX2 else 400_000, 2: 400_000}
"""Largest output of a depthwise convolution, in elements and by stride, for which our kernel is used, not oneDNN: it
should fit in cache. With AVX2 and stride 1 there is no limit."""


class Kernel:
    """Base class. Copies and pickles do not contain packed parameters.

    Changes are detected by the address and the version counter of each parameter, so writes through ``.data`` are
    missed.
    """

    _seen: Any = None  # addresses and versions at the last check
    _kept: Any = ()
    _arguments: tuple[Any, ...] | None = None  # packed parameters; None if the kernel does not support them
    changes = 0  # number of checks that found a change

    def ready(self) -> bool:
        """Whether the kernel supports the current parameters. Must be called before every call of the kernel."""
        parameters = self._parameters()
        try:
            seen = [(t.data_ptr(), t._version) for t in parameters if t is not None]
        except RuntimeError:  # inference tensors have no version counter
            return False
        if seen != self._seen:
            # keeps the memory alive, so that no other tensor can get the same address
            self._kept = [None if t is None else t.detach() for t in parameters]
            self._arguments = self._read(*self._kept) if ops.plain(*parameters) else None
            self._seen = seen
            self.changes += 1
        return self._arguments is not None

    def _parameters(self) -> tuple[Tensor | None, ...]:
        raise NotImplementedError

    def _read(self, *parameters: Any) -> tuple[Any, ...] | None:
        """The parameters in the format of the kernel; None if it does not support them."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        kept = (name for name in self.__dict__ if not name.startswith("_") and name != "changes")
        return {name: self.__dict__[name] for name in kept}


def tensor(x: Any) -> Tensor:
    """Return x; raise :class:`Unrecordable` if a program is being recorded. For operations other than kernels."""
    if not isinstance(x, Tensor):
        raise Unrecordable
    return x


class LinearKernel(Kernel):
    """``act(linear(layer_norm(x))) + add`` with a packed weight; act is hard-swish or the identity."""

    def __init__(self, linear: nn.Linear, layer_norm: nn.LayerNorm | None = None, hard_swish: bool = False) -> None:
        self.linear, self.layer_norm, self.hard_swish = linear, layer_norm, hard_swish
        self.features, self.out = linear.in_features, linear.out_features

    def __call__(self, x: Any, add: Any = None) -> Any:
        assert self._arguments is not None
        packed, weight, bias, layer_norm = self._arguments
        if isinstance(x, Value):
            return x.linear(packed, bias, layer_norm, self.hard_swish, add, self.out)
        return inference.KERNELS.linear(x, weight, bias, None, layer_norm, self.hard_swish, add, packed)

    def _parameters(self) -> tuple[Tensor | None, ...]:
        linear, norm = self.linear, self.layer_norm
        if norm is None:
            return linear.weight, linear.bias
        return linear.weight, linear.bias, norm.weight, norm.bias

    def _read(self, weight: Any, bias: Any, *affine: Any) -> tuple[Any, ...] | None:
        O, I, norm = self.out, self.features, self.layer_norm  # noqa: E741
        if not 0 < I <= inference.WIDEST or not inference.are((O, I), weight) or not inference.are((O,), bias):
            return None
        if norm is not None and not (norm.normalized_shape == (I,) and inference.are((I,), *affine) and norm.eps >= 0):
            return None
        layer_norm = None if norm is None else (*affine, norm.eps)
        return inference.KERNELS.pack_linear(weight), weight, bias, layer_norm


class DepthwiseKernel(Kernel):
    """``act(conv(x))`` for a depthwise convolution accepted by :func:`is_depthwise`; uses oneDNN for large maps."""

    def __init__(self, conv: nn.Conv2d, hard_swish: bool) -> None:
        self.conv, self.hard_swish = conv, hard_swish
        self.features, self.side, self.stride = conv.in_channels, conv.kernel_size[0], conv.stride[0]

    def __call__(self, x: Any) -> Any:
        B, H, W, C = x.shape
        if B * C * -(-H // self.stride) * -(-W // self.stride) > MOST[self.stride]:
            y = onednn.conv2d(tensor(x).permute(0, 3, 1, 2), self.conv, self.hard_swish)
            return y.permute(0, 2, 3, 1).contiguous()
        assert self._arguments is not None
        weight, bias = self._arguments
        if isinstance(x, Value):
            return x.depthwise(weight, bias, self.stride, self.hard_swish)
        return inference.KERNELS.depthwise(x, weight, bias, self.stride, None, self.hard_swish)

    def _parameters(self) -> tuple[Tensor | None, ...]:
        return self.conv.weight, self.conv.bias

    def _read(self, weight: Any, bias: Any) -> tuple[Any, ...] | None:
        C, K = self.features, self.side
        if not inference.are((C, 1, K, K), weight) or not inference.are((C,), bias):
            return None
        return weight, bias


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether the kernel supports this convolution: depthwise, 3x3 or 5x5, stride 1 or 2, "same" padding."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and kernel in (3, 5)
        and stride in (1, 2)
        and conv.kernel_size == (kernel, kernel)
        and conv.stride == (stride, stride)
        and conv.padding == (kernel // 2, kernel // 2)
        and conv.dilation == (1, 1)
    )


class AttentionKernel(Kernel):
    """The part of XFA between the projections of a half block: packed q, k and v (B, N, 3 C) to (B, N, C)."""

    def __init__(self, block: XFABlock) -> None:
        self.block, self.heads = block, block.attn.num_heads
        self.spec = block.attn.spec.with_normal_eps(torch.float32)
        self._direct: dict[torch.Size, bool] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _direct={})

    def __call__(self, qkv: Any) -> Any:
        assert self._arguments is not None
        (temperature,) = self._arguments
        if isinstance(qkv, Value):
            return qkv.xfa(self.heads, temperature, self.spec)
        B, N, _ = qkv.shape
        q, k, v = qkv.view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = dispatch.kernel("cpp", "xfa_forward")(q, k, v, temperature, None, self.spec)[0]
        return out.view(B, N, -1)

    def is_direct(self, shape: torch.Size, direct: Callable[[Tensor], Tensor]) -> bool:
        """Whether ``form="auto"`` selects the direct form for tokens of this shape; decided once per shape.

        `direct` computes the direct form with kernels; it is timed if the choice is close.
        """
        found = self._direct.get(shape)
        if found is None:
            norm, attn = self.block.norm, self.block.attn

            def in_form_of(call: Call, o: Operands) -> Callable[[], Any]:
                return checked(call, o, norm.eps, True) if call.form == "gram" else lambda: (direct(o.x),)

            call = attn.call()._replace(kernels=True)
            x = torch.ones(shape, dtype=torch.float32, device="cpu")  # the defaults may be others
            o = Operands(x, *weights(attn), norm.weight, norm.bias)
            found = self._direct[shape] = call.choose(o, run=(in_form_of,)) == "direct"
        return found

    def _parameters(self) -> tuple[Tensor | None, ...]:
        return (self.block.attn.temperature,)

    def _read(self, temperature: Any) -> tuple[Any, ...] | None:
        if not inference.are((self.heads, 1, 1), temperature):
            return None
        return (temperature.view(-1),)
