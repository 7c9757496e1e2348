"""Which of Triton and CUDA auto tries first: the table, and the resulting order of backends."""

from __future__ import annotations

import pytest
import torch

from xformer_kernels import backends, dispatch
from xformer_kernels.backends import cuda_first
from xformer_kernels.spec import Spec


@pytest.mark.parametrize(
    ("capability", "heads", "tokens", "features", "first"),
    [
        (90, 4, 4096, 32, True),
        (90, 4, 4096, 5, True),
        (90, 4, 4097, 32, False),
        (90, 4, 4096, 33, False),
        (90, 4, 2048, 48, True),
        (90, 4, 16, 65, False),
        (90, 33, 196, 32, False),  # the heads fill the GPU
        (100, 8, 1024, 32, True),
        (120, 8, 1024, 32, True),
        (120, 8, 4096, 32, False),
        (120, 8, 16, 48, False),
        (80, 8, 192, 24, True),
        (80, 8, 196, 32, False),
        (86, 8, 16, 32, False),
        (75, 1, 16, 32, False),
        (90, 0, 16, 32, False),
    ],
)
def test_few_heads_that_fit_use_cuda(capability, heads, tokens, features, first):
    """For 16-bit dtypes."""
    assert cuda_first.cuda_first(capability, heads, tokens, features, 2) is first


def test_first_backend_precedes_the_others():
    text = str(dispatch.explain("auto", "meta", (torch.float32,), (32,), first="cuda"))
    assert text.index("  cuda:") < text.index("  cpp:") < text.index("  triton:")
    explained = dispatch.explain("auto", "meta", (torch.float32,), (32,))
    assert list(explained.reasons) == [*backends.PATHS, "reference"]


def test_tensors_on_the_cpu_have_the_usual_order():
    q = torch.empty(1, 4, 196, 32)
    assert dispatch.first_asked(q, Spec()) is None and not cuda_first.comes_first(q, Spec())
