# make demo   install and run the whole job on embedded data
# make test   install and run the tests
# make check  what CI runs: ruff, mypy, tests
# make oldest the tests with the oldest versions that pyproject.toml allows, in an environment of their own
# make dist   wheel and source archive, the same bytes wherever they are built, and their SHA-256
# CONSTRAINTS= (empty) installs without the pins, for instance to keep a torch you already chose.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

# Two processes of one thread each: small matrices gain nothing from threads.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# Every date in a built archive. A fixed one, which is also what hatchling takes by itself, so that pip builds the same.
EPOCH = 1580601600

.PHONY: demo test slow check lint types oldest dist licences bench comparison clean

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

# Types and style are checked with the newest versions only: older packages describe fewer of their types.
oldest:
	$(MAKE) test CONSTRAINTS=constraints-oldest.txt VENV=$(VENV)-oldest

dist: $(VENV)/.dev
	rm -rf dist
	SOURCE_DATE_EPOCH=$(EPOCH) $(VENV)/bin/python -m hatchling build -d dist
	@$(VENV)/bin/python -c 'import hashlib, pathlib; [print(hashlib.sha256(p.read_bytes()).hexdigest(), p) for p in sorted(pathlib.Path("dist").iterdir())]'

# the table of docs/licences.md
licences: $(VENV)/.dev
	$(VENV)/bin/python docs/licences.py > docs/licences.md

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
	rm -rf $(VENV) $(VENV)-oldest .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
