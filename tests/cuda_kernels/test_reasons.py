"""Why the CUDA kernels do not serve a call: machines that are not there."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def cuda(emulated_cuda, monkeypatch):
    """The backend as if its kernels were built by CUDA 13.0 for sm_80 and sm_90a, on an H100 with a driver for it."""
    build = {"compiler": "nvcc 13.0.88", "archs": "80 90a", "ptx": "90a", "dtypes": "f32 bf16 f16"}
    for name, value in {"EMULATED": False, "_DEVICE_TYPE": "cuda", "_BUILD": build}.items():
        monkeypatch.setattr(emulated_cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(emulated_cuda, "driver", lambda: 13)
    return emulated_cuda


def reasons(cuda):
    return cuda.unsupported("cuda", (torch.float32,), (32,))


@pytest.mark.parametrize("driver", [13, 14])
def test_drivers_of_the_release_and_newer_serve(cuda, monkeypatch, driver):
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    assert reasons(cuda) == []


def test_older_driver_is_a_reason(cuda, monkeypatch):
    """A wheel may meet a driver that is older than the toolkit it was built with."""
    monkeypatch.setattr(cuda, "driver", lambda: 12)
    assert reasons(cuda) == ["the driver is for CUDA 12, the kernels were built with CUDA 13"]


def test_release_of_the_driver(emulated_cuda, monkeypatch):
    """By cuDriverGetVersion, which gives 1000 times the major version and 10 times the minor one."""

    def library(name):
        assert name == "libcuda.so.1"
        return SimpleNamespace(cuDriverGetVersion=lambda version: setattr(version._obj, "value", 12080))

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert emulated_cuda.driver.__wrapped__() == 12


def test_other_devices_are_a_reason(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    (reason,) = reasons(cuda)
    assert "compute capability 12.0" in reason and "sm_ 80 90a and PTX of 90a" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reasons(cuda) == ["torch sees no CUDA device"]
