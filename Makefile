# cnnfast: everything a developer does, from a fresh machine. `make` lists the targets.

# The active environment (a venv's or conda's) if there is one, else .venv, which `make env` makes.
PYTHON ?= python3
PREFIX := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
PY := $(PREFIX)/bin/python
OLDEST := $(CURDIR)/.venv-oldest/bin/python
TORCH := torch==2.14.1 torchvision==0.29.1
TORCH_OLDEST := torch==2.9.0 torchvision==0.24.0
HEADERS := cuda-toolkit[nvcc,cudart,cccl]==13.0.3

# One stamp for each environment that this checkout was installed into.
STAMP := build/env-$(shell echo '$(PREFIX)' | cksum | cut -d ' ' -f 1).stamp
SOURCES := pyproject.toml setup.py build_backend/backend.py \
  $(shell find csrc -name emulation -prune -o -type f -print)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help env test test-all test-oldest check format demo train bench gpu emulation fuzz sanitize simde mutate static matrix clean

help: ## this list
	@echo "cnnfast: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
	@echo "environment: $(PREFIX)"

# ---- set-up

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "cnnfast needs Python 3.10 or newer, $(PYTHON) is older or missing: set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(PREFIX)

$(STAMP): $(SOURCES) | $(PY)
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip --upgrade
	@$(PY) -c 'import torch, torchvision' > /dev/null 2>&1 || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install -e '.[test,demo,check]'
	@mkdir -p $(@D) && touch $@

env: $(STAMP) ## installs torch, cnnfast (editable, natively built) and all tools into the active environment or .venv

# The emulated GPU needs g++ and CUDA's headers: a toolkit's, else PyPI's, in a folder of their own.
emulation: $(STAMP) ## builds the CUDA kernels for the emulated GPU (g++ only) into build/emulation
	@$(PY) tests/run.py --emulation --headers '$(HEADERS)'

# ---- tests

test: $(STAMP) ## sets up everything, then runs the tests: CPU, emulated CUDA, interpreted Triton
	@$(PY) tests/run.py --headers '$(HEADERS)'

test-all: $(STAMP) ## the same with the full products of cases, dtypes, precisions and schedules (hours)
	@$(PY) tests/run.py --full --headers '$(HEADERS)'

build/oldest.stamp: $(STAMP)
	test -x $(OLDEST) || $(PY) -m venv .venv-oldest
	$(OLDEST) -m pip install $(TORCH_OLDEST) rich platformdirs pytest numpy
	@mkdir -p $(@D) && touch $@

test-oldest: build/oldest.stamp ## operator, compile and export tests with the oldest supported torch, in .venv-oldest
	@$(OLDEST) tests/run.py --oldest

fuzz: $(STAMP) ## 100,000 random calls, valid and not, beside torch's: verdict, shape, strides, values, gradients (minutes)
	CNNFAST_FUZZ_CALLS=10000 $(PY) -m pytest -q tests -k test_fuzz -m "not gpu and not emulated and not interpreter"

sanitize: $(STAMP) ## the CPU kernels' tests under the address, undefined-behaviour and thread sanitizers (half an hour)
	@$(PY) tests/sanitize.py

simde: $(STAMP) ## the AVX-512 kernels as functions on AVX2, as `make test` runs them where a processor lacks AVX-512 (half an hour)
	@$(PY) tests/run.py --simde

mutate: $(STAMP) ## changes the GPU kernels one line at a time and counts what the tests notice: a sample (half an hour)
	@$(PY) tests/mutate.py

static: $(STAMP) ## compiles every GPU kernel offline and prints registers, spills and instructions
	@$(PY) tests/run.py --static

# ---- style

check: $(STAMP) ## ruff, mypy, clang-format, import-linter: reports everything that one of them finds
	@$(PY) tests/check.py

format: $(STAMP) ## formats Python and C++
	@$(PY) tests/check.py --fix

matrix: $(STAMP) ## writes the coverage matrix in ARCHITECTURE.md from the registered kernels
	@$(PY) tests/matrix.py --write

# ---- showing and measuring

demo: $(STAMP) ## the demonstration: networks on photographs, tables and plots into demo/
	$(PY) examples/demo.py

train: $(STAMP) ## trains a small ResNet on digits with cnnfast and with PyTorch: curves, metrics, checkpoints into train/
	$(PY) examples/train.py

bench: $(STAMP) ## benchmarks against torch on this machine (3 minutes; pytest benchmarks --full: all)
	$(PY) -m pytest benchmarks --benchmark-only

# Offline, in the active environment, with the system's nvcc.
gpu: ## on a machine with an NVIDIA GPU, offline: builds, tests, benchmarks into benchmarks/results; goes on where it stopped
	@$(or $(wildcard $(PY)),$(PYTHON)) tests/run.py --gpu $(if $(FRESH),--fresh) $(if $(MINUTES),--minutes $(MINUTES))

clean: ## removes what was built; environments stay
	rm -rf build dist *.egg-info .benchmarks .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -f cnnfast/_cpu.*.so cnnfast/_cuda.*.so
	find cnnfast kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
