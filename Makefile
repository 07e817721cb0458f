# setup, demo, check, test, docs: each works from a bare clone and makes what it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo check test docs clean

PYTHON ?= $(shell for python in python3.11 python3; do \
  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: .venv/dev.stamp ## make .venv and install the package with the developers' tools

demo: .venv/dev.stamp ## edit an example picture with the mini model
	@mkdir -p out
	$(BIN)/step1x edit examples/coffee.jpg "make it black and white" --seed 0 --output out/coffee.png
	@echo "edited picture: out/coffee.png"

check: .venv/dev.stamp ## lint, format, types, import contract, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/typos

test: .venv/dev.stamp ## run every test, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

docs: .venv/docs.stamp ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove what the other targets made
	rm -rf .venv out site

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: put it on PATH, or say make PYTHON=..."; exit 2; }
	"$(PYTHON)" -m venv .venv

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[dev]'
	@touch $@

.venv/docs.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[docs]'
	@touch $@
