"""A few calls of the fuzzer; ``make fuzz`` runs more, with other calls for other seeds."""

from __future__ import annotations

import pytest
from fuzz.calls import CALLS, attempt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", CALLS)
def test_random_calls(name):
    if name == "model":
        pytest.importorskip("timm", reason="timm, whose models are converted, is not installed")

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**31))
    def check(seed):
        wrong, _ = attempt(name, seed)
        assert not wrong, f"python tests/fuzz --only {seed} --functions {name}: {wrong}"

    check()


def test_wrong_result_is_found(monkeypatch):
    """The fuzzer must find a wrong result."""
    from xformer_kernels.backends import cpp

    right = cpp.xfa_forward

    def wrong(*args):
        out, stats = right(*args)
        return out * (1 + 1e-4), stats

    monkeypatch.setattr(cpp, "xfa_forward", wrong)
    assert any(attempt("xfa", seed)[0] for seed in range(20))
