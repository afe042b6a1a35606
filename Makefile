# make quickstart | test | parity | check;  PYTHON=python3.12 picks the interpreter, VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = setup.cfg pyproject.toml

.PHONY: quickstart test smoke parity check clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m experiments.run --config experiments/configs/quickstart.py --workdir runs/quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

smoke: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m smoke

# The same logits from torch and from here, on fresh random models; torch is needed for nothing else.
parity: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pytest tests/parity

check: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/python -m ruff check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info
