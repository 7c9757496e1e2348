"""XFA and XFABlock: the drop-in attention layer, and the half block around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from xformer_kernels import dispatch, parallel, reference, validate
from xformer_kernels.functional import shared, xfa
from xformer_kernels.layer import xfa_layer
from xformer_kernels.layer.call import FORMS, Call
from xformer_kernels.layer.functional import checked
from xformer_kernels.layer.ops import Operands
from xformer_kernels.modules import dropout_p, dropped, runs_forward_of
from xformer_kernels.packed import heads_of
from xformer_kernels.spec import Spec

torch.fx.wrap("xfa_layer")  # torch.fx.symbolic_trace records it as a single node


class XFA(nn.Module):
    """Cross feature attention with its projections: (B, N, C) to (B, N, C), see :func:`xformer_kernels.xfa`.

    ::

        q, k, v = split(qkv(x));  y = proj_drop(proj(xfa(q, k, v, temperature)))

    computed by :func:`xformer_kernels.xfa_layer`, which does not materialise q, k and v if that is cheaper.

    A drop-in replacement for timm's ``XCA``: same constructor, same state dict (``temperature``, ``qkv.weight``[,
    ``qkv.bias``], ``proj.weight``, ``proj.bias``), same results.

    Args:
        dim: features C of a token, a multiple of ``num_heads``.
        num_heads: heads H; each has C / H features and its own temperature.
        qkv_bias: whether the projection to q, k, v has a bias.
        attn_drop: dropout probability for the map, in training.
        proj_drop: dropout probability for the output, in training.
        map, norm, activation, backend: as in :func:`xformer_kernels.xfa`.
        form: "auto", "gram" or "direct", as in :func:`xformer_kernels.xfa_layer`.
        device, dtype: of the parameters, as in :class:`torch.nn.Linear`.

    Submodules that were replaced or have hooks are called: ``qkv`` and ``proj`` (the form is then "direct") and
    ``attn_drop``, which receives the map (B, H, D, D) in the dtype of q. With global module hooks, all are called.

    Raises:
        TypeError, ValueError: at construction if an argument is invalid; in ``forward`` if x is not (B, N, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        map: str = "query_key",
        norm: str = "token",
        activation: str = "softmax",
        form: str = "auto",
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        validate.integer("dim", dim)
        validate.integer("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}")
        self.spec = Spec(map, norm, activation).check()
        validate.choice("form", form, FORMS)
        validate.probability("attn_drop", attn_drop)
        validate.probability("proj_drop", proj_drop)
        dispatch.check_name(backend)
        self.num_heads = num_heads
        self.form, self.backend = form, backend
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **where))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **where)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, group: Any = None) -> Tensor:
        """x (B, N, C) to (B, N, C).

        token_mask (B, N) bool: the attention ignores tokens where it is False. group: tokens are split over its ranks.
        """
        if isinstance(x, torch.fx.Proxy):
            y = self.proj_drop(xfa_layer(x, *self.weights(), **self._traced_call(token_mask, group).keywords()))
        else:
            y = dropped(self.proj_drop, attend(self, x, self.call(token_mask, group)))
        result: Tensor = y
        return result

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """The weights in the order of :func:`xformer_kernels.xfa_layer`."""
        return weights(self)

    def call(self, token_mask: Tensor | None = None, group: Any = None) -> Call:
        """The constructor's options in the form that :func:`attend` takes."""
        return Call(self.spec, token_mask, 0.0, self.form, group, self.backend)

    def _traced_call(self, token_mask: Tensor | None, group: Any) -> Call:
        """The call for torch.fx, whose graph calls xfa_layer; raises if that would skip replaced modules or hooks."""
        p = dropout_p(self.attn_drop)
        if p is None or not has_plain_projections(self):
            raise NotImplementedError(
                "torch.fx cannot trace XFA where qkv, proj or attn_drop were replaced or have hooks"
            )
        return self.call(token_mask, group)._replace(dropout_p=p)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer should not decay (timm's convention)."""
        return {"temperature"}

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, map={self.spec.map!r}, norm={self.spec.norm!r}, "
            f"activation={self.spec.activation!r}, form={self.form!r}, backend={self.backend!r}"
        )


class XFABlock(nn.Module):
    """The half block ``x + layer_scale * attn(norm(x))``, see :func:`xformer_kernels.xfa_block`.

    Submodules are ``norm`` (:class:`torch.nn.LayerNorm`) and ``attn`` (:class:`XFA`), ``layer_scale`` is a parameter or
    None.

    Args:
        dim, num_heads, qkv_bias, attn_drop, proj_drop, map, norm, activation, form, backend, device, dtype: as
            in :class:`XFA`.
        ln_eps: eps of the layer norm.
        layer_scale: initial value of the layer scale; None: no layer scale.

    Raises:
        TypeError, ValueError: as :class:`XFA`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        ln_eps: float = 1e-6,
        layer_scale: float | None = None,
        map: str = "query_key",
        norm: str = "token",
        activation: str = "softmax",
        form: str = "auto",
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        validate.not_negative("ln_eps", ln_eps)
        self.attn = XFA(
            dim, num_heads, qkv_bias, attn_drop, proj_drop,
            map=map, norm=norm, activation=activation, form=form, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, eps=ln_eps, device=device, dtype=dtype)
        self.layer_scale = None
        if layer_scale is not None:
            validate.finite("layer_scale", layer_scale)
            self.layer_scale = nn.Parameter(torch.full((dim,), float(layer_scale), device=device, dtype=dtype))

    def forward(self, x: Tensor, token_mask: Tensor | None = None, group: Any = None) -> Tensor:
        """x (B, N, C) to (B, N, C); token_mask and group as in :class:`XFA`."""
        return half_block(x, self.norm, self.attn, self.layer_scale, None, token_mask, group)


def weights(layer: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """The weights of a module with the parameters of timm's ``XCA``, in the order of :func:`xformer_kernels.xfa_layer`.

    A temperature of one element applies to all heads.
    """
    temperature = layer.temperature
    if isinstance(temperature, Tensor) and temperature.numel() == 1 and temperature.shape != (layer.num_heads, 1, 1):
        temperature = shared(temperature.reshape(1), (layer.num_heads,))
    qkv, proj = layer.qkv, layer.proj
    return qkv.weight, qkv.bias, temperature, proj.weight, proj.bias


def has_plain_projections(layer: Any) -> bool:
    """Whether calling qkv and proj runs only torch's linear layer."""
    return runs_forward_of(layer.qkv, nn.Linear) and runs_forward_of(layer.proj, nn.Linear)


def attend(layer: Any, x: Tensor, call: Call) -> Tensor:
    """``proj(xfa(split(qkv(x)), temperature))`` of a module with the parameters and submodules of timm's ``XCA``.

    Computed from the weights if calling qkv, attn_drop and proj runs only torch's own forward; otherwise in the direct
    form, which calls them.
    """
    _check_tokens(x, layer, call)
    p = dropout_p(layer.attn_drop)
    if p is None or not has_plain_projections(layer):
        return _through_modules(layer, x, call, p)
    return checked(call._replace(dropout_p=p) if p else call, Operands(x, *weights(layer)))()[0]


def _check_tokens(x: Any, layer: Any, call: Call) -> None:
    if call.group is not None:  # xfa_layer checks, so that every rank raises
        return
    validate.tensor("x", x)
    C = getattr(layer.qkv, "in_features", x.shape[-1])  # only nn.Linear has this attribute
    if x.dim() != 3 or x.shape[-1] != C:
        raise ValueError(f"x must have shape (B, N, C) with C = {C}, got {tuple(x.shape)}")


def _through_modules(layer: Any, x: Tensor, call: Call, p: float | None) -> Tensor:
    """The direct form, which calls qkv and proj, and attn_drop if `p` is None."""
    if call.form == "gram" or call.group is not None:
        with parallel.together(call.group, x):
            raise ValueError(
                "form='gram' and group need the weights of qkv and proj and the rate of attn_drop, and these are no "
                "plain torch.nn.Linear and torch.nn.Dropout, or have hooks"
            )
    if call.token_mask is not None:
        validate.token_mask(call.token_mask, x, "x")
        x = torch.where(call.token_mask.unsqueeze(-1), x, 0)
    q, k, v = heads_of(layer.qkv(x), layer.num_heads)

    def dropped_map(S: Tensor) -> Tensor:
        A: Tensor = layer.attn_drop(reference.activate(S, call.spec).to(q.dtype))
        return A

    out = xfa(
        q, k, v, layer.temperature, **call.spec.of_xfa(),
        token_mask=call.token_mask, dropout_p=p or 0.0, map_fn=dropped_map if p is None else None, backend=call.backend,
    )  # fmt: skip
    y: Tensor = layer.proj(out.transpose(1, 2).flatten(2))
    return y


def half_block(
    x: Tensor,
    norm: nn.Module,
    attn: nn.Module,
    layer_scale: Any,
    drop_path: nn.Module | None,
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """``x + drop_path(layer_scale * attn(norm(x)))`` of an :class:`XFA`; fused if its submodules allow it."""
    if isinstance(attn, XFA) and runs_forward_of(attn, XFA) and not isinstance(x, torch.fx.Proxy):
        call = attn.call(token_mask, group)
        _check_tokens(x, attn, call)
        if may_fuse(norm, attn, layer_scale):
            return fused_half_block(x, norm, attn, layer_scale, drop_path, call)
    more = {"token_mask": token_mask, "group": group}
    y = attn(norm(x), **{name: value for name, value in more.items() if value is not None})
    y = y if layer_scale is None else layer_scale * y
    return x + (y if drop_path is None else drop_path(y))


def may_fuse(norm: Any, attn: Any, layer_scale: Any) -> bool:
    """Whether ``layer_scale * attn(norm(x))`` runs only the forwards that :func:`fused_half_block` reproduces.

    `attn` must compute :func:`attend`.
    """
    return (
        runs_forward_of(norm, nn.LayerNorm)
        and has_plain_projections(attn)
        and dropout_p(attn.attn_drop) is not None
        and dropout_p(attn.proj_drop) == 0
        and norm.normalized_shape == (attn.qkv.in_features,)
        and (
            layer_scale is None or (isinstance(layer_scale, Tensor) and layer_scale.shape == (attn.proj.out_features,))
        )
    )


def fused_half_block(
    x: Tensor, norm: Any, attn: Any, layer_scale: Tensor | None, drop_path: nn.Module | None, call: Call
) -> Tensor:
    """``x + drop_path(layer_scale * attn(norm(x)))`` by :func:`xformer_kernels.xfa_block`, if :func:`may_fuse`."""
    call = call._replace(dropout_p=dropout_p(attn.attn_drop) or 0.0)
    o = Operands(x, *weights(attn), norm.weight, norm.bias, layer_scale)
    y = checked(call, o, norm.eps, drop_path is None)()[0]
    return y if drop_path is None else x + drop_path(y)
