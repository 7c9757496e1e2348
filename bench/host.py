"""Measures the host time of calls of the Triton kernels: ``python -m bench.host``.

Runs on any machine: kernels are compiled for a GPU, and Triton's driver is replaced by one that launches nothing.
Tensors are on the CPU. The units are the times of ``torch.empty(1)`` and, for a forward and backward of xfa, of an
empty ``torch.autograd.Function`` of the same tensors (:class:`Empty`) in the same run. Layers are compared with timm's
``XCA``; their tokens are so few that PyTorch's own operators, which do run, take little more than their overhead.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import xformer_kernels as xk
from bench import sass
from bench.measure import python_calls
from xformer_kernels.backends import triton as backend
from xformer_kernels.backends.triton import launch

PROCESSORS = 132
SHAPES = ((1, 196, 8, 48), (8, 3136, 4, 24), (2, 16384, 8, 32))
LAYER = (1, 16, 2, 16)


class Launched(NamedTuple):
    """The arguments of a launch, with addresses in place of tensors."""

    kernel: str
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


class Driver:
    """A fake GPU of compute capability 9.0. It computes nothing; it records launches if `launches` is a list."""

    launches: list[Launched] | None = None

    def __init__(self) -> None:
        self.utils = self
        outer = self

        class Launcher:
            def __init__(self, source: Any, _: Any) -> None:
                self.name = source.fn.__name__

            def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
                if outer.launches is not None:
                    plain = (t.data_ptr() if isinstance(t, Tensor) else t for t in args[6:])
                    outer.launches.append(Launched(self.name, (x, y, z), tuple(plain)))

        self.launcher_cls = Launcher

    def load_binary(self, name: str, cubin: bytes, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, sass.usage(cubin)["REG"], 0, 1024

    def unload_module(self, _: Any) -> None: ...

    def get_device_properties(self, _: Any) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": PROCESSORS, "warpSize": 32}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> Driver:
    """Installs the fake driver in this process: ops of the backend accept tensors on the CPU, and launch nothing."""
    fake = Driver()
    driver.set_active(fake)
    launch.target = lambda _: launch.Target("sm_90", PROCESSORS)  # type: ignore[assignment]
    backend.unsupported = lambda *_: []
    return fake


def seconds(calls: dict[str, Callable[[], object]], rounds: int = 15, repeat: int = 100) -> dict[str, float]:
    """Minimum CPU time of each call; calls are interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            begun = time.thread_time()
            for _ in range(repeat):
                call()
            taken[name].append((time.thread_time() - begun) / repeat)
    return {name: min(samples) for name, samples in taken.items()}


class Empty(torch.autograd.Function):
    """What autograd alone costs: an op of q, k, v and temperature that saves them and allocates its results."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, temperature)
        B, H, N, D = q.shape
        return q.new_empty(B, N, H, D)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        *tokens, temperature = ctx.saved_tensors
        dqkv = dout.new_empty(3, *tokens[0].shape)
        return *(dqkv.select(0, i) for i in range(3)), torch.empty_like(temperature)


def cases(B: int, N: int, H: int, D: int) -> dict[str, Callable[[], object]]:
    """Calls of xfa with packed bfloat16 tokens; only the addresses of the tensors are used."""
    q, k, v = torch.zeros(B, N, 3, H, D, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
    temperature = torch.ones(H)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, temperature)]
    dout = torch.zeros(B, N, H, D, dtype=torch.bfloat16).transpose(1, 2)

    def forward() -> object:
        return xk.xfa(q, k, v, temperature, backend="triton")

    def both() -> object:
        return torch.autograd.grad(xk.xfa(*leaves, backend="triton"), leaves, dout)

    def empty() -> object:
        return torch.autograd.grad(Empty.apply(*leaves).transpose(1, 2), leaves, dout)

    return {"forward": forward, "forward+backward": both, "empty function": empty}


def layer_cases(B: int, N: int, H: int, D: int) -> dict[str, Callable[[], object]]:
    """Calls of a layer in both forms and of timm's, forward and with backward."""
    from timm.models.xcit import XCA

    x, dy = torch.randn(B, N, H * D), torch.randn(B, N, H * D)
    layers: dict[str, nn.Module] = {"XCA of timm": XCA(H * D, H, qkv_bias=True)}
    for form in ("direct", "gram"):
        layers[f"{form} form"] = xk.XFA(H * D, H, True, form=form, backend="triton")

    def forward(layer: nn.Module) -> object:
        with torch.no_grad():
            return layer(x)

    def both(layer: nn.Module) -> object:
        return torch.autograd.grad(layer(x), list(layer.parameters()), dy)

    return {
        f"{name}, {what}": partial(call, layer)
        for what, call in (("forward", forward), ("forward+backward", both))
        for name, layer in layers.items()
    }


def show(shape: tuple[int, ...], calls: dict[str, Callable[[], object]], fake: Driver, empty: str = "") -> None:
    """Prints a line for each call; `empty`: the name of the one that the others with backward are compared with."""
    counted = {}
    for name, call in calls.items():
        call()
        fake.launches = []
        call()
        counted[name], fake.launches = len(fake.launches), None
    times = seconds({"torch.empty(1)": lambda: torch.empty(1), **calls})
    unit = times.pop("torch.empty(1)")
    for name, taken in times.items():
        of_empty = f"{taken / times[empty]:.1f} x the {empty}, " if empty and "backward" in name else ""
        print(
            f"{shape!s:20} {name:29} {taken * 1e6:6.1f} us, {taken / unit:6.1f} x torch.empty(1), {of_empty}"
            f"{counted[name]} launches, {python_calls(calls[name])} Python calls"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.parse_args(arguments)
    torch.set_num_threads(1)
    fake = install()
    for shape in SHAPES:
        show(shape, cases(*shape), fake, "empty function")
    show(LAYER, layer_cases(*LAYER), fake)


if __name__ == "__main__":
    main()
