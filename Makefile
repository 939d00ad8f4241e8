PYTHON ?= python3
BIN := .venv/bin
HOME_DIR ?= .headrace

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint test-unit test-trainer test-gpu test-local test-cluster mutants crds lock cluster-build cluster-up cluster-down clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: ## Make .venv with everything that is pinned
	@sh scripts/setup.sh $(PYTHON)

demo: setup ## Train, evaluate, export and serve a small model on this machine, from the text that is on it
	@sh scripts/demo.sh $(HOME_DIR)

test: setup ## Every tier below, the cluster included
	@sh scripts/test.sh

lint: setup ## Style, types, import contracts, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p headrace_api -p headrace_operator -p headrace_cli
	$(BIN)/lint-imports
	$(BIN)/python -m headrace_api.crd --check

test-unit: setup ## Pure functions and tables of cases: seconds
	$(BIN)/pytest tests/api tests/plan tests/cli tests/repo tests/operator --ignore-glob='tests/operator/test_real_*'

test-trainer: setup ## Megatron-core on CPU with up to 4 ranks, data stages, S3, serving: minutes
	$(BIN)/pytest tests/trainer

test-gpu: setup ## On a machine with a GPU: its kernels, precisions, resumption and checkpoints
	$(BIN)/pytest tests/gpu

test-local: setup ## Whole runs with `headrace run`, faults injected: minutes
	$(BIN)/pytest tests/local

test-cluster: setup cluster-up ## A real cluster: chart, operator, runs, recovery (root, or HEADRACE_TEST_KUBECONFIG)
	$(BIN)/pytest tests/charts tests/operator/test_real_*.py tests/cluster

mutants: setup ## Whether the tests notice mistakes: mutmut over the pure rooms, and some written by hand (about half an hour)
	$(BIN)/python tests/mutants

crds: setup ## Generate manifests/crd from the classes
	$(BIN)/python -m headrace_api.crd

lock: setup ## Pin dependencies again; ARGS=--upgrade for newer ones
	sh scripts/lock.sh $(ARGS)

cluster-build: setup ## Build the test cluster's programs from Go modules, and the operator's image (root)
	$(BIN)/python tests/cluster build

cluster-up: setup ## Bring up a real cluster of two nodes on this machine (root)
	$(BIN)/python tests/cluster up

cluster-down: setup ## Take it down and leave nothing behind
	$(BIN)/python tests/cluster down

clean: ## Remove what the targets above made, but for the test cluster
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache $(HOME_DIR)
