# Everything a person or CI does with a clone. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Test processes side by side, each with one thread of arithmetic: more than cores only slows both down.
JOBS ?= 2
PYTEST_ARGS ?=
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup quickstart test check format i18n docs build clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z0-9]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(READY) ## put kitaeru and its tested libraries into .venv

# One rule, redone only when what it installs has changed; a set-up cut short goes on where it was.
$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh $(VENV)
	@touch $@

quickstart: setup ## fine-tune the bundled Japanese model on bundled data (no GPU, no network)
	@$(BIN)/kitaeru quickstart

test: setup ## run all tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: setup ## lint, types, floors, translations
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/catalogue.py check

format: setup ## let ruff lay out and mend the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

i18n: setup ## collect the texts from the code and compile the Japanese catalogue
	$(BIN)/python scripts/catalogue.py update

docs: setup ## the guides as a site, both languages, into build/docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	for language in en ja; do \
	  KITAERU_DOCS_LANGUAGE=$$language $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env \
	    --conf-dir docs/guide docs/guide/$$language build/docs/$$language; \
	done
	cp docs/guide/index.html build/docs/
	@echo "build/docs/index.html"

build: setup ## wheel and sdist into dist/
	$(BIN)/python -m build

clean: ## remove what the tools left behind (runs/ and .venv stay)
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV)
