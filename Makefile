# `make demo` and `make test` set up everything they need on a fresh machine: a virtual environment in .venv, of 2.3 GB,
# with the versions of constraints.txt. On two cores `make demo` takes about 3 minutes and `make test` about 10, besides
# the set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PYTHONDONTWRITEBYTECODE :=  # the tests start hundreds of processes, which import the same modules

.PHONY: demo quick test lint offline docs wheel gpu gpu-again clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hf,dev]"
	touch $(READY)

# Trains the MoE and a dense model of the same active parameters on the Python standard library's source.
demo: $(READY)
	$(BIN)/moe-triton train --out demo --compare-dense --resume

# Without the tests in the interpreter, of several processes, of peer libraries, and those that start programs or compile.
quick: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not interpreter and not ranks and not peer and not slow"

test: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 4 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in build/site; its tools are in an environment of their own. Any warning is an error.
DOCS := .venv-docs

docs:
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --requirement docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "the site is in build/site: open build/site/index.html"

# The wheel, in dist/, tried in an environment that has nothing else, outside of this folder.
WHEEL := .venv-wheel

wheel:
	rm -rf dist build/lib build/bdist.* $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	$(WHEEL)/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd /tmp && $(CURDIR)/$(WHEEL)/bin/python $(CURDIR)/.ci/smoke.py
	rm -rf $(WHEEL)

# Compiles every shipped configuration of every kernel for four architectures, with no GPU; about an hour on two cores.
offline: $(READY)
	printf '%s\n' sm_90 sm_80 sm_100 gfx942 | xargs -P 2 -I ARCH $(BIN)/python -m moe_triton_kernels.tools.offline \
		--gate --no-loop --all --arch ARCH

# On a GPU machine, with the Python that holds its torch and triton (make gpu GPU_PYTHON=...); nothing is installed.
GPU_PYTHON ?= python3

gpu:
	PYTHONPATH=src:kernels $(GPU_PYTHON) benchmarks/gpu.py

gpu-again:
	PYTHONPATH=src:kernels $(GPU_PYTHON) benchmarks/gpu.py --again

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest $(DOCS) $(WHEEL) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
