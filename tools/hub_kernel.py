"""Makes a kernel for Hugging Face's Hub from the package: ``python tools/hub_kernel.py OUT [--repo ORG/NAME]``.

The folder has both forms that Hugging Face's ``kernels`` project knows:

    build.toml, flake.nix, CARD.md, torch-ext/xformer_kernels/    what kernel-builder builds
    build/torch-cuda/                                             what ``kernels.get_local_kernel(OUT)`` loads

The kernel is the Python of `xformer_kernels` with its Triton kernels; the compiled modules and their backends are left
out. Imports of the package become relative ones, the ops are registered in a namespace with a digest of the sources in
its name, so that several versions can be in one process, and the module ``layers`` is added. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xformer_kernels"
PARTS = ROOT / "tools" / "hub_kernel"
NAME = "xformer-kernels"
BACKEND = "cuda"
VERSION = 0
"""Of the kernel's interface: 0 is the Hub's convention for one that may still change."""
# The backends of the compiled modules, and what only they use; _ops.py is generated.
LEFT_OUT = {"_ops.py", "calibrate.py", *(f"backends/{name}.py" for name in ("arguments", "cpp", "cuda", "cuda_first"))}
IMPORT = re.compile(r"^(\s*)from xformer_kernels((?:\.\w+)*) import ", re.M)
OPS = '''"""The namespace of the ops, unique to these sources. kernel-builder writes a module with the same names."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(name: str) -> str:
    """``namespace::name``."""
    return f"{id}::{{name}}"
'''


def relative(source: str, path: Path) -> str:
    """The source of the module at `path` in the package, with relative imports of the package's own modules.

    Raises ValueError if an import of another form is left, which would import an installed package instead.
    """
    dots = "." * len(path.parts)
    source = IMPORT.sub(lambda match: f"{match[1]}from {dots}{match[2].removeprefix('.')} import ", source)
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in (name.partition(".")[0] for name in names):
            if name not in {"torch", "triton", *sys.stdlib_module_names}:
                raise ValueError(f"{path} imports {name}: a kernel may import torch, triton and the standard library")
    return source


def sources() -> dict[str, str]:
    """The text of every module of the kernel but ``_ops.py``, by its path in the package."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        if path.as_posix() not in LEFT_OUT:
            found[path.as_posix()] = relative(file.read_text(), path)
    found["layers.py"] = relative((PARTS / "layers.py").read_text(), Path("layers.py"))
    found["__init__.py"] += '\nfrom . import layers  # noqa: E402\n\n__all__ += ["layers"]\n'
    return found


def digest(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def make(out: Path, repo: str) -> None:
    """Writes the kernel into `out`, which must not exist, or be empty."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty")
    modules = sources()
    unique = hashlib.sha256("".join(f"{path}\0{text}\0" for path, text in modules.items()).encode()).hexdigest()[:10]
    identifier = f"_{NAME.replace('-', '_')}_{BACKEND}_{unique}"
    source = out / "torch-ext" / NAME.replace("-", "_")
    built = out / "build" / f"torch-{BACKEND}"
    for folder, files in ((source, modules), (built, modules | {"_ops.py": OPS.format(id=identifier)})):
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    values = {"NAME": NAME, "VERSION": str(VERSION), "BACKEND": BACKEND, "REPO": repo}
    for name in ("build.toml", "flake.nix", "CARD.md"):
        text = (PARTS / name).read_text()
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        (out / name).write_text(text)
    for folder in (out, built):
        shutil.copy(ROOT / "LICENSE", folder)
    files = {
        path.relative_to(built).as_posix(): digest(path.read_bytes()) for path in built.rglob("*") if path.is_file()
    }
    metadata = {
        "id": identifier, "name": NAME, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": BACKEND}, "digest": {"algorithm": "sha256", "files": dict(sorted(files.items()))},
    }  # fmt: skip
    (built / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder, which must not exist, or be empty")
    parser.add_argument(
        "--repo", default=f"local/{NAME}", help="the repository on the Hub, for build.toml and the card"
    )
    options = parser.parse_args()
    make(options.out, options.repo)
    print(f"{options.out}: kernels.get_local_kernel({str(options.out)!r}) loads it")


if __name__ == "__main__":
    main()
