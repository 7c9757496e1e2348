"""python tests/fuzz [--calls 10000] [--seed 0] [--only SEED] [--functions xfa,layer]"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the modules with the cases of the tests

os.environ["XFORMER_KERNELS_CALIBRATION"] = "off"  # a seed gives the same call on every machine

import torch

from fuzz.calls import CALLS, attempt


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description="Random calls of every public function.")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first call; call i has seed + i (default: %(default)s)"
    )
    parser.add_argument("--only", type=int, help="the seed of one call to repeat")
    parser.add_argument("--functions", default=",".join(CALLS), help="default: %(default)s")
    options = parser.parse_args()
    names = options.functions.split(",")
    unknown = set(names) - CALLS.keys()
    if unknown:
        parser.error(f"--functions must be among {', '.join(CALLS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    seeds = range(options.seed, options.seed + options.calls) if options.only is None else [options.only]
    counts = {name: [0, 0, 0] for name in names}
    start = time.monotonic()
    for done, seed in enumerate(seeds, 1):
        for name in names if options.only is not None else [names[seed % len(names)]]:
            wrong, missed = attempt(name, seed)
            for i, happened in enumerate((True, missed, bool(wrong))):
                counts[name][i] += happened
            if wrong:
                print(f"{name}, --only {seed} --functions {name}: {wrong}", flush=True)
        if done % 1000 == 0:
            print(f"{done} calls, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    for name, (calls, missed, failed) in counts.items():
        print(f"{name:16} {calls:6} calls, {missed:3} exceeded the tolerance once, {failed:3} failed")
    return 1 if any(failed for _, _, failed in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
