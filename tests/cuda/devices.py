"""Checks of xfa on another emulated device, which a process has for life: see test_emulated.py.

    XK_EMULATION_DEVICE=8.0 python devices.py FOLDER

Prints, as JSON, the kernels that each problem took: [[shape, dtype, forward's, backward's], ...].
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import emulated
import torch

# (B, N, H, D): for one block, for a cluster or two passes, and wide.
SHAPES = ((2, 21, 2, 8), (1, 330, 1, 30), (1, 40, 1, 130), (1, 20, 1, 256))


def main(folder: str) -> None:
    emulated.load(Path(folder))
    torch.set_num_threads(1)
    from cases import Config, make_problem

    from xformer_kernels import _cuda
    from xformer_kernels.backends import cuda

    report = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            problem = make_problem(shape, Config("key_value") if shape[3] == 130 else None, dtype=dtype, masked=True)
            inputs = (problem.q, problem.k, problem.v, problem.temperature)
            options = (problem.token_mask, *problem.config.kwargs().values())
            out, stats = cuda.xfa_forward(*inputs, *options)
            forward = _cuda.launched()
            dqkv, dtemperature = cuda.xfa_backward(problem.dout, *inputs, stats, *options)
            backward = _cuda.launched()
            dq, dk, dv = dqkv.transpose(2, 3).unbind(0)
            problem.check({"out": out, "dq": dq, "dk": dk, "dv": dv, "dtemperature": dtemperature})
            report.append([shape, str(dtype).removeprefix("torch."), forward, backward])
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
