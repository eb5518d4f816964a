# `make demo` and `make test` set up everything they need in .venv, and use it again.

PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed

.PHONY: demo test test-all gpu lint clean

demo: $(STAMP)
	$(VENV)/bin/python experiments/demo.py --output=out/demo

# Compiling is what takes time: here the compiler doesn't optimise. `test-all` takes programs as users have them.
UNOPTIMISED := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
	--xla_cpu_parallel_codegen_split_count=1

test: lint
	XLA_FLAGS="$(UNOPTIMISED) $$XLA_FLAGS" $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not long"

# Those that take long and guard little beside the others, too.
test-all: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --kills=24

# On a machine with a GPU: is it correct, how fast is it? PYTHON is one that has JAX with CUDA; nothing is installed.
OUTPUT ?= out/gpu
gpu:
	PYTHONPATH=. $(PYTHON) experiments/benchmarks/gpu.py --output=$(OUTPUT)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(STAMP): setup.cfg pyproject.toml setup.py $(shell find kernels -type f -path '*/csrc/*')
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, found: $$($(PYTHON) --version). Try make PYTHON=python3.12 ..."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
