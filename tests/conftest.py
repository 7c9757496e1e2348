"""Fixtures: the backends, the state each test starts from, and the proof of which backend ran."""

from __future__ import annotations

import importlib
import os
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

# Before torch is imported: threads that wait do not take the processor from the other test processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The form that a layer takes is that of the built-in figures, on every machine.
os.environ["XFORMER_KERNELS_CALIBRATION"] = "off"

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when kernels are defined: Triton's kernels run on CPU tensors then.
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Without a GPU the CUDA kernels are the same sources, compiled for the CPU: see tests/cuda.
EMULATING = not HAS_GPU
SANITIZE = os.environ.get("XFORMER_KERNELS_EMULATED_SANITIZE", "")

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
import emulated  # noqa: E402
from cases import THOROUGH  # noqa: E402

from xformer_kernels import backends, dispatch  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for bench and experiments, which are not installed
KERNELS = tuple(backends.PATHS)
REQUIRED = os.environ.get("XFORMER_KERNELS_REQUIRE_EXTENSION", "0") not in ("", "0")
EXPECTED = os.environ.get("XFORMER_KERNELS_EXPECTED_LOCATION")
if EXPECTED and not Path(backends.__file__).resolve().is_relative_to(Path(EXPECTED).resolve()):
    raise pytest.UsageError(f"the package under test is {backends.__file__}, not the build in {EXPECTED}")

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_configure(config):
    """Builds the emulated kernels once, before the processes that run tests start; each of these loads them."""
    if not EMULATING or emulated.why_not():
        return
    if hasattr(config, "workerinput"):
        config.stash[EMULATED] = config.workerinput["emulated"]
    else:
        try:
            config.stash[EMULATED] = (str(emulated.build(sanitize=SANITIZE)), "")
        except RuntimeError as error:  # the tests of these kernels fail, and no others
            config.stash[EMULATED] = ("", str(error))
    folder, _ = config.stash[EMULATED]
    if folder:
        emulated.load(Path(folder))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    if EMULATED in node.config.stash:
        node.workerinput["emulated"] = node.config.stash[EMULATED]


EMULATED = pytest.StashKey[tuple[str, str]]()
"""The folder of the emulated kernels, or why they could not be built."""


@pytest.fixture(autouse=True)
def same_start_for_every_test():
    torch.set_num_threads(2)
    torch.manual_seed(0)


def broken_interpreter():
    """Why Triton's interpreter cannot run here, or nothing."""
    import numpy
    import triton

    try:
        int(numpy.zeros(1))
    except TypeError:
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
            return f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}"
    return ""


@pytest.fixture
def need_backend(request):
    """Skips where the backend was not built, unless the extension is required: then its absence is a failure."""

    def need(name):
        _, cause = backends.load(name) if name != "reference" else (None, "")
        if name == "cuda" and EMULATING:
            _, broken = request.config.stash.get(EMULATED, ("", ""))
            if broken:
                pytest.fail(broken)
            cause = emulated.why_not() or cause
        if cause and REQUIRED:
            pytest.fail(f"backend {name} is required and cannot be imported: {cause}")
        if cause:
            pytest.skip(f"backend {name} is not installed here: {cause}")
        if name == "triton" and INTERPRETING and broken_interpreter():
            pytest.skip(broken_interpreter())

    return need


@pytest.fixture
def triton_runs(need_backend):
    """For tests that reach the Triton kernels without the `kernel` fixture."""
    need_backend("triton")


def devices_of(name):
    """Where the tests run a backend."""
    elsewhere = {"triton": INTERPRETING, "cuda": EMULATING}
    on_cpu = ["cpu"] if elsewhere.get(name, True) else []
    on_gpu = ["cuda"] if HAS_GPU and name != "cpp" and not elsewhere.get(name, False) else []
    return on_cpu + on_gpu


def pytest_generate_tests(metafunc):
    """`backend` (every one), `kernel` (every one but the reference) and `device`; tests on a GPU are marked gpu."""
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
    """What a push does not wait for: tests marked ``nightly``, and of a test marked ``one_in(n)`` all but one in n of
    the combinations of slow kernels.

    The names of the combinations decide which, so that these are the same everywhere.
    """
    if THOROUGH:
        return
    left_out = []
    for item in items:
        mark = item.get_closest_marker("one_in")
        slow = mark and (is_slow(item.callspec.params) or ("triton" in item.path.parts and INTERPRETING))
        if item.get_closest_marker("nightly") or (slow and zlib.crc32(item.name.encode()) % mark.args[0]):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in {*left_out}]


def is_slow(params):
    """Whether a GPU's kernels run on the CPU, with these parameters of a test."""
    name = params.get("kernel", params.get("backend"))
    return (name == "triton" and INTERPRETING) or (name == "cuda" and EMULATING)


@pytest.fixture
def backend(request, need_backend):
    """Every backend, the reference included."""
    need_backend(request.param)
    return request.param


@pytest.fixture
def kernel(request, need_backend):
    """Every backend of kernels."""
    need_backend(request.param)
    return request.param


@pytest.fixture
def device(request):
    return request.param


def _named(request):
    """The backend or kernel that the test is given."""
    return next(request.getfixturevalue(name) for name in ("backend", "kernel") if name in request.fixturenames)


@pytest.fixture
def slow(request):
    """Whether the test's kernels are a GPU's and run on the CPU, much more slowly than others: fewer examples."""
    return is_slow({"kernel": _named(request)})


@pytest.fixture
def interpreted(request):
    """Whether the test's kernels are run by Triton's interpreter: many times slower than even the emulated ones."""
    return _named(request) == "triton" and INTERPRETING


@pytest.fixture
def shorter(slow):
    """A shape of the tables, (B, N, ...), for slow kernels a small batch of tokens enough to be cut into parts."""
    return lambda shape: (min(shape[0], 3), min(shape[1], 700), *shape[2:]) if slow else shape


@pytest.fixture
def need_features(request):
    """Skips what the test's backend refuses for its number of features, in words that it must have for it."""

    def need(*head_dims):
        device = "cuda" if HAS_GPU and not INTERPRETING else "cpu"
        reasons = dispatch.reasons_against(_named(request), device, (torch.float32,), head_dims)
        if any("features per head" in reason for reason in reasons):
            pytest.skip(f"{_named(request)}: {'; '.join(reasons)}")

    return need


@pytest.fixture
def ran_backend():
    """Within ``ran_backend(name, *ops)`` that backend must run all of these ops, and no other backend any op.

    The reference has no ops: its functions, xfa, gram and channel_mix, are recorded, and nothing in a compiled graph
    is.
    """

    @contextmanager
    def ran(name, *ops):
        with dispatch.record() as seen:
            yield
        others = {backend for backend, _ in seen} - {name}
        assert not others, f"{others} ran, not {name} alone"
        if name != "reference":
            assert set(ops) <= {op for _, op in seen}, f"{name} ran {sorted({op for _, op in seen})}, not {ops}"

    return ran


@pytest.fixture
def ran(request, ran_backend):
    """``ran(*ops)`` for the backend or kernel that the test is given."""
    name = _named(request)
    return lambda *ops: ran_backend(name, *ops)


@pytest.fixture
def ran_auto(ran_backend):
    """``ran_auto(*ops)`` for what backend="auto" chooses for ordinary tensors on the CPU."""
    name = dispatch.choose("auto", "cpu", (torch.float32,), (8,))
    return lambda *ops: ran_backend(name, *ops)


@pytest.fixture
def load(monkeypatch):
    """``load("providers")`` imports the module of bench/ that lies beside these tests."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: importlib.import_module(f"bench.{name}")
