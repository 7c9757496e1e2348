"""Linear attention with its feature maps: errors against float64, and its time beside softmax attention.

python examples/linear_attention.py [--quick]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from xformer_kernels import linear_attention, reference

MODELS = {
    "relu": "EfficientViT, Sana, DC-AE",
    "elu1": "LoFTR",
    "softmax_tokens": "Efficient Attention",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    worst = 0.0
    q, k, v = torch.randn(3, 1, 4, 200 if options.quick else 5000, 32).unbind(0)
    for feature_map, models in MODELS.items():
        out = linear_attention(q, k, v, feature_map=feature_map)
        exact = reference.linear_attention(q.double(), k.double(), v.double(), feature_map=feature_map)
        error = ((out - exact).abs().max() / exact.abs().max()).item()
        worst = max(worst, error)
        print(f"feature_map={feature_map!r} ({models}): largest error against float64 {error:.1e}")

    print(f"{'tokens':>8} {'linear':>10} {'softmax':>10}   milliseconds, forward")
    for tokens in (64, 128) if options.quick else (1024, 4096, 16384):
        q, k, v = torch.randn(3, 1, 4, tokens, 32).unbind(0)
        values = {"q": q, "k": k, "v": v, "linear_attention": linear_attention, "F": F}
        linear, softmax = (
            Timer(statement, globals=values, num_threads=torch.get_num_threads()).timeit(1).median * 1e3
            for statement in ("linear_attention(q, k, v)", "F.scaled_dot_product_attention(q, k, v)")
        )
        print(f"{tokens:8} {linear:10.2f} {softmax:10.2f}")
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
