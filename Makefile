# `make demo` shows the main job on the bundled model; `make test` runs the whole suite. Both, like every target here, need
# only Python 3.11 and make: what is missing is installed into .venv first, in the versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Test processes; each computes on one thread.
JOBS ?= 2

BIN := .venv/bin
# Not compiling what is never imported halves the time.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: demo test install lint format types docs notebooks bench clean

demo: .venv/installed
	$(BIN)/probe attention-map --model toy

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

install: .venv/installed

# Torch comes first and alone, so that the build that the constraints name is the one that all others find.
.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time takes a few minutes."
	@$(PIP) torch
	@$(PIP) --editable '.[dev,docs]'
	@touch $@

lint: .venv/installed
	$(BIN)/ruff check .

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: .venv/installed
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "The pages begin at $(CURDIR)/docs/_build/html/index.html"

# Write each analyses/*.py with `# %%` cells into the .ipynb of the same name, and run it there.
notebooks: .venv/installed
	$(BIN)/jupytext --to ipynb --update $$(grep --files-with-matches '^# %%' analyses/*.py)
	$(BIN)/jupyter-execute --inplace --kernel_name=python3 analyses/*.ipynb

bench: .venv/installed
	$(BIN)/python analyses/bench_attention.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache dist docs/_build docs/reference
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
