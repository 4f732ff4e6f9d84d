# Every target makes its own virtual environment when there is none.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test slow claims bench docs clean

demo: $(STAMP)   ## generate, evaluate, trace and plot with the shipped model (under 2 minutes)
	$(BIN)/collegium demo --out demo

test: $(STAMP)   ## lint, type-check, architecture floors, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not claim and not slow" -n 2 --dist loadfile

slow: $(STAMP)   ## the tests that `make test` leaves out (3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not claim" -n 2 --dist loadfile

claims: $(STAMP) ## the claim experiments; writes src/collegium/claims.json
	$(BIN)/pytest -m claim tests/claims

bench: $(STAMP)  ## every benchmark, as ratios against a peer in the same run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/collegium bench experts
	$(BIN)/collegium bench routing
	$(BIN)/collegium bench train
	$(BIN)/collegium bench trace
	$(BIN)/collegium bench measure
	$(BIN)/collegium bench shrink
	$(BIN)/collegium bench run

docs: $(STAMP)   ## build the documentation into site/ (a broken link fails)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:           ## remove what the targets made
	rm -rf .venv site demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
