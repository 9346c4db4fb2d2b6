# Two commands need nothing but Python >= 3.11: `make demo` trains on the bundled verses, `make test` checks the project.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-oldest test-newest test-pretend-gpu test-pretend-gpu-oldest test-pretend-gpu-newest lint docs bench clean

demo: $(VENV)/.demo
	$(BIN)/python -m fastpoem.train

# One thread in each of two processes: threads that wait for one another are slow on cores that others use.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --quiet

lint: $(VENV)/.test
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary

# The site of docs/, into build/site. A broken link or anchor is an error.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "the docs are in build/site"

.venv-docs/.installed: constraints-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-docs.txt mkdocs-material jieba
	@touch $@

# The suite with the oldest of all that pyproject.toml allows, and with the newest that there is today. Behind targets of their own because each
# installs PyTorch's CUDA build, several GB. PIP_CONSTRAINT stands in for what a machine's own pip configuration pins.
test-oldest: CONSTRAINTS := constraints-oldest.txt
test-newest: CONSTRAINTS := /dev/null
test-oldest test-newest: test-%:
	test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	PIP_CONSTRAINT=$(CONSTRAINTS) .venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--upgrade --upgrade-strategy eager --editable '.[test]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest --numprocesses 2 --dist worksteal --quiet

# The CUDA path where there is no GPU (tests/pretend_gpu/README.md), under the oldest PyTorch and Triton and under the newest: two CUDA builds,
# 5.4 GB each. Both are installed before the first is tried, so that a full disk is told at once.
GPU_ENDS := newest oldest
test-pretend-gpu: $(GPU_ENDS:%=.venv-pretend-gpu-%/.installed) $(GPU_ENDS:%=test-pretend-gpu-%)

$(GPU_ENDS:%=test-pretend-gpu-%): test-pretend-gpu-%: .venv-pretend-gpu-%/.installed
	.venv-pretend-gpu-$*/bin/python tests/pretend_gpu/pretend.py test

$(GPU_ENDS:%=.venv-pretend-gpu-%/.installed): .venv-pretend-gpu-%/.installed: pyproject.toml tests/pretend_gpu/constraints-%.txt
	@for tool in gcc nm; do command -v $$tool >/dev/null || \
		{ echo "make test-pretend-gpu needs $$tool: install a C compiler and binutils (Debian: apt-get install gcc binutils)" >&2; exit 1; }; done
	@builds=0; for end in $(GPU_ENDS); do test -e .venv-pretend-gpu-$$end/.installed || builds=$$((builds + 1)); done; \
		test "$$(df -Pk . | awk 'NR == 2 {print $$4}')" -ge $$((7000000 * builds + 1000000)) || \
		{ echo "make test-pretend-gpu needs $$((7 * builds + 1)) GB of disk for $$builds CUDA builds of PyTorch: make room in $$PWD" >&2; exit 1; }
	$(PYTHON) -m venv .venv-pretend-gpu-$*
	@echo "installing into .venv-pretend-gpu-$* PyTorch's CUDA build (some minutes the first time)"
	PIP_CONSTRAINT=tests/pretend_gpu/constraints-$*.txt timeout 30m .venv-pretend-gpu-$*/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-input --editable . pytest pytest-timeout pytest-xdist coverage || \
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
	rm -rf $(VENV) .venv-* build/site runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
