"""Replayed calls launch the same kernels as calls without plans, with the addresses of their own tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import THOROUGH

triton = pytest.importorskip("triton", reason="triton is not installed")
replay = pytest.importorskip("xformer_kernels.backends.triton.replay", reason="triton is not installed")
workarounds = pytest.importorskip("xformer_kernels.backends.triton.workarounds", reason="triton is not installed")


def test_planned_calls_launch_the_same():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cases = range(5) if THOROUGH else [0]
    command = [sys.executable, Path(__file__).with_name("replayed.py"), *map(str, cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compared, calls, seen_by_hook, asynchronous = json.loads(done.stdout)
    assert seen_by_hook == 1
    assert not asynchronous["channel_mix of 128"]  # a loop over features, see workarounds.py
    assert asynchronous["gram of 64"] == workarounds.HAS_FENCES
    assert set(compared) == {
        "xfa_forward", "xfa_backward", "gram", "channel_mix", "linear_attention_forward", "linear_attention_backward",
        "layer_sample", "layer_gram", "layer_maps", "layer_maps_backward", "layer_mix",
    } and min(compared.values()) >= 2 * len(cases) - 1  # fmt: skip
    # including the profiler's function that ends the count
    assert calls["forward"] <= 42 and calls["forward+backward"] <= 115, calls


@pytest.mark.parametrize("hook, seen", [(None, False), (print, True)], ids=["none", "function"])
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_may_be_a_function_or_none(name, hook, seen, monkeypatch):
    """A launch hook may be a function or None: Triton accepts both in place of its chains of hooks."""
    monkeypatch.setattr(triton.knobs.runtime, name, hook)
    assert replay._has_hooks() is seen
