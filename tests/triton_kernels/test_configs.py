"""Autotuning configs: the shipped table, and the autotuner that overrides it if enabled."""

from __future__ import annotations

import json

import pytest
import torch
from cases import make_problem

import xformer_kernels as xk

configs = pytest.importorskip("xformer_kernels.backends.triton.configs", reason="triton is not installed")
launch = pytest.importorskip("xformer_kernels.backends.triton.launch", reason="triton is not installed")
maps = pytest.importorskip("xformer_kernels.backends.triton.maps", reason="triton is not installed")
plan = pytest.importorskip("xformer_kernels.backends.triton.plan", reason="triton is not installed")
KEY = configs.Key("gradients", torch.float32, 24, "query_key-token")


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """Enables the autotuner with an empty cache, and clears the tuned configs afterwards."""
    monkeypatch.setenv(configs.AUTOTUNE, "1")
    monkeypatch.setenv(configs.CACHE, str(tmp_path))
    configs._tuned.cache_clear()
    yield tmp_path / "tuned.json"
    configs._tuned.cache_clear()


@pytest.mark.parametrize("arch", (*configs.ARCHITECTURES, "interpreter", "sm_89", "gfx950"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_size_has_a_choice_that_covers_it(dtype, arch):
    """Kernels have a valid config for any number of features, on architectures with and without their own rows."""
    for features in (1, 15, 16, 17, 24, 36, 48, 100, 128, 129, 256):
        for kernel in (
            *configs.KERNELS, *configs.IN_PARTS, *configs.LAYER_KERNELS, *configs.MAPS_KERNELS, *configs.LINEAR_KERNELS,
        ):  # fmt: skip
            if (
                (kernel.startswith("forward") and configs.block(features) * max(4, dtype.itemsize) > 512)
                or (kernel.endswith("tf32x3") and dtype is not torch.float32)
                or (kernel.endswith("gram_tf32x3") and features <= 32)
                or (kernel == "apply_tf32x3" and features > launch.LONGEST_IN_PARTS)
                or (kernel == "gram_normalised" and dtype.itemsize == 2)
                or (kernel in configs.MAPS_KERNELS and features > maps.WIDEST_MAP.get(dtype.itemsize, 0))
                or (kernel.startswith("linear") and not plan.fits_linear_attention(features, dtype.itemsize))
            ):
                continue  # not used: two launches; wider than 16-bit tokens; composed of other ops
            config = configs.get(configs.Key(kernel, dtype, features, "any"), arch)
            assert config.block_o & (config.block_o - 1) == 0
            assert config.block_n & (config.block_n - 1) == 0 and config.block_n <= 256
            assert config.warps in (1, 2, 4, 8, 16)


def test_numbers_of_tokens_batches_and_heads_are_no_part_of_a_key():
    assert set(configs.Key._fields) == {"kernel", "dtype", "features", "map"}


def test_tuner_takes_the_fastest_and_keeps_it_on_disk(tuner, monkeypatch):
    """Configs that exceed the device's resources are skipped. A key is tuned once; new processes read the result."""
    options = configs.candidates(KEY, "sm_90")
    assert len(options) > 3 and len(set(options)) == len(options) and options[0] == configs.shipped(KEY, "sm_90")
    best, seen = options[3], []

    def run(config):
        seen.append(config)
        if config == options[1]:
            raise configs.OutOfResources(1, 2, "shared memory")

    monkeypatch.setattr(configs, "_seconds", lambda call: (call(), 1.0 if seen[-1] == best else 2.0)[1])
    configs.launch(KEY, "sm_90", run)
    assert set(seen) == set(options) and seen[-1] == best
    seen.clear()
    configs.launch(KEY, "sm_90", run)
    assert seen == [best]
    assert list(json.loads(tuner.read_text()).values()) == [list(best)]
    configs._tuned.cache_clear()
    assert configs.get(KEY, "sm_90") == best
    # another process adds a config to the file
    tuner.write_text(json.dumps({**json.loads(tuner.read_text()), "another's": list(best)}))
    configs.launch(KEY._replace(features=48), "sm_90", run)
    assert len(json.loads(tuner.read_text())) == 3
    assert configs.get(KEY, "sm_80") == configs.shipped(KEY, "sm_80")
    monkeypatch.delenv(configs.AUTOTUNE)
    assert configs.get(KEY, "sm_90") == configs.shipped(KEY, "sm_90")


def test_tuner_with_nothing_that_fits(tuner):
    def run(config):
        raise configs.OutOfResources(1, 2, "shared memory")

    with pytest.raises(RuntimeError, match="configurations"):
        configs.launch(KEY, "sm_90", run)


def test_a_broken_or_unwritable_cache_is_survived(tuner, monkeypatch):
    tuner.write_text("{")
    assert configs.get(KEY, "sm_90") == configs.shipped(KEY, "sm_90")
    monkeypatch.setenv(configs.CACHE, "/proc/nowhere")
    monkeypatch.setattr(configs, "_seconds", lambda call: 1.0)
    with pytest.warns(RuntimeWarning, match="not kept"):
        configs.launch(KEY, "sm_90", lambda config: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the number of programs that run at once is the device's")
def test_every_candidate_is_timed_by_a_launch(tuner, monkeypatch, triton_runs):
    """The one-launch forward is timed with every candidate, even if two launches fill the device better than some."""
    ops = pytest.importorskip("xformer_kernels.backends.triton.ops")
    run, candidates, launched, timed = ops._run, configs.candidates, [], []
    shipped = configs.shipped(configs.Key("forward_tf32x3", torch.float32, 3, ""), "interpreter")

    def record(kernel, *args, **more):
        launched.append(kernel)
        return run(kernel, *args, **more)

    def timing(call):
        before = len(launched)
        call()
        timed.append(launched[before:])
        return 1.0

    monkeypatch.setattr(ops, "_run", record)
    monkeypatch.setattr(ops, "_slots", lambda device, kernel, config, *_, **__: 4 if config == shipped else 1000)
    monkeypatch.setattr(configs, "candidates", lambda *key: candidates(*key)[:3])
    monkeypatch.setattr(configs, "_seconds", timing)
    q, k, v = torch.randn(3, 1, 4, 257, 3)
    xk.xfa(q, k, v, torch.ones(4), backend="triton")
    assert timed == [[ops.forward_kernel]] * 3


def test_results_are_right_while_tuning(tuner, ran_backend, triton_runs):
    """Results are correct while the autotuner times the kernels; in the interpreter, it uses the wall clock."""
    p = make_problem((1, 9, 1, 3), device="cuda" if torch.cuda.is_available() else "cpu")
    with ran_backend("triton", "xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend="triton")
    p.check(result)
    kernels = {name.split("/")[2] for name in json.loads(tuner.read_text())}
    assert kernels == {"forward_tf32x3", "gram", "map_backward", "gradients_tf32x3"}
