# make setup | demo | test | check        see README.md
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# The user's own pairs for `make demo`: a folder or a table. Empty: rendered glyphs, which need no download.
DATA ?=
# With DATA: more words for `mmscale shards write`, such as columns.image=file.
WORDS ?=
# With DATA: the field of the pairs to train a classifier on. Empty: none is trained.
LABEL ?=
# An extra package index for pip, such as one that offers CPU-only builds of torch.
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-cluster check format clean

help:
	@echo "make setup     create .venv and install everything into it"
	@echo "make demo      raw pairs -> shards -> pretraining -> fine-tuning -> evaluation; DATA=path takes your own pairs (a folder, a table)"
	@echo "make test      the tests (test-slow: those of minutes; test-cluster: those that need root)"
	@echo "make check     ruff, mypy, the layer test"

setup: $(STAMP)

# pip runs again only when what it was told has changed.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m launcher.demo $(if $(DATA),--data '$(DATA)') $(if $(LABEL),--label '$(LABEL)') $(WORDS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu and not cluster'

test-cluster: $(STAMP)
	$(BIN)/python -m pytest -m 'cluster and not gpu'

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
