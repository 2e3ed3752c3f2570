# Each command sets itself up: on a machine with only python3 (3.11 or newer) and make it creates .venv, installs
# into it and runs. The set-up is repeated when pyproject.toml or constraints.txt change, and otherwise skipped.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# two workers with a thread each, so that they do not compete for two cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.NOTPARALLEL:
.PHONY: compare pictures test test-slow test-all gpu-test format clean

# train dense and structured layers side by side; `make compare ARGS='--preset smoke'`
compare: .venv/report.stamp
	$(BIN)/structlin compare $(ARGS)

# the pictures of docs/structures.md
pictures: .venv/report.stamp
	$(BIN)/python docs/pictures.py

test: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

test-slow: .venv/dev.stamp
	$(PYTEST) -m slow

test-all: test test-slow

# on a machine whose own python3 has a CUDA build of torch, and pytest; installs nothing. With pytest-xdist there,
# `make gpu-test ARGS='-n 8'`. The kernels run once more under the memory checker, if the machine has it
gpu-test:
	STRUCTLIN_TEST_DEVICE=cuda PYTHONPATH=src $(PYTHON) -m pytest -q -p no:benchmark $(ARGS) tests/contract tests/gpu tests/test_kernels.py
	! command -v compute-sanitizer || PYTHONPATH=src compute-sanitizer --error-exitcode 9 \
		$(PYTHON) -m pytest -q -p no:cacheprovider tests/test_kernels.py

format: .venv/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

# pip is the last thing that venv puts in place
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("structlin needs Python 3.11 or newer, and this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv

.venv/report.stamp: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) -e '.[report]'
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) -e '.[dev]'
	touch .venv/report.stamp $@
