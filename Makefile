PYTHON ?= python3
BIN := .venv/bin
HOME_DIR ?= .headrace

.DEFAULT_GOAL := help
.PHONY: help setup demo assistant test lint test-unit test-trainer test-gpu test-local test-cluster mutants crds lock cluster-build cluster-up cluster-down clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: ## Create .venv with the pinned dependencies
	@sh scripts/setup.sh $(PYTHON)

demo: setup ## Train, evaluate, export and serve a small model from the text on this machine
	@sh scripts/demo.sh $(HOME_DIR)

assistant: setup ## Train a model to chat and to answer as preferred, evaluate and serve it, all on this machine
	@sh scripts/assistant.sh $(HOME_DIR)

test: setup ## Run every tier below, including the cluster
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

test-gpu: setup ## GPU kernels, precisions, resume and checkpoints (needs a GPU)
	$(BIN)/pytest tests/gpu

test-local: setup ## Whole runs with `headrace run`, with fault injection: minutes
	$(BIN)/pytest tests/local

test-cluster: setup cluster-up ## Chart, operator, runs and recovery on a real cluster (root, or HEADRACE_TEST_KUBECONFIG)
	$(BIN)/pytest tests/charts tests/operator/test_real_*.py tests/cluster

mutants: setup ## Mutation testing: mutmut over the pure modules, plus handwritten mutants (about half an hour)
	$(BIN)/python tests/mutants

crds: setup ## Generate manifests/crd from the API classes
	$(BIN)/python -m headrace_api.crd

lock: setup ## Pin dependencies again; ARGS=--upgrade for newer versions
	sh scripts/lock.sh $(ARGS)

cluster-build: setup ## Build the test cluster's programs from Go modules, and the operator image (root)
	$(BIN)/python tests/cluster build

cluster-up: setup ## Start a real two-node cluster on this machine (root)
	$(BIN)/python tests/cluster up

cluster-down: setup ## Stop it and remove every trace
	$(BIN)/python tests/cluster down

clean: ## Remove everything the targets above created, except the test cluster
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache $(HOME_DIR)
