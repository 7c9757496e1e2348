"""What the two forms of a layer cost: which one ``form="auto"`` takes.

Seconds are those of multiplying (FLOPs by the speed of who does it), of moving bytes, and of starting so many small
operations. They are estimates to compare with each other, of a machine in proportion to which others are assumed to be.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Machine(NamedTuple):
    matmul: float  # FLOP/s of torch's matrix products of many tokens
    kernel: float  # FLOP/s of our passes
    algebra: float  # FLOP/s of torch's products of C x C matrices, with what is done to each number between them
    bandwidth: float  # bytes/s
    start: float  # seconds of one small operation, as in a model: with caches that other layers have filled


# cpu: measured on two cores of a Zen 5, torch 2.14, float32; `python -m bench layer` reports the regret of its choices.
# kernels: with projections by xformer_kernels.inference; matmul is oneDNN's, which was measured in their place.
# cuda: by design, from the data sheet of an H100 in tf32; not measured.
MACHINES = {
    "cpu": Machine(matmul=2.2e11, kernel=2.8e11, algebra=1.2e11, bandwidth=2.5e10, start=1e-5),
    "kernels": Machine(matmul=4.4e11, kernel=2.8e11, algebra=1.2e11, bandwidth=2.5e10, start=1e-5),
    "cuda": Machine(matmul=2e14, kernel=1.5e14, algebra=5e13, bandwidth=2.5e12, start=6e-6),
}


class Shape(NamedTuple):
    B: int
    N: int
    C: int
    H: int
    inner: int  # features of all heads
    out: int
    itemsize: int
    training: bool


class Cost(NamedTuple):
    """Estimated; of forward, or of forward and backward in training."""

    flops: float
    bytes: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB, about {1e3 * self.seconds:.3g} ms"


def _machine(device: str) -> Machine:
    return MACHINES.get(device, MACHINES["cuda"])


def direct(s: Shape, device: str) -> Cost:
    """Two projections and xfa, each from memory to memory; backward twice the products."""
    m, times = _machine(device), 3 if s.training else 1
    tokens, D = s.B * s.N, s.inner // s.H
    projections = 2 * tokens * s.inner * (3 * s.C + s.out) * times
    xfa = 4 * tokens * s.inner * D * times
    # forward: x, q k v twice, out twice, y; backward: these once more and their gradients
    numbers = tokens * (s.C + 8 * s.inner + s.out) * times
    moved = numbers * s.itemsize
    seconds = projections / m.matmul + xfa / m.kernel + moved / m.bandwidth + 10 * times * m.start
    return Cost(projections + xfa, moved, seconds)


def gram(s: Shape, device: str) -> Cost:
    """Two passes over x and algebra of C x C matrices per image; backward two passes more."""
    m, tokens, D = _machine(device), s.B * s.N, s.inner // s.H
    forward = s.C * s.C + 2 * s.C * s.out
    backward = 2 * s.C * s.out + 2 * s.C * s.out + 2 * s.C * s.C
    passes = tokens * (forward + (backward if s.training else 0))
    per_image = 2 * s.C * s.inner * (2 * s.C + s.out + 2 * D)
    if s.training:
        per_image += 2 * s.C * s.inner * (4 * s.C + 2 * s.out + 5 * D)
    algebra = s.B * per_image
    numbers = tokens * (2 * s.C + s.out) + (tokens * (2 * s.C + 2 * s.out + s.C) if s.training else 0)
    moved = numbers * s.itemsize
    operations = 130 if s.training else 45
    seconds = passes / m.kernel + algebra / m.algebra + moved / m.bandwidth + operations * m.start
    return Cost(passes + algebra, moved, seconds)


def cheaper(s: Shape, device: str) -> str:
    return "gram" if gram(s, device).seconds < direct(s, device).seconds else "direct"


cached = lru_cache(maxsize=4096)(cheaper)
