"""Estimated costs of the two forms of a layer, from which ``form="auto"`` chooses.

The estimated time is the sum of the times to compute the FLOPs (each at the speed of its kind of kernel), to move the
bytes, and to launch the small operations. It depends only on the shape and the machine; calibration.py measures the
latter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

MARGIN = 2.0
"""If the estimates from measured figures differ by more than this factor, the cheaper form is taken without timing.

The largest error in ``python -m bench layer --shapes grid`` was a factor of 1.9, at 512 features, where the passes over
wide tokens are slower.
"""


class Machine(NamedTuple):
    matmul: float  # FLOP/s of torch's matrix products
    kernel: float  # FLOP/s of our passes
    linear: float  # FLOP/s of our products with packed weights
    bandwidth: float  # bytes/s
    start: float  # seconds per small operation, as within a model: with caches that other layers have filled


# cpu: measured on two cores of a Zen 5, torch 2.14, float32, linear as oneDNN's product. cuda: not measured, taken from
# the data sheet of an H100 in tf32.
MACHINES = {
    "cpu": Machine(matmul=2.2e11, kernel=2.8e11, linear=4.4e11, bandwidth=2.5e10, start=1e-5),
    "cuda": Machine(matmul=2e14, kernel=1.5e14, linear=2e14, bandwidth=2.5e12, start=6e-6),
}


def built_in(device: str) -> Machine:
    """The built-in figures, which need no measurement."""
    return MACHINES.get(device, MACHINES["cuda"])


class Shape(NamedTuple):
    B: int
    N: int
    C: int
    H: int
    inner: int  # features of all heads
    out: int
    itemsize: int
    training: bool
    layer_norm: bool = False
    kernels: bool = False  # whether kernels with packed weights project in the direct form


class Work(NamedTuple):
    """The work of a form, in the order of the fields of :class:`Machine`: FLOPs, bytes, small operations."""

    matmul: float
    kernel: float
    linear: float
    bytes: float
    starts: float

    def on(self, m: Machine) -> Cost:
        flops = self.matmul + self.kernel + self.linear
        seconds = self.matmul / m.matmul + self.kernel / m.kernel + self.linear / m.linear
        return Cost(flops, self.bytes, seconds + self.bytes / m.bandwidth + self.starts * m.start)


class Cost(NamedTuple):
    """Estimated cost of forward, or in training of forward and backward."""

    flops: float
    bytes: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB, about {1e3 * self.seconds:.3g} ms"


def work_of_direct(s: Shape) -> Work:
    """Two projections and xfa, each of which reads and writes memory; backward has twice the products."""
    times = 3 if s.training else 1
    tokens, D = s.B * s.N, s.inner // s.H
    weights = s.inner * (3 * s.C + s.out)
    projections = 2 * tokens * weights * times
    xfa = 4 * tokens * s.inner * D * times
    # forward: x, q k v twice, out twice, y; backward: the same again, and their gradients
    numbers = tokens * (s.C + 8 * s.inner + s.out) + weights
    if s.layer_norm and not s.kernels:
        numbers += tokens * 2 * s.C
    moved = numbers * times * s.itemsize
    if s.kernels:
        return Work(0, xfa, projections, moved, 3)
    return Work(projections, xfa, 0, moved, 10 * times)


def work_of_linear(tokens: int, features: int, out: int) -> Work:
    """One float32 product with a packed weight."""
    return Work(0, 0, 2 * tokens * features * out, 4 * (tokens * (features + out) + features * out), 1)


def work_of_gram(s: Shape) -> Work:
    """Two passes over x and the algebra of C x C matrices per image; two more passes in backward."""
    times = 3 if s.training else 1
    tokens, D = s.B * s.N, s.inner // s.H
    forward = s.C * s.C + 2 * s.C * s.out
    backward = 2 * s.C * s.out + 2 * s.C * s.out + 2 * s.C * s.C
    passes = tokens * (forward + (backward if s.training else 0))
    per_image = 2 * s.C * s.inner * (2 * s.C + s.out + 2 * D)
    if s.training:
        per_image += 2 * s.C * s.inner * (4 * s.C + 2 * s.out + 5 * D)
    numbers = tokens * (2 * s.C + s.out) + (tokens * (2 * s.C + 2 * s.out + s.C) if s.training else 0)
    # elementwise operations of the algebra on its C x I matrices between products: fitted to measurements
    numbers += (40 * s.B * s.inner * s.C + 2 * s.inner * (3 * s.C + s.out)) * times
    return Work(s.B * per_image, passes, 0, numbers * s.itemsize, 130 if s.training else 45)


def direct(s: Shape, m: Machine) -> Cost:
    return work_of_direct(s).on(m)


def gram(s: Shape, m: Machine) -> Cost:
    return work_of_gram(s).on(m)


def ratio(s: Shape, m: Machine) -> float:
    """Estimated time of the Gram form divided by that of the direct form."""
    return gram(s, m).seconds / direct(s, m).seconds


def within(factor: float, s: Shape, m: Machine) -> bool:
    """Whether the estimated times of the two forms differ by less than `factor`."""
    return 1 / factor < ratio(s, m) < factor


def cheaper(s: Shape, m: Machine) -> str:
    return "gram" if gram(s, m).seconds < direct(s, m).seconds else "direct"


cached = lru_cache(maxsize=4096)(cheaper)
