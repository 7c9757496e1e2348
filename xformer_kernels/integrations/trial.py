"""Tests whether a fused forward matches the forward of a module's own class, for small random inputs in float64."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xformer_kernels import torch_internals
from xformer_kernels.integrations.parts import OF_TORCH, STATE


class Trial(NamedTuple):
    """The result of a trial. ``agrees`` is None if the trial is not possible: under fake tensors and meta devices."""

    agrees: bool | None
    why: str = ""


def run(
    make: Callable[[], nn.Module],
    fused: Callable[..., Tensor],
    inputs: Callable[[], tuple[Any, ...]],
    thorough: bool = False,
) -> Trial:
    """Tries ``fused(module, *inputs())`` on a copy of the module that `make` returns.

    inputs: a shape for every floating-point tensor; other arguments are passed unchanged. thorough: also in training
    mode, without dropout and with gradients.
    """
    if torch.compiler.is_compiling() or torch_internals.dispatch_modes():
        return Trial(None, "it cannot be tried while tensors are traced or fake")
    numbers = torch.Generator().manual_seed(0)
    try:
        with (
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.set_grad_enabled(thorough),
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            warnings.simplefilter("ignore")
            module = _copy(make(), numbers)
            args = tuple(_drawn(a, numbers).requires_grad_() if isinstance(a, tuple) else a for a in inputs())
            for training in (False, True)[: 1 + thorough]:
                module.train(training)
                before = _state(module)
                expected = _outcome(module, type(module).forward, args, training)
                if _state(module) != before:
                    return Trial(False, "its forward sets attributes")
                got = _outcome(module, fused, args, training)
                if any(t is not None and t.is_meta for t in (*expected, *got)):
                    return Trial(None, "it cannot be tried on the meta device")
                for i, (a, b) in enumerate(zip(expected, got, strict=True)):
                    if not _close(a, b):
                        what = "gradients" if i else "outputs"
                        return Trial(False, f"it computes something else ({what} differ)")
    except Exception as error:  # another signature or other submodules: not a module of the family
        return Trial(False, f"it could not be tried ({type(error).__name__}: {_first_line(error)})")
    return Trial(True)


class InFloat64(TorchFunctionMode):
    """Replaces float32 by float64 in calls: some classes compute sums in float32, whatever the dtype of the inputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        return func(*map(_wide, args), **{name: _wide(value) for name, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def kind(module: nn.Module) -> tuple[Any, ...]:
    """A key, equal for modules that run the same code on parameters of the same shapes, so that one trial suffices."""
    own = [(name, *_kind_of_attribute(value)) for name, value in module.__dict__.items() if name not in OF_TORCH]
    tensors = {**module._parameters, **module._buffers}
    shapes = [(name, None if t is None else t.shape) for name, t in tensors.items()]
    parts = [(name, None if part is None else kind(part)) for name, part in module._modules.items()]
    return type(module), type(module).forward, *own, *shapes, *parts


def _kind_of_attribute(value: Any) -> tuple[Any, ...]:
    if isinstance(value, STATE):
        return type(value), value
    cls = type(value)
    # an object without attributes, such as a diffusers processor, is fully described by its class
    stateless = cls.__bases__ == (object,) and not inspect.isroutine(value) and getattr(value, "__dict__", None) == {}
    return cls, None if stateless else id(value)


def _state(module: nn.Module) -> dict[str, int]:
    """The identity of every attribute of the module."""
    return {name: id(value) for name, value in (*module.__dict__.items(), *module._buffers.items())}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _outcome(
    module: nn.Module, forward: Callable[..., Tensor], args: tuple[Any, ...], gradients: bool
) -> list[Tensor | None]:
    """The output, and the gradients of inputs and parameters; None for unused ones."""
    with InFloat64():
        y = forward(module, *args)
    if not gradients or y.is_meta:
        return [y]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad] + list(module.parameters())
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).sin()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True)]


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # the maximum norm takes half the time of allclose for large weights; NaN is not close
    return not a.numel() or bool((a - b).abs_().max() <= 1e-9 * (1 + max(b.max(), -b.min())))


def _drawn(shape: Any, numbers: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=numbers, dtype=torch.float64)


def _copy(module: nn.Module, numbers: torch.Generator) -> nn.Module:
    """A copy on the CPU with random float64 weights and buffers, which shares none with `module` and has no hooks."""

    def buffer(b: Tensor) -> Tensor:
        if b.is_floating_point():  # such as variances
            return torch.rand(b.shape, generator=numbers, dtype=torch.float64) + 0.5
        return torch.zeros(b.shape, dtype=b.dtype) if b.is_meta else b.to("cpu", copy=True)

    def parameter(p: Tensor) -> nn.Parameter:
        return nn.Parameter(_drawn(p.shape, numbers) / 2)

    cls = type(module)
    copied: nn.Module = object.__new__(type(cls.__name__, (cls,), {"__call__": cls.forward}))
    copied.__dict__.update(
        module.__dict__,
        _parameters={key: None if p is None else parameter(p) for key, p in module._parameters.items()},
        _buffers={key: None if b is None else buffer(b) for key, b in module._buffers.items()},
        _modules={key: None if m is None else _copy(m, numbers) for key, m in module._modules.items()},
    )
    if isinstance(copied, nn.modules.dropout._DropoutNd):
        copied.p = 0.0
    for name, value in module.__dict__.items():
        if inspect.ismethod(value) and value.__self__ is module:
            copied.__dict__[name] = MethodType(value.__func__, copied)
    return copied
