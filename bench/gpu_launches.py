"""What a call of the Triton backend launches: recorded from Triton itself, on a GPU or with ``bench.host``'s driver."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

import xformer_kernels as xk
from bench.workloads import OpShape
from xformer_kernels.backends.triton import launch, layer, linear, maps, ops
from xformer_kernels.layer.maps import Rule
from xformer_kernels.reference import accumulate_dtype

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = {
    "gram_kernel": 2, "apply_kernel": 2, "forward_kernel": 4, "gradients_kernel": 6, "map_backward_kernel": 0,
    "layer_sample_kernel": 0, "layer_maps_kernel": 0, "layer_maps_backward_kernel": 0, "layer_rows_kernel": 0,
    "layer_statistics_kernel": 1, "layer_gram_kernel": 1, "layer_mix_kernel": 2,
}  # fmt: skip
"""Tensors of B H N D numbers that a kernel reads or writes, for ``map="query_key"`` and ``norm="token"``; none if the
kernel is not named here. In backward, the passes of a layer read one more; a residual is one that is read already."""
OPTIONS = ("num_warps", "num_stages", "maxnreg")
PLANNED = tuple(
    function
    for module in (ops, linear, layer, maps)
    for function in vars(module).values()
    if hasattr(function, "plans")
)


@dataclass(frozen=True)
class Recorded:
    """A launch of a kernel, with what Triton compiled it to."""

    name: str
    programs: int
    constants: dict[str, Any]
    warps: int
    stages: int
    shared: int
    cubin: bytes
    again: Callable[[], object]

    @property
    def tokens(self) -> int:
        """Tensors of tokens that it reads or writes, see :data:`TOKENS`."""
        of_gram = self.name == "layer_gram_kernel" and not self.constants["SYMMETRIC"]
        of_mix = self.name == "layer_mix_kernel" and self.constants["I"] > 0
        return TOKENS.get(self.name, 0) + (of_gram or of_mix)

    @property
    def tiles(self) -> tuple[int, int]:
        """Programs for the same tokens, and how many of them compute something."""
        if self.name != "layer_gram_kernel":
            return 1, 1
        rows, columns = (-(-self.constants[C] // self.constants[block]) for C, block in TILES)
        tiles = rows * columns
        return tiles, (tiles + rows) // 2 if self.constants["SYMMETRIC"] else tiles


TILES = (("CA", "BLOCK_A"), ("C", "BLOCK_C"))
Change = Callable[[str, dict[str, Any]], None]


@contextmanager
def recording(change: Change | None = None) -> Iterator[list[Recorded]]:
    """Records the launches of Triton kernels within it. `change` may replace the compiler options of a kernel.

    Plans are dropped on both sides, since a planned call does not ask Triton.
    """
    recorded: list[Recorded] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if change:
            change(self.__name__, options)
        compiled = run(self, *args, grid=grid, warmup=warmup, **options)
        if warmup:  # compiled for its registers, and not launched
            return compiled
        whole = (*args, *(options[name] for name in self.arg_names[len(args) :]))
        size = (*grid, 1, 1)[:3]
        recorded.append(
            Recorded(
                self.__name__,
                size[0] * size[1] * size[2],
                options,
                compiled.metadata.num_warps,
                compiled.metadata.num_stages,
                compiled.metadata.shared,
                compiled.asm["cubin"],
                lambda: compiled[size](*whole),
            )
        )
        return compiled

    _forget()
    JITFunction.run = record
    try:
        yield recorded
    finally:
        JITFunction.run = run
        _forget()


def _forget() -> None:
    for function in PLANNED:
        function.plans.clear()


@contextmanager
def processors(factor: float) -> Iterator[None]:
    """Within it, calls are split as on a device of so many times the multiprocessors: more or fewer waves."""
    target = launch.target

    def scaled(device: torch.device) -> launch.Target:
        real = target(device)
        return real._replace(processors=max(1, round(real.processors * factor)))

    launch.target = scaled  # type: ignore[assignment]
    try:
        yield
    finally:
        launch.target = target


def inputs(shape: OpShape, dtype: torch.dtype, device: str, values: bool = True) -> tuple[Tensor, ...]:
    """q, k and v of a packed projection, temperature and dout, drawn on the device; without `values`, only memory."""
    generator = torch.Generator(device).manual_seed(0) if values else None

    def draw(*size: int) -> Tensor:
        if not values:
            return torch.empty(size, dtype=dtype, device=device)
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    q, k, v = draw(shape.B, shape.N, 3, shape.H, shape.D).permute(2, 0, 3, 1, 4).unbind(0)
    dout = draw(shape.B, shape.N, shape.H, shape.D).transpose(1, 2)
    return q, k, v, torch.linspace(0.7, 1.5, shape.H, device=device), dout


def gradients(tensors: tuple[Tensor, ...], backend: str = "triton") -> tuple[Tensor, ...]:
    """out and the gradients of q, k, v and temperature."""
    *rest, dout = tensors
    leaves = [x.detach().requires_grad_() for x in rest]
    out = xk.xfa(*leaves, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def of_call(tensors: tuple[Tensor, ...], change: Change | None = None) -> list[tuple[str, Recorded]]:
    """The launches of xfa, forward and then backward, each with its direction."""
    *rest, dout = tensors
    leaves = [x.detach().requires_grad_() for x in rest]
    with recording(change) as recorded:
        out = xk.xfa(*leaves, backend="triton")
        count = len(recorded)
        torch.autograd.grad(out, leaves, dout)
    return [("forward" if i < count else "backward", x) for i, x in enumerate(recorded)]


def calls_of_layer(
    x: Tensor, heads: int, mask: Tensor | None = None, map: str = "query_key"
) -> dict[str, list[Callable[[], object]]]:
    """The calls of the kernels of a half block in Gram form by direction, for tokens (B, N, C). Other tensors are
    uninitialised."""
    B, C, wide, eps = x.shape[0], x.shape[-1], accumulate_dtype(x.dtype), 1e-6
    rule = Rule(map, "softmax", 1e-12)

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=wide, device=x.device)

    size = (heads, C // heads, C)
    weight, bias, c, n = empty(B, 1, C, C), empty(B, 1, C), empty(B, C), empty(B, 1)
    weights, sums = (empty(3, *size), empty(3, *size[:2]), empty(heads)), (c, n, c)
    P, T, e, cos = empty(B, rule.rows, *size), empty(B, *size), empty(B, *size[:2]), empty(B, *size[:2], size[1])
    one = x.unsqueeze(1)
    return {
        "forward": [
            partial(layer.layer_sample, x, mask, eps),
            partial(layer.layer_gram, one, one, True, mask, c, eps),
            partial(maps.layer_maps, P, *weights, *sums, None, rule),
            partial(layer.layer_mix, one, weight, bias, one, None, None, c, eps, False),
        ],
        "backward": [
            partial(layer.layer_gram, one, one, False, mask, c, eps),
            partial(maps.layer_maps_backward, T, e, *weights, cos, empty(B, 2, *size[:2]), *sums, None, rule),
            partial(layer.layer_mix, one, weight.mT, bias, one, one, weight, c, eps, True),
        ],
    }


def of_layer(shape: OpShape, heads: int, dtype: torch.dtype) -> list[tuple[str, Recorded]]:
    """The launches of :func:`calls_of_layer` for tokens of D features; nothing is computed."""
    found = []
    x = torch.empty(shape.B, shape.N, shape.D, dtype=dtype)
    for direction, calls in calls_of_layer(x, heads).items():
        with recording() as recorded:
            for call in calls:
                call()
        found += [(direction, launched) for launched in recorded]
    return found


_compiled = {False: 0, True: 0}


def count_compiled() -> dict[bool, int]:
    """How many kernels Triton has compiled (False) and how many its cache had (True), from the first call of this
    function on, in this process."""

    def listener(*, cache_hit: bool, **_: object) -> None:
        _compiled[cache_hit] += 1

    triton.knobs.compilation.listener = listener
    return _compiled


def seconds(call: Callable[[], object], on_gpu: bool) -> tuple[float, float]:
    """Median time of a call on the GPU, with its caches flushed before each, and the distance between the quartiles
    over it. Without a GPU, the host's time of one call."""
    if not on_gpu:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun, 0.0
    samples = do_bench(call, warmup=5, rep=40, return_mode="all")
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
    return median / 1e3, (high - low) / median
