"""``python -m xformer_kernels.calibrate [--force]``: the figures of this machine from which ``form="auto"`` chooses.

Measures them if no file has them, and prints them and where they are kept; see
:mod:`xformer_kernels.layer.calibration`.
"""

from __future__ import annotations

import argparse
import sys

import torch

from xformer_kernels import backends
from xformer_kernels.layer import calibration, cost, timing

UNITS = {"matmul": 1e9, "kernel": 1e9, "linear": 1e9, "bandwidth": 1e9, "start": 1e-6}
MEANING = {
    "matmul": "GFLOP/s of torch's matrix products",
    "kernel": "GFLOP/s of the passes over tokens",
    "linear": "GFLOP/s of xformer_kernels.inference.linear",
    "bandwidth": "GB/s",
    "start": "microseconds of a small operation",
}


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if nothing could be measured, otherwise 0. If the file cannot be written, a message is printed, and it
    is not an error."""
    parser = argparse.ArgumentParser(prog="python -m xformer_kernels.calibrate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--force", action="store_true", help="measure again, and forget the forms that were timed")
    force = parser.parse_args(arguments).force
    known = calibration.in_use()
    if known is None:
        print(f"nothing is measured: {calibration.ENVIRONMENT}=off, deterministic algorithms, or a coarse clock")
        _print(cost.built_in("cpu"))
        return 0
    kernels, cause = backends.load("cpp")
    if kernels is None:
        print(f"nothing is measured: the CPU kernels are not there ({cause}); see python -m xformer_kernels.info")
        return 1
    if force:
        known = calibration.Known(calibration.path())
    of = calibration.key()
    print(f"{of.processor}, {of.threads} threads, torch {of.torch}, {of.level}")
    dtype = torch.float32
    if calibration.name(dtype) in known.machines:
        print(f"{known.source(dtype)}; --force measures again")
    else:
        figures = timing.measure(dtype)
        if figures is None:
            print("no figures fit what was measured: the machine is busy, or the clock tells no time")
            return 1
        known.machines[calibration.name(dtype)], known.date = figures, calibration.now()
        cause = calibration.save(known, of, merge=not force)
        print(f"not kept: {cause}" if cause else f"measured, and written to {known.path}")
    _print(known.machines[calibration.name(dtype)])
    return 0


def _print(figures: cost.Machine) -> None:
    for name, value in figures._asdict().items():
        print(f"  {name:<10}{value / UNITS[name]:8.1f}  {MEANING[name]}")


if __name__ == "__main__":
    sys.exit(main())
