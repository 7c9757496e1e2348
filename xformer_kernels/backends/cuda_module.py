"""The compiled module of the CUDA kernels: that of this package, or of the distribution xformer-kernels-cuda."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from xformer_kernels import __version__

BUILT = f"{__name__.removesuffix('.backends.cuda_module')}._cuda"
"""Built from source with the package; comes first."""
INSTALLED = "xformer_kernels_cuda"
"""The package of xformer-kernels-cuda, which the extra "cuda" installs."""


def load() -> ModuleType:
    """The module, or ImportError: there is none, it cannot be loaded, or xformer-kernels-cuda has another version."""
    if find_spec(BUILT) is not None:
        return importlib.import_module(BUILT)
    if find_spec(INSTALLED) is None:
        raise ModuleNotFoundError(f"{BUILT} was not built, and xformer-kernels-cuda is not installed")
    module = importlib.import_module(f"{INSTALLED}._cuda")
    version = module.build_info()["version"]
    if version != __version__:
        raise ImportError(
            f"xformer-kernels-cuda is of version {version}, and xformer-kernels of version {__version__}: "
            f"both must be the same, as pip install 'xformer-kernels[cuda]=={__version__}' installs them"
        )
    return module
