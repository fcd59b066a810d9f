# The verbs of the project; `make` alone lists them. Nothing is configured here that pyproject.toml can say.
#
#   PYTHON=python3.12   another interpreter, with a virtual environment and pins of its own
#   VENV=folder         where the virtual environment lies
#   ARGS="..."          arguments of `make run` and `make test`

DEFAULT_PYTHON := python3.11
ifndef PYTHON
# An interpreter that starts, not one that is merely on the path: version managers leave dead shims.
PYTHON := $(shell $(DEFAULT_PYTHON) -c pass 2>/dev/null && echo $(DEFAULT_PYTHON) || echo python3)
DEFAULT_PYTHON := $(PYTHON)
endif
VENV ?= .venv$(if $(filter-out $(DEFAULT_PYTHON),$(notdir $(PYTHON))),-$(notdir $(PYTHON)))

# Pins follow the interpreter that will run: the one in the environment once there is one.
INTERPRETER := $(firstword $(wildcard $(VENV)/bin/python) $(PYTHON))
PINS := $(or $(shell $(INTERPRETER) -c 'import sys; print("py%d%d" % sys.version_info[:2])'),none)
CONSTRAINTS := constraints/$(PINS).txt

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Side by side in three processes, also on two cores: some tests wait. See LANES in tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 3 --no-loadscope-reorder
GPU_PYTHON ?= python3
FAKE_GPU_PYTHON ?= $(BIN)/python
RUNTIME := $(VENV)/.runtime
TOOLS := $(VENV)/.tools
OLDER := $(VENV)/transformers4
AUDITING := $(VENV)/.audit
RELEASING := $(VENV)/.release

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test test-fast test-long test-gpu fake-gpu check fmt parity fuzz soak audit mutate bench bench-gpu bench-page docs docs-reference release-check clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(TOOLS) $(OLDER)/.made ## the project and its development tools, into .venv

run: $(RUNTIME) ## install what is missing, then train, export and sample a small model on this CPU
	$(BIN)/roll-sft train --config-name demo $(ARGS)

test: $(TOOLS) $(OLDER)/.made ## the whole test suite; needs no GPU
	$(PYTEST) $(ARGS)

test-fast: $(TOOLS) ## the tests of a few seconds each, before a commit
	$(PYTEST) -m "not slow" $(ARGS)

check: $(TOOLS) ## format, lint, types, and the floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_imports.py

fmt: $(TOOLS) ## rewrite the code in the house format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

parity: $(TOOLS) ## the loss on every parallel layout against one process
	$(BIN)/python -m pytest -q tests/engine/test_parity.py tests/engine/test_lora.py tests/engine/test_qlora.py --all-layouts
	$(BIN)/python -m pytest -q tests/engine/test_frozen.py tests/engine/test_recipes.py tests/engine/test_objective.py --all-layouts
	$(BIN)/python -m pytest -q tests/engine/test_families_parity.py tests/convert/test_roundtrip.py --all-layouts
	$(BIN)/python -m pytest -q tests/engine/test_expert_parity.py tests/engine/test_expert_resume.py --all-layouts
	$(BIN)/python -m pytest -q tests/engine/test_validation.py --all-layouts
	$(BIN)/python -m pytest -q tests/engine/test_generation.py --all-layouts
	$(BIN)/python -m pytest -q tests/test_killed.py -k adapters --all-layouts

test-long: $(TOOLS) ## what the suite has no time for: stops, restarts and bad numbers in real runs
	$(BIN)/python -m pytest -q tests -m long --all-layouts $(ARGS)

examples: $(TOOLS) ## the examples and the notebook, from an installed copy
	$(BIN)/python -m pytest -q tests/test_installed.py --all-layouts

fuzz: $(TOOLS) ## spoilt configurations, data, checkpoints and models; ARGS="--cases 2000"
	$(BIN)/python -m tests.fuzz $(ARGS)

soak: $(TOOLS) ## real runs under faults, and clean ones; takes half an hour; ARGS="chaos --seconds 600 --seed 7", stops or clean
	PYTHONPATH=. $(BIN)/python -m tests.soak $(ARGS)

mutate: $(TOOLS) ## small faults in packing, plan, masks, loss and metrics that no test notices; ARGS="packing --seconds 300"
	$(BIN)/python tools/mutate.py $(ARGS)

test-gpu: ## floors 0 to 2 on one GPU, with the python3 that has torch, megatron-core and transformers
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m torch.distributed.run --standalone --nproc-per-node 1 tests/gpu/check.py $(ARGS)

bench-gpu: ## a training step on one GPU, as test-gpu
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m torch.distributed.run --standalone --nproc-per-node 1 benchmarks/gpu/step.py $(ARGS)

fake-gpu: $(if $(filter file,$(origin FAKE_GPU_PYTHON)),$(RUNTIME)) ## the engine on fake CUDA tensors, with torch's CUDA build and no GPU; ARGS="7B TP2"
	$(FAKE_GPU_PYTHON) -m tools.fake_gpu $(ARGS)

audit: $(AUDITING) ## known vulnerabilities, secrets in the tree, licences; ARGS="--skip vulnerabilities" without a network
	$(BIN)/python -m tools.audit $(ARGS)

release-check: $(AUDITING) $(RELEASING) ## whether the tree can be released: version, changelog, wheel, docs, audit; ARGS="--skip clean"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m tools.release_check $(ARGS)

bench: $(RUNTIME) ## every benchmark, one JSON line for each measure, kept in benchmarks/results; QUICK=1
	@status=0; for benchmark in $(sort $(wildcard benchmarks/*.py)); do \
		KEEP=1 $(BIN)/python $$benchmark || status=$$?; \
	done; exit $$status

bench-page: $(RUNTIME) ## the tables of docs/performance.md, of what was kept
	$(BIN)/python benchmarks/shared/page.py

docs: $(TOOLS) ## the documentation site, into site/; strict, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

docs-reference: $(RUNTIME) ## docs/configuration.md and docs/cli.md, from the keys and the commands
	$(BIN)/python -m roll_sft.config.reference > docs/configuration.md
	$(BIN)/python tools/cli_reference.py > docs/cli.md

clean: ## remove what tools leave behind; keeps outputs/ and the virtual environment
	rm -rf build dist site roll_sft.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# pip is the last thing `venv` writes, so an interrupted creation is begun again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	@echo "installing roll_sft into $(VENV) with $(CONSTRAINTS); some minutes the first time"
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(TOOLS): $(RUNTIME)
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

# Only `make audit` needs it, and it brings twenty packages.
$(AUDITING): $(TOOLS)
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) pip-audit==2.10.1
	@touch $@

# Only `make release-check` needs it, and it brings twenty packages.
$(RELEASING): $(TOOLS)
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) build==1.6.1 twine==7.0.0
	@touch $@

# Without it one test says that it is skipped, so no failure here ends anything.
$(OLDER)/.made: constraints/transformers4.txt | $(RUNTIME)
	@rm -rf $(OLDER)
	@$(PIP_INSTALL) --no-deps --target $(OLDER) --requirement $< && touch $@ \
		|| echo "transformers 4 cannot be installed into $(OLDER); exports are not read with it"

constraints/%.txt:
	@echo "PYTHON=$(PYTHON) does not start or has no pins; pins exist for" \
		"$(basename $(notdir $(wildcard constraints/py*.txt))), so choose for example PYTHON=python3.11" >&2
	@exit 2
