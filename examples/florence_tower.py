"""Florence-2's vision tower, whose channel attention becomes ours; with random weights, so nothing is downloaded.

    python examples/florence_tower.py [--quick]

The layers of the real model are replaced in the same way: ``replace_attention(model.model.vision_tower)``.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch.utils.benchmark import Timer
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

from xformer_kernels.integrations import replace_attention


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    narrow = {"embed_dim": (32, 64, 64, 64), "num_heads": (1, 2, 2, 2), "num_groups": (1, 2, 2, 2)}
    config = Florence2VisionConfig(depths=(1, 1, 1, 1), **(narrow if options.quick else {}))
    before = Florence2VisionBackbone(config).eval()
    after = copy.deepcopy(before)
    pixels = 96 if options.quick else 512
    image = torch.randn(1, 3, pixels, pixels)
    print(f"{pixels} x {pixels} pixels: {replace_attention(after)} of the tower's channel attentions replaced")
    with torch.no_grad():
        features = [tower(image).last_hidden_state for tower in (before, after)]
        error = ((features[1] - features[0]).abs().max() / features[0].abs().max()).item()
        print(f"largest difference of the features {error:.1e}")
        times = [
            Timer("tower(image)", globals={"tower": tower, "image": image}, num_threads=torch.get_num_threads())
            .timeit(1 if options.quick else 3)
            .median
            for tower in (before, after)
        ]
    print(f"forward: {times[0] * 1e3:.0f} ms before, {times[1] * 1e3:.0f} ms after")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
