PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test lint clean

train: $(READY)  ## both stages and the evaluation on an embedded data set
	$(BIN)/accelerate launch recipes/train.py

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamp is newer than pyproject.toml exactly when what it asks for is installed.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
