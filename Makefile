# A newcomer needs two commands: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BENCH ?= full
TEST_JOBS ?= auto
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c requirements-dev.txt
NATIVE := $(shell find csrc kernels -type f 2>/dev/null) CMakeLists.txt pyproject.toml requirements-dev.txt
FAST := not gpu and not slow and not network and not browser
# The demo begins anew each time; DEMO_ARGS=--resume goes on with one that was stopped.
DEMO_ARGS ?= --overwrite
RESULT := $(shell uname -m)-$(shell date +%Y%m%d)

.PHONY: help demo test test-all bench lint format build sanitize emulate-avx512 gpu-check clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "pykd needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V). Set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The native build, made again when its sources, the build files or the pins change; then what each purpose needs on top.
$(VENV)/.built: $(NATIVE) | $(BIN)/python
	@echo "Building pykd and installing it into $(VENV) (the first time this fetches torch) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.built
	@echo "Installing what [$*] needs ..."
	$(PIP) 'pykd[$*]'
	@touch $@

demo: $(VENV)/.installed-all  ## compress a real model on real data, end to end (5 minutes on 2 cores)
	$(BIN)/pykd run recipes/digits.yaml $(DEMO_ARGS)

test: $(VENV)/.installed-test  ## every test but those marked gpu, slow, network or browser
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --maxprocesses 8 --dist loadfile -m "$(FAST)" $(TEST_ARGS)

test-all: $(VENV)/.installed-test  ## every test; what this machine cannot run is skipped with its reason
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --maxprocesses 8 --dist loadfile $(TEST_ARGS)

bench: $(VENV)/.installed-test $(VENV)/.installed-bench  ## check, then time pykd beside its peers (BENCH=small: the smallest shapes, once)
	@mkdir -p benchmarks/results
	PYKD_BENCH=$(BENCH) $(BIN)/python -m pytest -q -c benchmarks/pytest.ini benchmarks --benchmark-json=benchmarks/results/cpu-$(RESULT).json $(BENCH_ARGS)

lint: $(VENV)/.installed-test $(VENV)/.installed-lint  ## what pre-commit and CI check
	$(BIN)/pre-commit run --all-files

format: $(VENV)/.installed-lint  ## rewrite the sources to the project's format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/native/*.cpp')

build:  ## rebuild the native module in an environment that already has every dependency
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .

sanitize:  ## run the native kernels at every level of this CPU under AddressSanitizer and UBSan, between guard pages
	cmake -S . -B build/sanitize -DPYKD_PYTHON=OFF -DPYKD_CUDA=OFF -DPYKD_NATIVE_TESTS=ON -DPYKD_SANITIZE=address,undefined
	cmake --build build/sanitize --parallel 2
	build/sanitize/tests/native/compare_levels

emulate-avx512:  ## run the native kernels' AVX-512 code on a CPU without it (needs Debian packages, says which)
	tests/native/run_avx512.sh

gpu-check:  ## on a machine with an NVIDIA GPU, without a network: build, GPU tests, GPU benchmarks
	$(PYTHON) benchmarks/gpu_check.py

clean:  ## remove builds and the environment
	rm -rf build dist wheelhouse $(VENV)
