"""Small models of other packages before and after their attention is replaced."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from cases import randn
from integrated_cases import EXTRA, SPANDREL

from xformer_kernels.integrations import is_replaced, replace_attention


def florence2(m):
    config = m.Florence2VisionConfig(
        embed_dim=(16, 32), num_groups=(2, 4), num_heads=(2, 4), depths=(1, 1), patch_size=(7, 3), patch_stride=(4, 2),
        patch_padding=(3, 1), patch_prenorm=(False, True), window_size=4, drop_path_rate=0.0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return m.Florence2VisionBackbone(config)


def dc_ae(m):
    blocks = {"block_out_channels": (16, 32), "layers_per_block": (1, 1)}
    kinds = {"block_types": ("ResBlock", "EfficientViTBlock"), "qkv_multiscales": ((), (3,))}
    return m.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=8,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in {**blocks, **kinds}.items()},
    )  # fmt: skip


def sana(m):
    return m.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip


def loftr(m):
    return m.LocalFeatureTransformer(
        {"d_model": 32, "nhead": 4, "layer_names": ["self", "cross"], "attention": "linear"}
    )


IMAGE = (1, 3, 32, 32)
RESTORMER = {"dim": 8, "num_blocks": [1] * 4, "num_refinement_blocks": 1, "heads": [1, 2, 4, 8]}
MODELS = {
    # module, function that builds the model, shapes of inputs or other arguments, number of layers
    "DAT": (
        f"{SPANDREL}.DAT.__arch.DAT",
        lambda m: m.DAT(img_size=32, embed_dim=48, split_size=[8, 8], depth=[2], num_heads=[4], upscale=2), [IMAGE], 1,
    ),
    "HVI-CIDNet": (
        f"{SPANDREL}.HVICIDNet.__arch.cidnet", lambda m: m.CIDNet(channels=[12, 12, 24, 48]), [IMAGE], 12,
    ),
    "Retinexformer": (
        f"{SPANDREL}.RetinexFormer.__arch.retinexformer_arch",
        lambda m: m.RetinexFormer(n_feat=8, stage=1, num_blocks=[1, 1, 1]), [IMAGE], 5,
    ),
    "Restormer": (
        f"{EXTRA}.Restormer.__arch.restormer_arch", lambda m: m.Restormer(**RESTORMER), [IMAGE], 8,
    ),
    "vit-pytorch": (
        "vit_pytorch.xcit",
        lambda m: m.XCiT(
            image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, cls_depth=1, heads=4, mlp_dim=32, dim_head=24
        ),
        [IMAGE], 2,
    ),
    "DaViT": (
        "timm.models.davit",
        lambda m: m.DaVit(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), num_classes=5), [IMAGE], 2,
    ),
    "EfficientViT": (
        "timm.models.efficientvit_mit",
        lambda m: m.EfficientVit(widths=(8, 16, 16, 32, 32), depths=(1, 1, 1, 1, 1), head_dim=8, num_classes=5,
                                 head_widths=(16, 16)),
        [(1, 3, 128, 128)], 2,
    ),
    "Florence-2": ("transformers.models.florence2.modeling_florence2", florence2, [IMAGE], 2),
    "DC-AE": ("diffusers.models.autoencoders.autoencoder_dc", dc_ae, [IMAGE], 2),
    "Sana": (
        "diffusers.models.transformers.sana_transformer", sana,
        [(1, 4, 8, 8), (1, 5, 8), torch.tensor([3])], 2,
    ),
    "LoFTR": (
        "kornia.feature.loftr.loftr_module.transformer", loftr, [(1, 40, 32), (1, 30, 32)], 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    where, build, inputs, layers = MODELS[name]
    model = build(importlib.import_module(where)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1 and p.shape[:1] != (1,):  # layer scales of 0 would hide the attention
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p[0].numel()) ** 0.5)
            elif "scale" in key or "gamma" in key:
                p.fill_(0.7)
        model = model.double()
        args = [randn(*a, seed=1, dtype=torch.float64).sigmoid() if isinstance(a, tuple) else a for a in inputs]
        expected = first_tensor(model(*args))
        ours = copy.deepcopy(model)
        assert replace_attention(ours) == layers
        torch.testing.assert_close(first_tensor(ours(*args)), expected, rtol=1e-4, atol=1e-5)
        for m in ours.modules():
            if is_replaced(m):  # the output must depend on the attention
                m.register_forward_hook(lambda m, i, y: 0 * y)
        assert (first_tensor(ours(*args)) - expected).abs().max() > 1e-3 * expected.abs().max()


def first_tensor(y):
    while not isinstance(y, torch.Tensor):
        y = y[0] if not hasattr(y, "last_hidden_state") else y.last_hidden_state
    return y
