"""The drop-in layer, and the half block around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xformer_kernels import dispatch, ops, parallel, validate
from xformer_kernels.functional import xfa
from xformer_kernels.layer import xfa_block, xfa_layer
from xformer_kernels.layer.functional import FORMS, Call, Projections, run
from xformer_kernels.layer.ops import Operands


class XFA(nn.Module):
    """Cross feature attention with its projections: (B, N, C) to (B, N, C), see :func:`xformer_kernels.xfa`.

    ::

        q, k, v = split(qkv(x));  y = proj_drop(proj(xfa(q, k, v, temperature)))

    computed by :func:`xformer_kernels.xfa_layer`, which does not make q, k and v where that costs less.

    A drop-in for timm's ``XCA``: same constructor, same state dict (``temperature``, ``qkv.weight``[, ``qkv.bias``],
    ``proj.weight``, ``proj.bias``), same numbers.

    Args:
        dim: features C of a token, a multiple of ``num_heads``.
        num_heads: heads H; each has C / H features and a temperature of its own.
        qkv_bias: whether the projection to q, k, v has a bias.
        attn_drop: dropout on the map, in training.
        proj_drop: dropout on the result, in training.
        map, norm, activation, backend: as in :func:`xformer_kernels.xfa`.
        form: "auto", "gram" or "direct", as in :func:`xformer_kernels.xfa_layer`. Where ``qkv`` or ``proj`` has been
            replaced by another module or has hooks, these are called, and the form is "direct".

    Raises:
        TypeError, ValueError: at construction for a bad argument; in ``forward`` for an x that is not (B, N, C).
    """

    # As class attributes too: integrations turn modules with XCA's parameters into this class.
    map: str = "query_key"
    norm: str = "token"
    activation: str = "softmax"
    form: str = "auto"
    backend: str = "auto"
    projections: Projections | None = None

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
    ) -> None:
        super().__init__()
        if dim <= 0 or num_heads <= 0 or dim % num_heads:
            raise ValueError(
                f"dim must be a positive multiple of num_heads (positive too), got dim={dim}, num_heads={num_heads}"
            )
        validate.choice("map", map, validate.MAPS)
        validate.choice("norm", norm, validate.NORMS)
        validate.choice("activation", activation, validate.ACTIVATIONS)
        validate.choice("form", form, FORMS)
        validate.probability("attn_drop", attn_drop)
        validate.probability("proj_drop", proj_drop)
        dispatch.check_name(backend)
        self.num_heads = num_heads
        self.map, self.norm, self.activation, self.form, self.backend = map, norm, activation, form, backend
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, group: Any = None) -> Tensor:
        """x (B, N, C) to (B, N, C).

        token_mask (B, N) bool: False tokens take no part in the attention. group: tokens are split over its ranks.
        """
        # with a group xfa_layer checks, for an error on one rank to be one on all
        if group is None:
            validate.tensor("x", x)
        if group is None and (x.dim() != 3 or x.shape[-1] != self.qkv.in_features):
            raise ValueError(f"x must have shape (B, N, C) with C = {self.qkv.in_features}, got {tuple(x.shape)}")
        if not self.knows_its_weights():
            y = self._through_modules(x, token_mask, group)
        elif self.may_skip_checks(x, token_mask, group):
            (x,) = ops.autocast(x)  # type: ignore[assignment]
            y = run(self.call(), Operands(x, *self.weights()), 0.0, False)
        else:
            y = xfa_layer(x, *self.weights(), **self.choices(), token_mask=token_mask, group=group)
        result: Tensor = self.proj_drop(y)
        return result

    def knows_its_weights(self) -> bool:
        """Whether the projections are what their weights say: no other modules, no hooks."""
        return untouched(self.qkv, nn.Linear) and untouched(self.proj, nn.Linear)

    def may_skip_checks(self, x: Any, token_mask: Tensor | None, group: Any) -> bool:
        """Whether all is as the constructor made it: then x is all that needs to be looked at, and it is right."""
        weight = self.qkv.weight
        return (
            group is None
            and token_mask is None
            and type(x) is Tensor
            and x.dim() == 3
            and (x.shape[-1], x.dtype, x.device) == (weight.shape[1], weight.dtype, weight.device)
            and (self.form, self.norm) != ("gram", "feature")
        )

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """In the order of :func:`xformer_kernels.xfa_layer`."""
        return self.qkv.weight, self.qkv.bias, self.temperature, self.proj.weight, self.proj.bias

    def choices(self) -> dict[str, Any]:
        return {
            "map": self.map,
            "norm": self.norm,
            "activation": self.activation,
            "dropout_p": self.attn_drop.p if self.training else 0.0,
            "form": self.form,
            "backend": self.backend,
        }

    def call(self) -> Call:
        """The choices as :func:`xformer_kernels.layer.functional.run` takes them."""
        return Call(**self.choices(), eps=1e-12, token_mask=None, group=None, projections=self.projections)

    def _through_modules(self, x: Tensor, token_mask: Tensor | None, group: Any) -> Tensor:
        """The direct form, by calling qkv and proj."""
        if self.form == "gram" or group is not None:
            with parallel.together(group, x):
                raise ValueError(
                    "form='gram' and group need the weights of qkv and proj, and these are no plain torch.nn.Linear"
                )
        choices = self.choices()
        del choices["form"]
        if token_mask is not None:
            x = torch.where(token_mask.unsqueeze(-1), x, 0)
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        out = xfa(q, k, v, self.temperature, token_mask=token_mask, **choices)
        y: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return y

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay (timm's convention)."""
        return {"temperature"}

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, map={self.map!r}, norm={self.norm!r}, "
            f"activation={self.activation!r}, form={self.form!r}, backend={self.backend!r}"
        )


class XFABlock(nn.Module):
    """The half block ``x + layer_scale * attn(norm(x))``, see :func:`xformer_kernels.xfa_block`.

    Submodules are ``norm`` (:class:`torch.nn.LayerNorm`) and ``attn`` (:class:`XFA`), ``layer_scale`` is a parameter or
    None.

    Args:
        dim, num_heads, qkv_bias, attn_drop, proj_drop, map, norm, activation, form, backend: as in :class:`XFA`.
        ln_eps: of the layer norm.
        layer_scale: initial value of the layer scale; None: without it.

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
    ) -> None:
        super().__init__()
        validate.positive("ln_eps", ln_eps)
        self.attn = XFA(
            dim, num_heads, qkv_bias, attn_drop, proj_drop,
            map=map, norm=norm, activation=activation, form=form, backend=backend,
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, eps=ln_eps)
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor, token_mask: Tensor | None = None, group: Any = None) -> Tensor:
        """x (B, N, C) to (B, N, C); token_mask and group as in :class:`XFA`."""
        return half_block(x, self.norm, self.attn, self.layer_scale, token_mask=token_mask, group=group)


def half_block(
    x: Tensor,
    norm: nn.Module,
    attn: nn.Module,
    layer_scale: Tensor | None,
    drop_path: nn.Module | None = None,
    *,
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """``x + drop_path(layer_scale * attn(norm(x)))``: as one where the parts are what their parameters say."""
    drops = drop_path is not None and drop_path.training and getattr(drop_path, "drop_prob", 0.0) > 0
    if not (
        isinstance(norm, nn.LayerNorm)
        and untouched(norm, nn.LayerNorm)
        and isinstance(attn, XFA)
        and untouched(attn, XFA)
        and attn.knows_its_weights()
        # with a group xfa_block checks x, for an error on one rank to be one on all
        and norm.normalized_shape == (x.shape[-1] if group is None else attn.qkv.in_features,)
        and not (attn.proj_drop.training and attn.proj_drop.p > 0)
    ):
        more = {"token_mask": token_mask, "group": group} if isinstance(attn, XFA) else {}
        y = attn(norm(x), **more)
        y = y if layer_scale is None else layer_scale * y
        return x + (y if drop_path is None else drop_path(y))
    if attn.may_skip_checks(x, token_mask, group):
        o = Operands(x, *attn.weights(), norm.weight, norm.bias, layer_scale)
        y = run(attn.call(), o, norm.eps, not drops)
        return x + drop_path(y) if drops and drop_path is not None else y
    y = xfa_block(
        x, norm.weight, norm.bias, norm.eps, *attn.weights(), layer_scale=layer_scale, residual=not drops,
        token_mask=token_mask, group=group, **attn.choices(),
    )  # fmt: skip
    return x + drop_path(y) if drops and drop_path is not None else y


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of that very class and has no hooks: calling it is its formula and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
