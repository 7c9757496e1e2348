"""A block of Sana's transformer and the layers of a DC-AE decoder, whose linear attention becomes ours; random weights.

    python examples/sana_block.py [--quick]

The layers of the real models are replaced in the same way: ``replace_attention(pipe.transformer)``,
``replace_attention(pipe.vae)``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from diffusers import AutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from xformer_kernels.integrations import replace_attention


def compare(name: str, before: nn.Module, call: Callable[[nn.Module], Tensor], runs: int) -> float:
    """Prints outputs and times of a module before and after; the largest difference over the largest output."""
    after = copy.deepcopy(before)
    layers = replace_attention(after)
    with torch.no_grad():
        expected = call(before)
        error = ((call(after) - expected).abs().max() / expected.abs().max()).item()
        times = [
            Timer("call(module)", globals={"call": call, "module": module}, num_threads=torch.get_num_threads())
            .timeit(runs)
            .median
            for module in (before, after)
        ]
    print(
        f"{name}: {layers} layers replaced, largest difference {error:.1e}, "
        f"{times[0] * 1e3:.0f} ms before, {times[1] * 1e3:.0f} ms after"
    )
    return error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    heads, side, runs = (4, 8, 1) if options.quick else (36, 32, 3)
    dim = 32 * heads
    block = SanaTransformerBlock(
        dim, heads, 32, num_cross_attention_heads=4, cross_attention_head_dim=dim // 4, cross_attention_dim=dim
    ).eval()
    x, text = torch.randn(2, side * side, dim), torch.randn(2, 20, dim)
    step = torch.randn(2, 6 * dim)
    errors = [
        compare(
            f"Sana's block, {side * side} tokens, {heads} heads",
            block,
            lambda block: block(x, encoder_hidden_states=text, timestep=step, height=side, width=side),
            runs,
        )
    ]
    autoencoder = AutoencoderDC(
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(32, 64),
        decoder_block_out_channels=(32, 64),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    ).eval()
    latent = torch.randn(1, 32, 16 if options.quick else 64, 16 if options.quick else 64)
    errors.append(compare("DC-AE's decoder", autoencoder.decoder, lambda decoder: decoder(latent), runs))
    return 0 if max(errors) < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
