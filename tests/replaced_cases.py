"""Modules whose attention is replaced, and a table of changes that users make to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import randn
from test_integrations import MDTA
from test_nn import randomize
from timm.models.edgenext import CrossCovarianceAttn, SplitTransposeBlock
from timm.models.xcit import XCA, XCABlock
from torch import Tensor, nn
from torch.nn.utils import parametrize

C, HEADS = 48, 4


@dataclass(frozen=True)
class Kind:
    """A module to be replaced, with the names of its parts, and its inputs."""

    make: Callable[..., nn.Module]
    inputs: tuple[Any, ...]
    attn: str = ""  # the path of the attention layer in it
    qkv: str = "qkv"
    proj: str = "proj"
    attn_drop: str = "attn_drop"
    proj_drop: str = "proj_drop"
    norm: str = ""
    drop_path: str = ""
    layer_scale: str = ""

    def model(self, **choices: Any) -> nn.Module:
        return randomize(self.make(C, num_heads=HEADS, **choices)).double().eval()

    def x(self) -> Tensor:
        return randn(*self.inputs[0], seed=1, dtype=torch.float64)

    def layer(self, model: nn.Module) -> Any:
        return model.get_submodule(self.attn)

    def part(self, model: nn.Module, name: str) -> Any:
        """The part with the name of one of the fields above."""
        path = getattr(self, name)
        return model.get_submodule(path) if name in ("norm", "drop_path") else getattr(self.layer(model), path)

    def set_part(self, model: nn.Module, name: str, new: nn.Module) -> None:
        owner = model if name in ("norm", "drop_path") else self.layer(model)
        setattr(owner, getattr(self, name), new)


XCA_BLOCK = functools.partial(XCABlock, qkv_bias=True, drop_path=0.3)


def split_block(dim: int, **choices: Any) -> nn.Module:
    return SplitTransposeBlock(dim, 3, drop_path=0.3, ls_init_value=0.5, **choices)


TOKENS, IMAGE = (2, 120, C), (2, C, 10, 12)
KINDS = {
    "XCA": Kind(functools.partial(XCA, qkv_bias=True), (TOKENS,)),
    "CrossCovarianceAttn": Kind(CrossCovarianceAttn, (TOKENS,)),
    "MDTA": Kind(functools.partial(MDTA, bias=True), (IMAGE,), proj="project_out", attn_drop="", proj_drop=""),
    "XCABlock": Kind(
        XCA_BLOCK, (TOKENS, 10, 12), "attn", norm="norm1", drop_path="drop_path1", layer_scale="gamma1"
    ),
    "SplitTransposeBlock": Kind(
        split_block, (IMAGE,), "xca", norm="norm_xca", drop_path="drop_path", layer_scale="gamma_xca"
    ),
}  # fmt: skip


def results(kind: Kind, model: nn.Module) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all parameters that require one."""
    x = kind.x().requires_grad_()
    torch.manual_seed(7)
    y = model(x, *kind.inputs[1:])
    leaves = {"x": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    dy = randn(*y.shape, seed=2, dtype=y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}}


def assert_same(kind: Kind, ours: nn.Module, theirs: nn.Module) -> None:
    expected, got = results(kind, theirs), results(kind, ours)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


CALLS: list[str] = []
"""The classes of modules whose hooks were called since the list was cleared."""


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Wrapped(nn.Module):
    """Like the layer of an adapter: the base module and an additional term."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.base(x).tanh()


def note(module: nn.Module, args: Any, y: Any) -> Any:
    CALLS.append(type(module).__name__)
    return 2 * y


def hook(name: str) -> Callable[[Kind, nn.Module], None]:
    def change(kind: Kind, model: nn.Module) -> None:
        part = kind.layer(model) if name == "layer" else model if name == "whole" else kind.part(model, name)
        part.register_forward_hook(note)

    return change


def wrap(name: str, wrapper: Callable[[nn.Module], nn.Module]) -> Callable[[Kind, nn.Module], None]:
    def change(kind: Kind, model: nn.Module) -> None:
        kind.set_part(model, name, wrapper(kind.part(model, name)))

    return change


def patch(name: str) -> Callable[[Kind, nn.Module], None]:
    """Sets a forward on the instance, as offloading in accelerate does."""

    def change(kind: Kind, model: nn.Module) -> None:
        part = kind.layer(model) if name == "layer" else kind.part(model, name)
        old = part.forward
        part.forward = lambda *args: 2 * old(*args)

    return change


def give(name: str, value: Callable[[Any, Kind], Any]) -> Callable[[Kind, nn.Module], None]:
    """Replaces the temperature or the layer scale by another parameter or value."""

    def change(kind: Kind, model: nn.Module) -> None:
        owner = kind.layer(model) if name == "temperature" else model
        key = "temperature" if name == "temperature" else kind.layer_scale
        new = value(getattr(owner, key), kind)
        delattr(owner, key)
        setattr(owner, key, new)

    return change


def mode(name: str, training: bool, p: float = 0.4) -> Callable[[Kind, nn.Module], None]:
    """Sets the mode of a single part, as for Monte Carlo dropout or frozen layers."""

    def change(kind: Kind, model: nn.Module) -> None:
        part = kind.part(model, name)
        part.train(training)
        if hasattr(part, "p"):
            part.p = p

    return change


def in_training(kind: Kind, model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def parametrized(kind: Kind, model: nn.Module) -> None:
    parametrize.register_parametrization(kind.layer(model), "temperature", nn.Softplus())


def no_longer_parametrized(kind: Kind, model: nn.Module) -> None:
    parametrized(kind, model)
    parametrize.remove_parametrizations(kind.layer(model), "temperature")


def parametrized_weight(kind: Kind, model: nn.Module) -> None:
    parametrize.register_parametrization(kind.part(model, "qkv"), "weight", nn.Tanh())


def frozen(kind: Kind, model: nn.Module) -> None:
    kind.part(model, "qkv").requires_grad_(False)
    kind.layer(model).temperature.requires_grad_(False)


def layer_norm_eps_0(kind: Kind, model: nn.Module) -> None:
    kind.part(model, "norm").eps = 0.0


def of_one_element(t: Tensor, *_: Any) -> nn.Parameter:
    return nn.Parameter(t.detach().mean().reshape(1, 1, 1))


SITUATIONS: dict[str, Callable[[Kind, nn.Module], None]] = {
    "nothing": lambda kind, model: None,
    **{f"hook of {name}": hook(name) for name in ("layer", "whole", "qkv", "proj", "norm")},
    **{f"hook of {name}": hook(name) for name in ("attn_drop", "proj_drop", "drop_path")},
    **{f"forward of {name}": patch(name) for name in ("layer", "qkv", "proj", "norm", "attn_drop", "drop_path")},
    **{
        f"wrapped {name}": wrap(name, Wrapped)
        for name in ("qkv", "proj", "norm", "attn_drop", "proj_drop", "drop_path")
    },
    **{f"{name} is Identity": wrap(name, lambda _: nn.Identity()) for name in ("attn_drop", "proj_drop", "drop_path")},
    **{f"{name} is Twice": wrap(name, lambda _: Twice()) for name in ("attn_drop", "proj_drop", "drop_path")},
    **{f"{name} in training": mode(name, True) for name in ("attn_drop", "proj_drop", "drop_path")},
    "attn_drop drops all": mode("attn_drop", True, 1.0),
    "training": in_training,
    "temperature of one element": give("temperature", of_one_element),
    "temperature without dimensions": give("temperature", lambda t, _: nn.Parameter(t.detach().mean())),
    "temperature per feature": give("temperature", lambda t, _: nn.Parameter(t.detach().expand(-1, 1, C // HEADS) * 1)),
    "temperature per row": give("temperature", lambda t, _: nn.Parameter(t.detach().expand(-1, C // HEADS, 1) * 1)),
    "temperature is parametrized": parametrized,
    "temperature was parametrized": no_longer_parametrized,
    "weight is parametrized": parametrized_weight,
    "layer scale is a number": give("layer_scale", lambda *_: 0.5),
    "layer scale of (1, C)": give("layer_scale", lambda t, _: nn.Parameter(t.detach()[None])),
    "layer scale of (1, 1, C)": give("layer_scale", lambda t, _: nn.Parameter(t.detach()[None, None])),
    "layer scale of (1,)": give("layer_scale", lambda t, _: nn.Parameter(t.detach()[:1])),
    "layer norm with eps 0": layer_norm_eps_0,
    "partly frozen": frozen,
}
