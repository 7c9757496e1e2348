"""Restormer's attention on a photograph: the whole image at once, and in tiles of rows, exact.

    python examples/restore_photo.py [--image photo.jpg] [--tile 64] [--quick]

The network has Restormer's shape (attention and gated feed-forward blocks of channels, with layer norms) and random
weights, so that its result is no better picture: what is shown is that tiles give the same numbers in less memory.
Without --image the photograph is one of scikit-learn's, or a made one if that is not installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from xformer_kernels.integrations import replace_attention, tiled_mdta


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention (arXiv 2111.09881), in eager PyTorch."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, groups=dim * 3, bias=False)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv_dwconv(self.qkv(x)).reshape(b, 3, self.num_heads, c // self.num_heads, h * w).unbind(1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        result: Tensor = self.project_out((attention @ v).reshape(b, c, h, w))
        return result


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.GroupNorm(1, dim), MDTA(dim, num_heads)
        self.norm2 = nn.GroupNorm(1, dim)
        self.project_in = nn.Conv2d(dim, 4 * dim, 1)
        self.dwconv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)
        self.project_out = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, x: Tensor, attention: Any = None) -> Tensor:
        """`attention` computes the module's attention in another way."""
        x = x + (self.attn if attention is None else attention)(self.norm1(x))
        gate, value = self.dwconv(self.project_in(self.norm2(x))).chunk(2, 1)
        result: Tensor = x + self.project_out(F.gelu(gate) * value)
        return result


class Peak(TorchDispatchMode):
    """The largest tensor that an operator makes, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.nbytes)
        return out


def photograph(path: Path | None, pixels: int) -> Tensor:
    """(1, 3, h, w) in [0, 1], of at most this many pixels a side."""
    if path is not None:
        from PIL import Image

        image = np.asarray(Image.open(path).convert("RGB"))
    else:
        try:
            from sklearn.datasets import load_sample_image

            image = load_sample_image("china.jpg")
        except ImportError:
            rows, columns = np.mgrid[:427, :640]
            image = np.stack([127 + 127 * np.sin(rows / 9 + c) * np.cos(columns / 7) for c in range(3)], -1)
    return torch.from_numpy(np.array(image[:pixels, :pixels], np.float32)).permute(2, 0, 1)[None] / 255


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--tile", type=int, default=64, help="rows that are computed at a time")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    image = photograph(options.image, 96 if options.quick else 1024)
    tile = min(options.tile, image.shape[2] // 4)
    embed, block = nn.Conv2d(3, 48, 3, padding=1), Block(48, 1)
    print(f"photograph of {image.shape[3]} x {image.shape[2]} pixels, 48 channels, tiles of {tile} rows")

    def tiled(x: Tensor) -> Tensor:
        return tiled_mdta(block.attn, x, tile=tile)

    with torch.no_grad():
        x = embed(image)
        eager = block(x)
        runs = {"eager": lambda: block(x)}
        assert replace_attention(block) == 1
        outputs = {"replaced": block(x), "in tiles": block(x, tiled)}
        for name, y in outputs.items():
            print(f"{name}: largest difference from eager {(y - eager).abs().max() / eager.abs().max():.1e}")
        y = block.norm1(x)
        for name, attention in {"replaced": block.attn, "in tiles": tiled}.items():
            runs[name] = lambda attention=attention: attention(y)
            with Peak() as peak:
                attention(y)
            seconds = Timer("run()", globals={"run": runs[name]}, num_threads=torch.get_num_threads()).timeit(1).median
            print(f"attention {name}: {seconds * 1e3:.0f} ms, largest tensor {peak.largest / 1e6:.1f} MB")
    errors = [(y - eager).abs().max() / eager.abs().max() for y in outputs.values()]
    return 0 if max(errors) < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
