# make demo    from text to a fine-tuned classifier, on Python's standard library
# make test    the tests
# make check   format, lint, types, spelling, shell scripts
# make mutation  small mistakes in the code, one at a time: do the tests see them? Takes an hour; docs/mutation.md
# make venv    the virtual environment with pinned packages that the other targets use
# make clean   remove the virtual environment and all caches; keep runs/ and data/

PYTHON ?= python3
VENV ?= .venv
# Processes that run tests, one file at a time each; up to 3 GB of memory per process. Many wait for their ranks.
TEST_WORKERS ?= 3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

# pip builds DeepSpeed from source, in an isolated environment without torch. Both variables pin the build tools
# there: older versions of pip read the first, newer ones the second.
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input

.PHONY: demo test check mutation venv clean

demo: $(INSTALLED)
	@PATH="$(abspath $(BIN)):$$PATH" bash launch/demo.sh

test: $(INSTALLED)
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder

check: $(INSTALLED_DEV)
	@$(BIN)/python -m ruff format --check --quiet . || \
		{ echo "Badly formatted: run '$(BIN)/python -m ruff format .'"; exit 1; }
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m mypy
	@$(BIN)/python -m codespell_lib
	@$(BIN)/shellcheck launch/*.sh tools/*.sh .ci/run
	@echo "Format, lint, types, spelling and shell scripts are in order."

# `make mutation MUTANTS='distft.data.packing*'` runs some of them.
mutation: $(INSTALLED)
	@$(PIP_INSTALL) -e '.[test,mutation]'
	@$(BIN)/python -m mutmut run --max-children $(TEST_WORKERS) $(MUTANTS)
	@$(BIN)/python -m mutmut results

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "$(PYTHON) was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "distft needs Python 3.11 or newer, and $(PYTHON) is older. Name another: make PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments. Debian, Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "Installing pinned packages into $(VENV): 1 to 5 minutes and 2 GB the first time, seconds later."
	@$(PIP_INSTALL) -e '.[test,tensorboard]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing ruff, mypy, codespell and shellcheck into $(VENV)."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find distft launch tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
