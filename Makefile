# The two commands that matter: `make quickstart` and `make test`. Both set everything up on their first run.
# Extra arguments go through ARGS: make quickstart ARGS="--seed 1", make test ARGS="-k chain".
SHELL := /bin/bash
.DEFAULT_GOAL := help
ARGS ?=

BIN := .venv/bin
RECIPE ?= recipes/ppo_flow_noise.py
# One process: the first GPU if there is one, else the CPU with one thread for torch (the simulators use the others).
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m 1 "^GPU ")
LAUNCH_CONFIG ?= recipes/accelerate/$(if $(GPU),one_gpu,cpu).yaml
ifeq ($(GPU),)
export OMP_NUM_THREADS ?= 1
endif

# Two test files at a time; whole files, so that what a file prepares is prepared once.
PARALLEL ?= -n 2 --dist loadfile
EVERYTHING := test,lint,docs,notebooks,libero,maniskill

.PHONY: help quickstart test lint format types docs setup benchmarks clean

help: ## print this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

quickstart: setup ## from demonstrations to a policy improved by RL, with Flow-Noise (about 10 minutes on two CPU cores)
	@$(BIN)/accelerate launch --quiet --config_file $(LAUNCH_CONFIG) $(RECIPE) $(ARGS)

test: benchmarks ## the test suite (without the tests marked slow or gpu)
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup ## rewrite files to the format, apply safe fixes
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: setup ## mypy on the package
	@$(BIN)/mypy pi_rl

docs: ## the documentation as a site, in site/
	@scripts/setup.sh test,lint,docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "open site/index.html"

setup: ## virtual environment, pinned packages, rendering libraries (done once)
	@scripts/setup.sh

benchmarks: ## the same with LIBERO and ManiSkill (their meshes and textures: pi-rl assets)
	@scripts/setup.sh $(EVERYTHING)

clean: ## remove caches and the virtual environment; keeps outputs/
	rm -rf .venv .python build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
