"""A timm model before and after replace_attention: outputs, gradients, time.

    python examples/patch_timm.py [--model xcit_nano_12_p8_224] [--quick]

Weights are random: nothing is downloaded. Layers of other classes in the model stay as they are.
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch
from torch.utils.benchmark import Timer

from xformer_kernels.integrations import replace_attention


def gradients(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of a loss with respect to all parameters."""
    loss = model(x).square().mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="by default xcit_nano_12_p8_224, with --quick edgenext_xx_small")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)

    name = options.model or ("edgenext_xx_small" if options.quick else "xcit_nano_12_p8_224")
    size, runs = (64, 1) if options.quick else (224, 5)
    torch.manual_seed(0)
    before = timm.create_model(name).eval()
    with torch.no_grad():  # untrained models may scale their layers by 1e-6, so that their outputs tell nothing
        for key, parameter in before.named_parameters():
            if "gamma" in key:
                parameter.fill_(0.5)
    after = copy.deepcopy(before)
    x = torch.randn(1, 3, size, size)
    print(f"{name}, {size} x {size} pixels: {replace_attention(after)} layers replaced")

    with torch.no_grad():
        error = difference(after(x), before(x))
    # gradients of the whole model, over the largest gradient
    pairs = list(zip(gradients(after, x), gradients(before, x), strict=True))
    largest = max(theirs.abs().max() for _, theirs in pairs)
    gradient_error = max(((ours - theirs).abs().max() / largest).item() for ours, theirs in pairs)
    print(f"largest difference: outputs {error:.1e}, gradients {gradient_error:.1e}")

    with torch.no_grad():
        times = [
            Timer("model(x)", globals={"model": model, "x": x}, num_threads=torch.get_num_threads()).timeit(runs).median
            for model in (before, after)
        ]
    ratio = times[0] / times[1]
    print(f"forward: {times[0] * 1e3:.1f} ms before, {times[1] * 1e3:.1f} ms after, {ratio:.2f} times as fast")
    return 0 if error < 1e-4 and gradient_error < 1e-3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
