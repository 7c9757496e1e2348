"""A D x D map of your own: the kernels compute the passes over tokens, your function the map between them.

    python examples/custom_map.py [--quick]

A small model learns which of its features belong together: tokens are mixed by a hidden permutation of features, and
the map has to find it. The map is a softmax whose rows and columns both sum to about one (Sinkhorn's iteration), which
no kernel knows; gradients flow through it.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from xformer_kernels import xfa

FEATURES = 16


def sinkhorn(S: Tensor) -> Tensor:
    """Almost doubly stochastic matrices from the scaled map (B, H, D, D)."""
    for _ in range(5):
        S = S - S.logsumexp(-1, keepdim=True)
        S = S - S.logsumexp(-2, keepdim=True)
    return S.exp()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(2))
        self.temperature = nn.Parameter(torch.full((1,), 4.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in (self.query(x), self.key(x), x))  # one head
        return xfa(q, k, v, self.temperature, map_fn=sinkhorn).squeeze(1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    hidden, layer = torch.randperm(FEATURES), Layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    steps = 60 if options.quick else 400
    first = loss = torch.zeros(())
    for step in range(steps):
        x = torch.randn(8, 256, FEATURES)
        loss = (layer(x) - x[..., hidden]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = loss.detach() if step == 0 else first
        if step % (steps // 5) == 0:
            print(f"step {step:4}: loss {loss.item():.4f}")
    print(f"loss {first.item():.4f} before, {loss.item():.4f} after {steps} steps")

    x = torch.randn(1, 256, FEATURES)
    q, k, v = (t.unsqueeze(1) for t in (layer.query(x), layer.key(x), x))
    with torch.no_grad():
        ours, theirs = (xfa(q, k, v, layer.temperature, map_fn=sinkhorn, backend=b) for b in ("auto", "reference"))
        error = (ours - theirs).abs().max().item()
    print(f"largest difference between kernels and PyTorch's operators {error:.1e}")
    return 0 if loss < first and error < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
