# make quickstart | test | smoke | parity | tpu | gpu | browser | check | docs | links | notebooks | wheel | bench | soak;  PYTHON=python3.12 picks the interpreter, with an environment of its own.
PYTHON ?= python3
ifeq ($(PYTHON),python3)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN = $(VENV)/bin
SOURCES = setup.cfg pyproject.toml

.PHONY: quickstart test smoke parity tpu gpu browser check docs links notebooks wheel bench soak clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m experiments.run --config experiments/configs/quickstart.py --workdir runs/quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

smoke: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m smoke

# The same logits from torch and from here, on fresh random models and from what is exported; torch and peft are needed for nothing else.
parity: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet torch==2.13.0 accelerate peft
	$(BIN)/python -m pytest tests/parity

# The step compiled for a TPU, which need not be there; in an environment of its own, as jax looks for a TPU where libtpu is.
tpu:
	$(MAKE) VENV=.venv-tpu .venv-tpu/.installed-test
	.venv-tpu/bin/python -m pip install --quiet 'jax[tpu]'
	TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest -n 0 -s tests/parity/test_tpu.py

# The same for GPUs, by jax's plugin for CUDA.
gpu:
	$(MAKE) VENV=.venv-gpu .venv-gpu/.installed-test
	.venv-gpu/bin/python -m pip install --quiet 'jax[cuda12]'
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m pytest -n 0 -s tests/parity/test_gpu.py

check: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy metatuner_jax experiments

# The server's page and reports in a real browser, which is to be on the PATH as `chromium` (apt-get install chromium).
browser: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m pytest tests/browser

# The site, in docs/_build/html. A warning is an error, and so is a link within it that leads nowhere.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -n -b html docs docs/_build/html

# Its links to elsewhere, which takes a network.
links: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

# The notebooks, with a few steps.
notebooks: $(VENV)/.installed-notebooks
	$(BIN)/python -m pytest -n 0 tests/notebooks

# The wheel, installed into an empty environment, with every command used there.
wheel: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python tests/wheel.py

# Every part of the work timed; `make bench BENCH="--against torch"` beside a reference in torch (pip install -e .[bench]).
bench: $(VENV)/.installed
	$(BIN)/python -m experiments.bench $(BENCH)

# The full counts of what `make test` samples: kills, processes, meshes, bad input, properties, fuzzing, and a long run; about an hour.
soak: $(VENV)/.installed-test $(VENV)/.installed-notebooks
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python tests/soak.py --out docs/soak.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev $(VENV)/.installed-docs $(VENV)/.installed-notebooks: $(VENV)/.installed-%: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-* build docs/_build *.egg-info
