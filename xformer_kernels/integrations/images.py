"""Attention layers with two inputs: two images for HVI-CIDNet, an image and its illumination for Retinexformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xformer_kernels.functional import xfa
from xformer_kernels.integrations.parts import as_image, has_heads, has_parts, serves_temperature, serves_tensor
from xformer_kernels.layer.call import Call


def cross_mdta(module: Any, call: Call, x: Tensor, y: Tensor) -> Tensor:
    """HVI-CIDNet's ``CAB``: MDTA with q from x, k and v from y; two (B, C, h, w) inputs to (B, C, h, w)."""
    heads = module.num_heads
    q = module.q_dwconv(module.q(x))
    kv = module.kv_dwconv(module.kv(y))
    k, v = kv.flatten(2).unflatten(1, (2, heads, -1)).transpose(-2, -1).unbind(1)
    tokens = q.flatten(2).unflatten(1, (heads, -1)).transpose(-2, -1)
    out = xfa(tokens, k, v, module.temperature, backend=call.backend)
    result: Tensor = module.project_out(as_image(out, q.shape[2:], q))
    return result


def is_cross_mdta_shaped(module: Any) -> bool:
    names = ("q", "q_dwconv", "kv", "kv_dwconv", "project_out")
    return has_parts(module, **dict.fromkeys(names, nn.Conv2d)) and has_heads(
        module, "num_heads", "temperature", module.q.out_channels
    )


def cross_mdta_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, module.q.in_channels, 3, 5), (2, module.kv.in_channels, 3, 5))


def serves_cross_mdta(module: Any, x: Any, y: Any) -> bool:
    return (
        serves_tensor(x, 4)
        and serves_tensor(y, 4)
        and (x.shape[0], x.shape[2:]) == (y.shape[0], y.shape[2:])
        and (x.dtype, x.device) == (y.dtype, y.device)
        and serves_temperature(module.temperature, module.num_heads)
    )


def ig_msa(module: Any, call: Call, x: Tensor, light: Tensor) -> Tensor:
    """Retinexformer's ``IG_MSA``: v is multiplied by illumination features; two (B, h, w, C) inputs to (B, h, w, C).

    ::

        y = proj(softmax(rescale k^T^ q^) (v o light)) + pos_emb(v)
    """
    tokens = x.flatten(1, 2)
    q, k, v = module.to_q(tokens), module.to_k(tokens), module.to_v(tokens)

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    lit = v * light.flatten(1, 2)
    out = xfa(heads(k), heads(q), heads(lit), module.rescale, backend=call.backend)
    attended: Tensor = module.proj(out.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])
    positions: Tensor = module.pos_emb(v.unflatten(1, x.shape[1:3]).permute(0, 3, 1, 2))
    return attended + positions.permute(0, 2, 3, 1)


def is_ig_msa_shaped(module: Any) -> bool:
    linear = dict.fromkeys(("to_q", "to_k", "to_v", "proj"), nn.Linear)
    return has_parts(module, pos_emb=nn.Module, **linear) and has_heads(
        module, "num_heads", "rescale", module.to_q.out_features
    )


def ig_msa_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, 3, 5, module.to_q.in_features), (2, 3, 5, module.to_v.out_features))


def serves_ig_msa(module: Any, x: Any, light: Any) -> bool:
    return (
        serves_tensor(x, 4)
        and serves_tensor(light, 4)
        and x.shape[:3] == light.shape[:3]
        and (x.dtype, x.device) == (light.dtype, light.device)
        and serves_temperature(module.rescale, module.num_heads)
    )
