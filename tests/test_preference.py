"""Which of Triton and CUDA auto asks first: the table, and the walk that it gives."""

from __future__ import annotations

import pytest
import torch

from xformer_kernels import backends, dispatch, preference


@pytest.mark.parametrize(
    ("capability", "heads", "tokens", "first"),
    [
        (90, 4, 4096, True),
        (90, 4, 4097, False),  # backward would not fit into the shared memory of a cluster
        (90, 33, 196, False),  # heads alone fill the machine
        (100, 8, 1024, True),
        (120, 8, 1024, True),
        (120, 8, 4096, False),
        (80, 8, 196, True),
        (86, 8, 4096, False),
        (75, 1, 16, False),
        (90, 0, 16, False),
    ],
)
def test_few_heads_whose_tokens_fit_are_for_cuda(capability, heads, tokens, first):
    assert preference.cuda_first(capability, heads, tokens * 32 * 2) is first


def test_first_asked_goes_before_the_others():
    text = str(dispatch.explain("auto", "meta", (torch.float32,), (32,), "cuda"))
    assert text.index("  cuda:") < text.index("  cpp:") < text.index("  triton:")
    explained = dispatch.explain("auto", "meta", (torch.float32,), (32,))
    assert list(explained.reasons) == [*backends.ORDER, "reference"]


def test_tensors_on_the_cpu_have_the_usual_order():
    assert preference.first_asked(torch.empty(1, 4, 196, 32), "token") is None
