# Every target sets up what it needs: a virtual environment in .venv, once, with the exact versions
# of constraints.txt. Arguments go through ARGS: make demo ARGS="--engine executorch".

PYTHON ?= $(shell command -v python3.11 || echo python3)
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test soak lint protos results clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## Four devices learn together on this machine; report in demo/report.html
	$(BIN)/comigs demo $(ARGS)

PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal
test: $(STAMP) ## All tests
	$(PYTEST) $(ARGS)

soak: $(STAMP) ## All tests, with ten times as many kills and the like
	COMIGS_SOAK=1 $(PYTEST) -rP $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

protos: $(STAMP) ## Generate the Python of protos/*.proto again
	$(BIN)/python -m protos

BENCH := $(BIN)/comigs bench
KEPT := --cache build/bench --format json
ONNX := onnxruntime,onnxruntime:int8
PTE := executorch,executorch:int8
DECODED := onnxruntime:int8,onnxruntime:int4,executorch:int8,executorch:int4
# What was measured before stays until it is measured anew.
into = > benchmarks/results/$(1).json.new && mv benchmarks/results/$(1).json.new benchmarks/results/$(1).json
results: $(STAMP) ## Measure again, for an hour and more on an idle machine, and write benchmarks/RESULTS.md
	$(BENCH) train --engines $(ONNX) $(KEPT) $(call into,train-1x128)
	$(BENCH) train --engines $(PTE) $(KEPT) $(call into,train-1x128-executorch)
	$(BENCH) train --batch 4 --engines $(ONNX) $(KEPT) $(call into,train-4x128)
	$(BENCH) decode --engines $(DECODED) --peers $(KEPT) $(call into,decode)
	$(BENCH) tier $(KEPT) $(call into,tier)
	$(BENCH) profile $(KEPT) $(call into,profile)
	$(BENCH) coordinator --peers --peer-devices 100 --format json $(call into,coordinator)
	$(BIN)/python -m benchmarks.results

clean: ## Remove everything that the other targets made
	rm -rf .venv demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "comigs needs Python 3.11 or newer, which $(PYTHON) is not; install it," \
	    "or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv .venv || { rm -rf .venv; exit 1; }
	@echo "Installing into .venv; the first time this takes some minutes."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
