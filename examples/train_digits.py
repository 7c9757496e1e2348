"""A small backbone with cross feature attention learns scikit-learn's digits, in a plain training loop.

    python examples/train_digits.py [--epochs 12] [--quick]

``python -m xformer train --config small --data digits`` trains the real sizes, with checkpoints, augmentation and logs.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import xformer
from xformer import Stage, Variant

# channels, expansions of the MBConvs, kernel; features, layers and blocks of attention
SMALL = Variant((Stage(16, (2,), 3), Stage(32, (2,), 3, 64, 2, 1)), 64)


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 3, 8, 8) and classes, in a fixed shuffled order."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order].unsqueeze(1) / 8 - 1
    return images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target)[order]


def accuracy(model: torch.nn.Module, images: Tensor, classes: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == classes).float().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="one epoch")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    images, classes = digits()
    train, held_out = slice(0, 1440), slice(1440, None)
    model = xformer.XFormer(SMALL, 10, stem_stride=1, stage_strides=(1, 2))  # 16 tokens in the last stage
    epochs = 1 if options.quick else options.epochs
    steps = epochs * (1440 // 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    started = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(1440).split(48):
            loss = F.cross_entropy(model(images[train][batch]), classes[train][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = accuracy(model, images[held_out], classes[held_out])
        print(f"epoch {epoch + 1:2}: loss {loss.item():.3f}, accuracy of 357 held-out digits {found:.1%}")
    print(f"{time.perf_counter() - started:.0f} s")

    fused = xformer.fuse_for_inference(model)
    with torch.inference_mode():
        difference = (fused(images[held_out]) - model.eval()(images[held_out])).abs().max().item()
    print(f"fuse_for_inference: largest difference of logits {difference:.1e}")
    return 0 if found > (0.2 if options.quick else 0.95) and difference < 1e-3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
