"""The comparison that all other tests use must refuse wrong results."""

import pytest
import torch

from xformer_kernels.testing import assert_bitwise, assert_close

ORACLE = torch.linspace(-3, 3, 1000, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accepts_rounding_and_refuses_more(dtype):
    rounded = ORACLE.to(dtype)
    assert_close(rounded, rounded, ORACLE, "rounded")
    wrong = rounded.clone()
    wrong[500] += 32 * torch.finfo(dtype).eps * 3
    with pytest.raises(AssertionError, match="one value: max error"):
        assert_close(wrong, rounded, ORACLE, "one value")
    with pytest.raises(AssertionError, match="rms error"):
        assert_close((rounded.double() + 20 * torch.finfo(dtype).eps).to(dtype), rounded, ORACLE, "all a little")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_nan_and_inf_must_match_the_oracle(value):
    special = torch.tensor([float("nan"), float("inf"), 1.0], dtype=torch.float64)
    oracle = torch.cat((special, ORACLE))
    good = oracle.float()
    assert_close(good, good, oracle, "good")
    for place, right in enumerate(special.tolist()):
        bad = good.clone()
        bad[place] = value
        if repr(value) != repr(right):
            with pytest.raises(AssertionError):
                assert_close(bad, good, oracle, "bad")


def test_tolerance_is_relative_to_the_terms_of_a_difference():
    exact, noise = torch.zeros(10, dtype=torch.float64), torch.full((10,), 1e-7)
    with pytest.raises(AssertionError):
        assert_close(noise, torch.zeros(10), exact, "without terms")
    assert_close(noise, torch.zeros(10), exact, "with terms", terms=torch.ones(10, dtype=torch.float64))


def test_nonfinite_eager_values_do_not_raise_the_tolerance():
    """Where eager overflows, the tolerance comes from eager's finite values."""
    eager = ORACLE.half()
    eager[0] = float("inf")
    wrong = ORACLE.half()
    wrong[0] += 1
    with pytest.raises(AssertionError):
        assert_close(wrong, eager, ORACLE, "beside an overflow")


def test_bitwise_distinguishes_signed_zeros():
    with pytest.raises(AssertionError, match="bits differ"):
        assert_bitwise(torch.tensor([0.0]), torch.tensor([-0.0]), "zeros")
