# Two commands need nothing but Python >= 3.11: `make demo` trains on the bundled verses, `make test` checks the project.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-pretend-gpu lint bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m fastpoem.train

# One thread in each of two processes: threads that wait for one another are slow on cores that others use.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --quiet

lint: $(VENV)/.test
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary

# The CUDA path where there is no GPU (tests/pretend_gpu/README.md): a CUDA build of PyTorch, 5.4 GB, in an environment of its own.
GPU_VENV := .venv-pretend-gpu
test-pretend-gpu: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python tests/pretend_gpu/pretend.py test

$(GPU_VENV)/.installed: pyproject.toml tests/pretend_gpu/constraints.txt
	@for tool in gcc nm; do command -v $$tool >/dev/null || \
		{ echo "make test-pretend-gpu needs $$tool: install a C compiler and binutils (Debian: apt-get install gcc binutils)" >&2; exit 1; }; done
	@test "$$(df -Pk . | awk 'NR == 2 {print $$4}')" -ge 8000000 || \
		{ echo "make test-pretend-gpu needs 8 GB of disk for PyTorch's CUDA build: make room in $$PWD" >&2; exit 1; }
	$(PYTHON) -m venv $(GPU_VENV)
	@echo "installing into $(GPU_VENV) PyTorch's CUDA build (some minutes the first time)"
	timeout 30m $(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
		--constraint tests/pretend_gpu/constraints.txt --editable . pytest pytest-timeout pytest-xdist coverage || \
		{ echo "make test-pretend-gpu: PyTorch's CUDA build could not be installed (it is given 30 minutes), see above" >&2; exit 1; }
	@touch $@

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-json benchmarks.json
	$(BIN)/python -m benchmarks.report benchmarks.json

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastpoem needs Python 3.11 or newer; make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (torch and transformers: a minute or two the first time)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) what the tests need (a minute or two the first time)"
	$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) $(GPU_VENV) runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
