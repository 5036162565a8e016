# All targets work from nothing: they make the virtual environment, install, and run.

PYTHON ?= python3
VENV ?= .venv
# constraints-min.txt has the lowest versions that pyproject.toml declares.
CONSTRAINTS ?= constraints.txt
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test check docs kill-test gpu lint clean

demo: $(VENV)/installed
	$(VENV)/bin/nextflow-hf demo $(ARGS)

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 $(ARGS)

# The core, in at most two minutes of two cores: no test that trains, starts processes or drives a browser.
check: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "not slow and not process and not browser and not engine" $(ARGS)

docs: $(VENV)/installed-docs
	$(VENV)/bin/python docs/figures/make.py
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# Twenty kills of each training and extraction, each compared bit for bit; minutes.
kill-test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/kill_test.py $(ARGS)

# What a GPU is wanted for, in nine minutes, with the torch of the Python that is there; see benchmarks/gpu.py.
gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Stamps: the second run installs nothing. The sources are not listed: the installation is editable.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) -e ".[$*]"
	touch $@
