# The same few verbs for people and CI.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := demo
.PHONY: demo install check fix test wheel clean

demo: install
	$(BIN)/llmmpq quantize demo --avg-bits 3.5 --recipe demo --out demo-quantized --overwrite
	$(BIN)/llmmpq inspect demo-quantized
	$(BIN)/llmmpq eval demo-quantized --baseline demo
	$(BIN)/llmmpq generate demo-quantized --prompt "The library"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	touch $@

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fix: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# setuptools never deletes from build/, and stale files there would enter the wheel.
wheel: install
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean:
	rm -rf build dist demo-quantized .llmmpq-work *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.git/*' -prune -exec rm -rf {} +
