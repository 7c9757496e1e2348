"""Fixtures: backends and devices, the initial state of tests, and checks of which backend ran."""

from __future__ import annotations

import importlib
import os
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

# Set before torch is imported: waiting threads then do not use CPU time that other test processes need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The form of a layer is chosen by the built-in figures, so it is the same on every machine.
os.environ["XFORMER_KERNELS_CALIBRATION"] = "off"

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton's kernels then run on CPU tensors. Read when kernels are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Without a GPU, the sources of the CUDA kernels are compiled for the CPU; see tests/cuda_kernels.
EMULATING = not HAS_GPU
SANITIZE = os.environ.get("XFORMER_KERNELS_EMULATED_SANITIZE", "")

sys.path.insert(0, str(Path(__file__).parent / "cuda_kernels"))
import emulated  # noqa: E402
from cases import THOROUGH  # noqa: E402

from xformer_kernels import backends, dispatch, repeated  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for bench and experiments, which are not installed
KERNELS = tuple(backends.PATHS)
REQUIRED = os.environ.get("XFORMER_KERNELS_REQUIRE_EXTENSION", "0") not in ("", "0")
EXPECTED = os.environ.get("XFORMER_KERNELS_EXPECTED_LOCATION")
if EXPECTED and not Path(backends.__file__).resolve().is_relative_to(Path(EXPECTED).resolve()):
    raise pytest.UsageError(f"the package under test must be the build in {EXPECTED}, got {backends.__file__}")

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_configure(config):
    """Builds the emulated kernels once, before the test processes start; each test process loads them."""
    if not EMULATING or config.option.collectonly or emulated.why_not():
        return
    if hasattr(config, "workerinput"):
        config.stash[EMULATED] = config.workerinput["emulated"]
    else:
        try:
            config.stash[EMULATED] = (str(emulated.build(sanitize=SANITIZE)), "")
        except RuntimeError as error:  # only the tests of these kernels fail
            config.stash[EMULATED] = ("", str(error))
    folder, _ = config.stash[EMULATED]
    if folder:
        emulated.load(Path(folder))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    if EMULATED in node.config.stash:
        node.workerinput["emulated"] = node.config.stash[EMULATED]


EMULATED = pytest.StashKey[tuple[str, str]]()
"""The folder of the emulated kernels, and the error if they could not be built."""


@pytest.fixture(autouse=True)
def reset_threads_and_seed():
    torch.set_num_threads(2)
    torch.manual_seed(0)


def broken_interpreter():
    """Why Triton's interpreter cannot run here; empty if it can."""
    import numpy
    import triton

    try:
        int(numpy.zeros(1))
    except TypeError:
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
            return f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}"
    return ""


@pytest.fixture
def emulated_cuda(need_backend):
    """The module of the backend "cuda", whose kernels are emulated."""
    need_backend("cuda")
    module = backends.load("cuda")[0].module
    if not module.EMULATED:
        pytest.skip("the kernels run on a GPU here")
    return module


@pytest.fixture
def forget():
    """``forget()`` discards the remembered choices of backends; also done before and after the test."""

    def now():
        dispatch._chosen.clear()
        repeated.forget()

    now()
    yield now
    now()


@pytest.fixture
def need_backend(request):
    """``need_backend(name)`` skips the test if the backend is not available, or fails it if extensions are required."""

    def need(name):
        _, cause = backends.load(name) if name != "reference" else (None, "")
        if name == "cuda" and EMULATING:
            _, broken = request.config.stash.get(EMULATED, ("", ""))
            if broken:
                pytest.fail(broken)
            cause = emulated.why_not() or cause
        if cause and REQUIRED:
            pytest.fail(f"backend {name} is required but cannot be imported: {cause}")
        if cause:
            pytest.skip(f"backend {name} is not installed: {cause}")
        if name == "triton" and INTERPRETING and broken_interpreter():
            pytest.skip(broken_interpreter())

    return need


@pytest.fixture
def triton_runs(need_backend):
    """For tests that call the Triton kernels without the `kernel` fixture."""
    need_backend("triton")


def devices_of(name):
    """The device types on which the tests run a backend."""
    elsewhere = {"triton": INTERPRETING, "cuda": EMULATING}
    on_cpu = ["cpu"] if elsewhere.get(name, True) else []
    on_gpu = ["cuda"] if HAS_GPU and name != "cpp" and not elsewhere.get(name, False) else []
    return on_cpu + on_gpu


def pytest_generate_tests(metafunc):
    """Parametrizes `backend` (all), `kernel` (all but the reference) and `device`; marks tests on a GPU as gpu."""
    asked = [name for name in ("backend", "kernel", "device") if name in metafunc.fixturenames]
    if not asked:
        return
    names = KERNELS if "kernel" in asked else dispatch.names()
    pairs = [(name, device) for name in names for device in devices_of(name)]
    if "device" not in asked:
        pairs = [(name, device) for name, device in pairs if device == "cpu"]
    if len(asked) == 1 and asked[0] == "device":
        pairs = [(None, device) for device in ("cpu", "cuda") if device == "cpu" or HAS_GPU]
    params = []
    for name, device in pairs:
        values = [device if what == "device" else name for what in asked]
        marks = [pytest.mark.gpu] if device == "cuda" else []
        params.append(pytest.param(*values, marks=marks, id="-".join(filter(None, (name, device if marks else "")))))
    metafunc.parametrize(asked, params, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Deselects calls that a backend refuses, and what does not run on a push: tests marked ``nightly``, those of slow
    kernels marked ``nightly(slow=True)``, and all but one in n of the combinations of slow kernels of tests marked
    ``one_in(n)``, or of all kernels with ``one_in(n, slow=False)``.

    The selection depends on the names of the combinations only, so it is the same everywhere.
    """
    left_out = [item for item in items if is_refused(item)]
    for item in items if not THOROUGH else ():
        nightly, one_in = map(item.get_closest_marker, ("nightly", "one_in"))
        params = item.callspec.params if hasattr(item, "callspec") else {}
        slow = is_slow(params) or ("triton_kernels" in item.path.parts and INTERPRETING)
        late = nightly and (slow or "slow" not in nightly.kwargs)
        sampled = one_in and (slow or not one_in.kwargs.get("slow", True))
        if late or (sampled and zlib.crc32(item.name.encode()) % one_in.args[0]):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in {*left_out}]


def is_refused(item):
    """Whether the backend of the test refuses the dtype and norm that its parameters (`dtype`, `norm`, `config`,
    `form`) or the mark ``needs`` name.

    Not if it refuses every call: that is what `need_backend` is for.
    """
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = params.get("kernel", params.get("backend"))
    if name not in KERNELS or not params:
        return False
    norm = getattr(params.get("config"), "norm", params.get("norm", "token"))
    call = {"norm": None if params.get("form") == "gram" else norm, "dtype": params.get("dtype", torch.float32)}
    for mark in item.iter_markers("needs"):
        call |= mark.kwargs
    device = params.get("device", "cpu")
    if dispatch.reasons_against(name, device, (torch.float32,), (8,), "token"):
        return False
    return bool(dispatch.reasons_against(name, device, (call["dtype"],), (8,), call["norm"]))


def is_slow(params):
    """Whether a test with these parameters runs GPU kernels on the CPU."""
    name = params.get("kernel", params.get("backend"))
    return (name == "triton" and INTERPRETING) or (name == "cuda" and EMULATING)


@pytest.fixture
def backend(request, need_backend):
    """Each backend, including the reference."""
    need_backend(request.param)
    return request.param


@pytest.fixture
def kernel(request, need_backend):
    """Each backend, except the reference."""
    need_backend(request.param)
    return request.param


@pytest.fixture
def device(request):
    return request.param


def _named(request):
    """The `backend` or `kernel` of the test."""
    return next(request.getfixturevalue(name) for name in ("backend", "kernel") if name in request.fixturenames)


@pytest.fixture
def slow(request):
    """Whether the test runs GPU kernels on the CPU, which is much slower; such tests use fewer examples."""
    return is_slow({"kernel": _named(request)})


@pytest.fixture
def interpreted(request):
    """Whether Triton's interpreter runs the test's kernels; it is many times slower than even the emulated kernels."""
    return _named(request) == "triton" and INTERPRETING


@pytest.fixture
def shorter(slow):
    """Returns a shape (B, N, ...), for slow kernels limited to 3 sequences of 700 tokens, which are still split."""
    return lambda shape: (min(shape[0], 3), min(shape[1], 700), *shape[2:]) if slow else shape


@pytest.fixture
def takes_features(request):
    """``takes_features(*head_dims)``: whether the test's backend supports these numbers of features."""

    def takes(*head_dims):
        device = "cuda" if HAS_GPU and not INTERPRETING else "cpu"
        reasons = dispatch.reasons_against(_named(request), device, (torch.float32,), head_dims, "token")
        return not any("features per head" in reason for reason in reasons)

    return takes


@pytest.fixture
def need_features(request, takes_features):
    """``need_features(*head_dims)`` skips the test if its backend does not support these numbers of features."""

    def need(*head_dims):
        if not takes_features(*head_dims):
            pytest.skip(f"{_named(request)} does not take {head_dims} features per head")

    return need


@pytest.fixture
def ran_backend():
    """In the context ``ran_backend(name, *ops)``, the backend must run all of these ops, and no other backend any op.

    The reference has no ops: its functions xfa, gram and channel_mix are recorded, except in compiled graphs.
    """

    @contextmanager
    def ran(name, *ops):
        with dispatch.record() as seen:
            yield
        others = {backend for backend, _ in seen} - {name}
        assert not others, f"{others} ran, not only {name}"
        if name != "reference":
            assert set(ops) <= {op for _, op in seen}, f"{name} ran {sorted({op for _, op in seen})}, not {ops}"

    return ran


@pytest.fixture
def ran(request, ran_backend):
    """``ran(*ops)``: `ran_backend` for the `backend` or `kernel` of the test."""
    name = _named(request)
    return lambda *ops: ran_backend(name, *ops)


@pytest.fixture
def ran_auto(ran_backend):
    """``ran_auto(*ops)``: `ran_backend` for the backend that "auto" chooses for float32 tensors on the CPU."""
    name = dispatch.choose("auto", "cpu", (torch.float32,), (8,))
    return lambda *ops: ran_backend(name, *ops)


@pytest.fixture
def load(monkeypatch):
    """``load("providers")`` imports the module ``bench.providers`` of this repository."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: importlib.import_module(f"bench.{name}")
