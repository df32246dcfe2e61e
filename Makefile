# moetrain: install and run. `make` lists the targets; docs/install.md explains the choices.
#
#   make train                     install into .venv (once), then train the quickstart
#   make train ARGS="train.steps=20"
#   make train TORCH=system        use the torch that is already here, download none
#   make train PYTHON=python3.12   choose the interpreter

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?=
TORCH ?=
EXTRAS ?=
PIP_ARGS ?=
ARGS ?=
export PIP_ARGS

PY := $(VENV)/bin/python
BOOT := $(or $(PYTHON),python3)
INSTALL = $(BOOT) launch/install.py --venv "$(VENV)" --python "$(PYTHON)" --torch "$(TORCH)"

.PHONY: help install train test verified check-python

help:
	@echo "make train    install if needed, then train the quickstart   (ARGS=... go to moetrain train)"
	@echo "make test     install if needed, then ruff, pyright, pytest  (ARGS=... go to pytest)"
	@echo "make verified verify every layout of 1, 2, 4 and 8 ranks and write docs/verified.md: 40 minutes on two cores"
	@echo "make install  only install                                   (EXTRAS=gpu,wandb adds extras)"
	@echo "Choices: PYTHON=python3.12  TORCH=auto|system|cpu|cuda  VENV=.venv  PIP_ARGS='...'"

check-python:
	@$(BOOT) -c '' >/dev/null 2>&1 || { echo "moetrain: '$(BOOT)' does not run: install Python 3.11 or newer" \
	  "(apt-get install python3 python3-venv), or name one that is here with PYTHON=..." >&2; exit 2; }

install: check-python
	@$(INSTALL) --extras "$(EXTRAS)"

train: install
	@$(PY) -m moetrain train experiment=quickstart $(ARGS)

# Every check runs even if an earlier one failed; pytest is last, so that its summary is what one sees.
test: check-python
	@$(INSTALL) --extras "dev,$(EXTRAS)"
	@failed=""; \
	run() { echo "== $$*"; $(PY) -m "$$@" || failed="$$failed [$$*]"; }; \
	run ruff check .; \
	run ruff format --check .; \
	run pyright --pythonpath $(PY); \
	run pytest -v -ra -n auto --maxprocesses 4 --dist loadfile $(ARGS); \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

# Sampled beside the whole sets: float64, context parallelism by heads, 12 and 16 ranks, bf16.
verified: install
	@$(PY) -m moetrain verify experiment=verified --all-layouts 1,2,4,8 \
	  --case 'dropless:' \
	  --case 'capacity: dispatcher=capacity model.moe.dispatcher.factor=8' \
	  --case 'capacity that drops@8/8: dispatcher=capacity model.moe.dispatcher.factor=1' \
	  --case 'float64@4,8/8: train.dtype=float64' \
	  --case 'bfloat16@2,4,8/6: train.dtype=bfloat16' \
	  --case 'ulysses@4,8/8: context.method=ulysses' \
	  --case 'tied, QK-norm per head@8/8: model.tie_embeddings=true model.qk_norm=head' \
	  --case 'one key head@12/8: model.num_heads=12 model.num_kv_heads=1 model.moe.num_experts=12 train.batch=12' \
	  --case 'sixteen@16/8: train.batch=16' \
	  --write docs/verified.md $(ARGS)
