# make install | demo | test | faults | lint. Needs Python 3.11 and make, and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
SEED ?= 0

.PHONY: install demo test faults lint clean

install: $(VENV)/installed

# torch goes first: DeepSpeed's own build asks for it.
$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on the PATH; give make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/python -m infra.local.demo --seed $(SEED) $(if $(DATA),--data $(DATA))

test: install
	$(BIN)/python -m pytest

# Every fault and the real sets on S3, also what a test run leaves out for its time.
faults: install
	VSWIN_FAULTS=all $(BIN)/python -m pytest tests/faults tests/integration/test_data_prep.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
