"""A timm model with our attention as an ONNX file, which ONNX Runtime runs without this package.

python examples/export_onnx.py [--model xcit_nano_12_p16_224] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch

from xformer_kernels.integrations import replace_attention


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="xcit_nano_12_p16_224")
    parser.add_argument("--quick", action="store_true", help="XCiT with one block of attention")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    size = 64 if options.quick else 224
    choices = {"depth": 1, "cls_attn_layers": 1, "img_size": size} if options.quick else {}
    model = timm.create_model(options.model, **choices).eval()
    print(f"{options.model}: {replace_attention(model)} layers replaced")
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(image)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (image,), path, input_names=["images"], dynamo=True, verbose=False)
        print(f"{path.name}: {sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6:.1f} MB")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": image.numpy()})[0])
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"largest difference between ONNX Runtime and PyTorch {error:.1e}")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
