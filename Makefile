# lamina: `make` lists the targets. Needs Python >= 3.11, make and git; everything else goes into .venv.

PYTHON ?= python3
# Those with which `make dist` tries the wheel.
PYTHONS ?= $(PYTHON)
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
PINS   := -c constraints.txt
TORCH  := torch==2.13.0
# A module is compiled when it is first imported; pip would compile all of them, one after the other.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-compile $(PINS)

# The oldest versions that are supported, in an environment of their own.
OLDEST_PYTHON ?= $(if $(shell command -v python3.11),python3.11,$(PYTHON))
OLDEST        ?= .venv-oldest
# Those that say most about torch, NumPy and the extras in a minute or two.
CORE := $(patsubst %,tests/test_%.py,versions native optim optim_interface optim_loops optimizer gradients \
	state state_torch guests preview report_plot record recorder report_page training loaders devices cli cli_arguments)

# One process for each core, each of which computes on one.
PARALLEL := --numprocesses=auto --dist=worksteal
test test-oldest soak coverage: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-oldest check coverage bench soak dist tried docs pictures format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' \
		| awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo  ## install, then train an example task: lamina run
	@$(BIN)/lamina run $(ARGS)

# mypy uses one core, so the tests run beside it. What it says is shown if it finds something: the last
# line of a run without mistakes is that of pytest.
test: $(VENV)/.dev  ## every gate: lint, format, types, tests (ARGS="-k name" picks tests)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy > $(VENV)/types.txt 2>&1 & types=$$!; \
		$(BIN)/python -m pytest $(PARALLEL) $(ARGS); tests=$$?; \
		wait $$types || { cat $(VENV)/types.txt; exit 1; }; exit $$tests

test-oldest: $(OLDEST)/.dev  ## the core tests with the oldest Python, torch, NumPy and extras
	@$(OLDEST)/bin/python -m pytest $(PARALLEL) $(CORE) $(ARGS)

check: $(VENV)/.dev  ## lint, format and types only
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: $(VENV)/.dev  ## measure: python -m benchmarks
	@$(BIN)/python -m benchmarks $(ARGS)

soak: $(VENV)/.dev  ## the slow tests, those that download, and more examples of those that draw them
	@$(BIN)/python -m pytest -m "slow or network or hypothesis" --hypothesis-profile=full $(ARGS) || { code=$$?; test $$code -eq 5 && echo "no slow tests yet"; }

coverage: $(VENV)/.dev  ## the tests with the share of lines that they run
	@$(BIN)/python -m pytest $(PARALLEL) --cov=lamina --cov-report=term:skip-covered $(ARGS)

# The wheel is tried in an environment for each of PYTHONS.
dist: $(VENV)/.torch  ## build wheel and sdist, and try the wheel in a clean environment (PYTHONS="python3.11 python3.13")
	@rm -rf dist build/dist
	@$(BIN)/python -m hatchling build
	@tar -tzf dist/*.tar.gz | grep -q /tests/test_plan.py
	@set -e; for python in $(PYTHONS); do $(MAKE) --no-print-directory tried TRIED=$$python; done
	@echo "dist/ holds: $$(ls dist)"

# It is installed without extras, as a user has it, and the README's first program run with it.
# Last, mypy and pyright read a typed program against it.
tried: NEW := build/dist/$(notdir $(TRIED))
tried:
	@echo "trying the wheel with $$($(TRIED) --version)"
	@$(TRIED) -m venv $(NEW)
	@$(NEW)/bin/python -m pip --disable-pip-version-check -qq install $(PINS) $(TORCH)
	@$(NEW)/bin/python -m pip --disable-pip-version-check -qq install $(PINS) dist/*.whl
	@$(NEW)/bin/python benchmarks/first_program.py > $(NEW)/first_program.py
	@cd $(NEW) && bin/python -W error first_program.py > /dev/null
	@$(NEW)/bin/lamina 2>&1 | grep -q "pip install"  # without its extra, it says what to install
	@$(NEW)/bin/python -m pip --disable-pip-version-check -qq install $(PINS) mypy "pyright[nodejs]"
	@$(NEW)/bin/python -m benchmarks.typed

docs: $(VENV)/.docs  ## the documentation as a site in build/site, to open from the file system
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

pictures: $(VENV)/.dev  ## draw the pictures of the documentation anew
	@$(BIN)/python -m benchmarks.pictures

format: $(VENV)/.dev  ## rewrite the source to the house format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:  ## remove the environment, caches and results
	rm -rf $(VENV) $(OLDEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp says that one step of the installation is done. torch goes in alone and first: the rest
# then finds it in place, instead of choosing a build of its own. The build tool goes in with it, so
# that it too has the pinned version (--no-build-isolation).

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "lamina needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "Could not create $(VENV). On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.venv constraints.txt
	@echo "installing $(TORCH) (some minutes the first time)"
	@$(INSTALL) $(TORCH) hatchling editables
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing lamina with what the demo needs"
	@$(INSTALL) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing lamina with what the tests need"
	@$(INSTALL) --no-build-isolation -e '.[demo,dev]'
	@touch $@

# The pages are built from the source, which is read and not imported: neither torch nor lamina is needed.
$(VENV)/.docs: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "installing what builds the documentation"
	@$(INSTALL) $$($(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

# torch 2.6 comes with CUDA where it has no build for the CPU alone: about 3 GB are fetched and 5 GB
# take up the disk. Nothing of it is kept in pip's cache or compiled in advance, which halves the time.
$(OLDEST)/.dev: constraints-oldest.txt pyproject.toml
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "The oldest Python is 3.11; '$(OLDEST_PYTHON)' is not. Try: make OLDEST_PYTHON=..."; exit 1; }
	@echo "creating $(OLDEST) with the oldest versions (some minutes the first time)"
	@$(OLDEST_PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check -qq install --no-cache-dir --no-compile \
		-c constraints-oldest.txt torch hatchling editables setuptools
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check -qq install --no-cache-dir --no-compile \
		--no-build-isolation -c constraints-oldest.txt -e '.[demo,report]' \
		pytest pytest-xdist pytest-timeout hypothesis lion-pytorch prodigyopt schedulefree
	@touch $@
