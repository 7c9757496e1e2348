"""Builds xformer-kernels-cuda: the CUDA module of xformer-kernels, with the version of this source tree.

The toolkit and the environment variables are those of the ``setup.py`` of xformer-kernels. Without a toolkit the build
is an error.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from setup import LICENSE, BuildWithCMake  # noqa: E402

os.environ["XFORMER_KERNELS_CUDA"] = "1"
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "xformer_kernels" / "__init__.py").read_text(), re.M)

setup(
    version=VERSION,
    license=LICENSE,
    install_requires=[f"xformer-kernels=={VERSION}"],
    ext_modules=[Extension("xformer_kernels_cuda._cuda", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
)
