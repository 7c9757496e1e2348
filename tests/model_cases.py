"""Models with non-initial parameters, and the operations that a call of a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from xformer_kernels import inference


def as_trained(model: nn.Module) -> nn.Module:
    """Changes running statistics, affine parameters and biases, so that they differ from their initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for _ in range(3):
            model(2 * torch.randn(8, 3, 64, 64) + 1)
    return model


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


def operations(model: nn.Module, *inputs: Any) -> list[str]:
    """Names of the operations of a call without gradients, in order. Recorded by a dispatch mode, under which kernels
    that a mode cannot see are not used."""
    with torch.no_grad(), Operations() as operations:
        model(*inputs)
    return operations.seen


class Recorded:
    """Wraps a module of kernels and records which kernels are called."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.called = kernels, []

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)

        def call(*args: Any) -> Any:
            # running a program calls several kernels
            self.called += [step for step in args[0].names if step != "xfa"] if name == "run" else [name]
            return kernel(*args)

        return call


def kernels_called(monkeypatch: Any, function: Any, *inputs: Any) -> list[str]:
    """The kernels of :mod:`xformer_kernels.inference` that a call without gradients uses, in order, without packing."""
    return [name for name in all_called(monkeypatch, function, *inputs) if name not in ("pack_linear", "record")]


def all_called(monkeypatch: Any, function: Any, *inputs: Any) -> list[str]:
    """Like :func:`kernels_called`, including packing of weights and recording of programs."""
    with monkeypatch.context() as patch, torch.no_grad():
        recorded = Recorded(inference.KERNELS)
        patch.setattr(inference, "KERNELS", inference.KERNELS and recorded)
        function(*inputs)
    return recorded.called
