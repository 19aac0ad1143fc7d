# `make demo` and `make test` set everything up by themselves; `make check` is the law for a change.

VENV ?= .venv
PYTHON ?= python3
# The release that the tests were last run with. pyproject.toml takes any from 2.9 on.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers
TRITON ?= triton
BIN := $(VENV)/bin
# pyproject.toml says how much of the lines and branches must be executed.
TESTS := --cov --cov-report=

.PHONY: demo test test-oldest check format lint types docs bench figures

demo: $(VENV)/installed
	$(BIN)/dynaexq demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile $(TESTS)

# What meets Transformers, on the oldest that is supported, and the CUDA kernels by an older Triton, that of PyTorch 2.10
# and 2.11; the other rooms know neither.
test-oldest:
	$(MAKE) test VENV=.venv-oldest TRANSFORMERS=transformers==5.17.0 TRITON=triton==3.6.0 TESTS="tests/hf tests/test_start_up.py \
		tests/runtime/test_forward.py tests/runtime/test_door.py tests/server tests/kernels/test_triton.py \
		tests/benchmarks/test_benchmark_gpu.py tests/test_old_files.py tests/test_evaluate.py \
		--ignore=tests/hf/test_plan.py --ignore=tests/hf/test_two_at_once.py --ignore=tests/hf/test_calibration.py"

check: $(VENV)/installed format lint types test

format: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror dynaexq/kernels/cpu/src/* tests/helpers/*.cpp benchmarks/layers/*.cpp

lint: $(VENV)/installed
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy

# The documentation as a site, in site/; its notebooks are run, and its links checked.
docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

# `make bench` lists the benchmarks; `make bench NAME=layers/cpu` runs one.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/registry.py $(NAME)

# The paper's figures. Table 1 needs lm-evaluation-harness besides: `make bench NAME=figures/table1`.
figures: $(VENV)/installed
	for number in 1 3 4 5; do $(BIN)/python benchmarks/registry.py figures/$$number || exit 1; done

# torch goes first: what depends on it would otherwise bring the newest build with every CUDA library.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]" "$(TRANSFORMERS)" "$(TRITON)"
	touch $@
