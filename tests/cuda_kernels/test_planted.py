"""A step of the kernels that is left out (XK_STEP of csrc/cuda/portable.h) is found out by the checks that all tests
use, in every kernel that has the step; with all steps in place the very same checks find nothing."""

import json
import subprocess
import sys
from pathlib import Path

import emulated
import planted
import pytest

from xformer_kernels import backends

HERE = Path(__file__).parent

ONE_LAUNCH = {"one launch, forward", "one launch, backward"}
TWO_PASSES = {"two passes, forward", "two passes, backward"}
# What cannot be seen: two passes have no columns beyond the features and no clusters, and products add up nothing over
# lanes.
CAUGHT = {
    "barrier": {*ONE_LAUNCH, *TWO_PASSES, "sums", "products"},
    "tail_mask": {*ONE_LAUNCH, *TWO_PASSES, "sums", "products"},
    "column_mask": ONE_LAUNCH,
    "shuffle": {*ONE_LAUNCH, *TWO_PASSES, "sums"},
    "cluster_barrier": ONE_LAUNCH,
}


def test_faults_are_caught():
    """In one process and of one build: these take longer than the kernels."""
    if emulated.why_not():
        pytest.skip(emulated.why_not())
    script = [sys.executable, HERE / "planted.py", emulated.build(target="planted"), *CAUGHT]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("none") == {}, "something is seen where no fault is planted"
    assert {fault: set(parts) for fault, parts in found.items()} == CAUGHT, found


def test_the_kernels_of_all_tests_pass_the_same_checks(need_backend, monkeypatch):
    need_backend("cuda")
    backend, _ = backends.load("cuda")
    cuda = backend and backend.module
    if not cuda.EMULATED:
        pytest.skip("the kernels run on a GPU here")
    monkeypatch.setattr(cuda, "path", "any")  # the checks set it
    assert planted.report() == {"none": {}}


def test_every_fault_is_planted():
    """The table has all faults of portable.h, so that none is added without a test."""
    text = (HERE.parents[1] / "csrc/cuda/portable.h").read_text()
    names = text.split("enum class Fault {")[1].split("}")[0].replace(" ", "").split(",")
    assert set(names) - {"none"} == set(CAUGHT)
