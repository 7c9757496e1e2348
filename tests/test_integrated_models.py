"""Small models of spandrel, vit-pytorch and MONAI, before and after their attention is replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import randn
from test_integrated_families import SPANDREL, Case

from xformer_kernels.integrations import is_replaced, replace_attention

MODELS = {
    # where, name, choices, shape of the input, layers
    "DAT": (
        f"{SPANDREL}.DAT.__arch.DAT", "DAT",
        {"img_size": 32, "embed_dim": 48, "split_size": [8, 8], "depth": [2], "num_heads": [4], "upscale": 2},
        (1, 3, 32, 32), 1,
    ),
    "FDAT": (
        f"{SPANDREL}.FDAT.__arch.fdat", "FDAT", {"embed_dim": 48, "num_groups": 1}, (1, 3, 32, 32), 3,
    ),
    "DITN": (f"{SPANDREL}.DITN.__arch.DITN_Real", "DITN_Real", {"dim": 24}, (1, 3, 32, 32), 4),
    "HVI-CIDNet": (
        f"{SPANDREL}.HVICIDNet.__arch.cidnet", "CIDNet", {"channels": [12, 12, 24, 48]}, (1, 3, 32, 32), 12,
    ),
    "Retinexformer": (
        f"{SPANDREL}.RetinexFormer.__arch.retinexformer_arch", "RetinexFormer",
        {"n_feat": 8, "stage": 1, "num_blocks": [1, 1, 1]}, (1, 3, 32, 32), 5,
    ),
    "Restormer": (
        "spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch", "Restormer",
        {"dim": 8, "num_blocks": [1] * 4, "num_refinement_blocks": 1, "heads": [1, 2, 4, 8]}, (1, 3, 32, 32), 8,
    ),
    "vit-pytorch": (
        "vit_pytorch.xcit", "XCiT",
        {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "cls_depth": 1, "heads": 4,
         "mlp_dim": 32, "dim_head": 24}, (1, 3, 32, 32), 2,
    ),
    "MONAI": (
        "monai.networks.nets.restormer", "Restormer",
        {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "dim": 8, "num_blocks": (1, 1, 1),
         "num_refinement_blocks": 1, "heads": (1, 2, 4)}, (1, 1, 8, 8, 8), 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    """As their packages make them; other temperatures give another output, else the comparison would prove nothing."""
    where, cls, choices, shape, layers = MODELS[name]
    case = Case(where, cls, (), (shape,))
    model = case.cls()(**choices).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1 and p.shape[:1] != (1,):  # layer scales of nothing would hide the attention
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p[0].numel()) ** 0.5)
            elif "scale" in key or "gamma" in key:
                p.fill_(0.7)
        x = randn(*shape, seed=1, dtype=torch.float64).sigmoid()
        expected = model(x)
        ours = copy.deepcopy(model)
        assert replace_attention(ours) == layers
        torch.testing.assert_close(ours(x), expected, rtol=1e-7, atol=1e-7)
        for m in ours.modules():
            for key in ("temperature", "temp", "rescale"):
                if is_replaced(m) and hasattr(m, key):
                    getattr(m, key).add_(3.0)
        assert (ours(x) - expected).abs().max() > 1e-4 * expected.abs().max()
