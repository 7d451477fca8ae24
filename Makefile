# Every target sets itself up: Python 3.11 or newer is all that must be there.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
# The newest interpreter that will do; PYTHON_BASE=/path/to/python chooses another one.
PYTHON_BASE ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
IMAGE_BUILDER ?= $(shell for b in buildah podman docker; do command -v $$b && break; done)
BASE_IMAGE ?= docker.io/library/python:3.11-slim
IMAGE ?= darkroom/training:dev
ARGS ?=

.PHONY: help setup demo test unit integration gpu lint format golden bench images clean

help: ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 22

setup: $(READY) ## the virtual environment, with everything in it

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON_BASE)" || { echo "make: found no Python 3.11 or newer; install one, or name it: make PYTHON_BASE=/path/to/python" >&2; exit 2; }
	@test -x $(PYTHON) || $(PYTHON_BASE) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: $(PYTHON_BASE) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@set -e; uv=$$(command -v $(CURDIR)/$(VENV)/bin/uv || command -v uv || true); \
	if [ -z "$$uv" ]; then $(PYTHON) -m pip install --quiet --disable-pip-version-check uv; uv=$(VENV)/bin/uv; fi; \
	"$$uv" pip install --python $(PYTHON) --constraint constraints.txt --editable '.[dev,demo]'
	@touch $@

demo: $(READY) ## trains a small model from nothing to pictures, and reports
	$(VENV)/bin/darkroom run demo $(ARGS)

test: unit integration gpu ## every test that this machine can run

unit: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/unit -n 2 $(ARGS)

integration: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/integration -n 2 --dist loadgroup $(ARGS)

gpu: $(READY) ## the tests that need a GPU; without one they are skipped
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/gpu $(ARGS)

lint: $(READY) ## style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## mends what the linter can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

golden: $(READY) ## writes the golden files anew; review the diff
	DARKROOM_REFRESH_GOLDEN=1 $(PYTHON) -m pytest tests/unit/test_compile.py -q

bench: $(READY) ## measurements of this machine, into benchmarks/results
	for name in training_steps data checkpoint vae mmdit alignment few_step; do \
	  $(PYTHON) -m benchmarks.$$name | tee benchmarks/results/$$(date -I)-$$(echo $$name | tr _ -).jsonl; test $${PIPESTATUS[0]} = 0 || exit 1; done

images: ## the training image; BASE_IMAGE, IMAGE and IMAGE_BUILDER choose
	@test -n "$(IMAGE_BUILDER)" || { echo "make: found no buildah, podman or docker to build images with; install one of them" >&2; exit 2; }
	$(IMAGE_BUILDER) build --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg GIT_SHA=$$(git rev-parse HEAD) --file images/training.Dockerfile --tag $(IMAGE) .

clean: ## removes the virtual environment and caches; workspaces stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
