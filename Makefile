# Everything starts from a machine with Python and nothing else; `make` lists what there is.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
CXX_FILES = $$(find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all lint format bench fuzz sanitize docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(READY) ## make .venv with vitrail (editable) and the development tools

demo: $(READY) ## a photo through biformer_tiny: features, routing picture, verified ONNX file, speed
	$(BIN)/vitrail demo

test: $(READY) ## the tests (about half an hour on two cores)
	$(PYTEST) -m "not slow" --durations=30

test-all: $(READY) ## the tests and those that take minutes each
	$(PYTEST)

lint: $(READY) ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/typecheck.py
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY) ## ruff's fixes and formatting, clang-format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(READY) ## operators and models against stock PyTorch, timm and, with PEERS=FOLDER, the authors' code
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/models.py $(if $(PEERS),--peers "$(PEERS)")
	$(BIN)/python benchmarks/runtimes.py $(if $(PEERS),--peers "$(PEERS)")

fuzz: $(READY) ## a million calls of the compiled operators with random and spoiled arguments (half an hour)
	$(BIN)/python scripts/fuzz_operators.py --calls 1000000

sanitize: $(READY) ## the kernels' tests under AddressSanitizer, UBSan and ThreadSanitizer (an hour)
	$(BIN)/python -m pytest -q -n $(JOBS) tests/csrc/test_sanitizers.py

docs: $(READY) ## write docs/MODELS.md and docs/WEIGHTS.md from the registry, tables from benchmarks/results and docs/support.json
	$(BIN)/python scripts/model_docs.py
	$(BIN)/python scripts/performance_docs.py
	$(BIN)/python scripts/support_docs.py

clean: ## remove build outputs and caches; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .timm
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Reinstalled only when pyproject.toml is newer. The stamp comes last, so an interrupted installation starts again.
$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: no $(PYTHON) here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version 2>&1), 3.10 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@
