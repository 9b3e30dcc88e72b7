# make demo   install and run the whole job on embedded data
# make test   install and run the tests
# make check  what CI runs: ruff, mypy, tests
# CONSTRAINTS= (empty) installs without the pins, for instance to keep a torch you already chose.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

# Two processes of one thread each: small matrices gain nothing from threads.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: demo test slow check lint types bench comparison clean

demo: $(VENV)/.runtime
	$(VENV)/bin/rdp-calc demo

test: $(VENV)/.dev
	$(PYTEST)

slow: $(VENV)/.dev
	$(PYTEST) -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

check: lint types test

bench: $(VENV)/.dev
	$(VENV)/bin/python benchmarks/startup.py
	$(VENV)/bin/python benchmarks/calibration.py
	$(VENV)/bin/python benchmarks/accounting.py
	$(VENV)/bin/python benchmarks/dp_sgd.py
	$(VENV)/bin/python benchmarks/langevin_runtime.py
	$(VENV)/bin/python benchmarks/chains.py
	$(VENV)/bin/python benchmarks/network_runtime.py
	$(VENV)/bin/python benchmarks/recollection.py
	$(VENV)/bin/python benchmarks/shadows.py

# the table of docs/comparison.md
comparison: $(VENV)/.dev
	$(VENV)/bin/python benchmarks/comparison.py > docs/comparison.md

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rdp-calc needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(PIP) -e '.[runtime]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(PIP) -e '.[runtime,plots,parquet,dev]'
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
