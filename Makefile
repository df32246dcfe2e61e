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

.PHONY: help install train test verified verified-pipelines verified-fssdp balance-study check-python

help:
	@echo "make train    install if needed, then train the quickstart   (ARGS=... go to moetrain train)"
	@echo "make test     install if needed, then ruff, pyright, pytest  (ARGS=... go to pytest)"
	@echo "make verified verify every layout of 1, 2, 4 and 8 ranks and write docs/verified.md: 40 minutes on two cores"
	@echo "make verified-pipelines, make verified-fssdp   the same of pipelines, into the same page; of experts that travel, into docs/verified-fssdp.md"
	@echo "make balance-study  train 21 small models, seven ways of balancing, and write docs/balance-study.md: two hours"
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
	  --case 'dropless@1,2,4,8 pp=1:' \
	  --case 'capacity@1,2,4,8 pp=1: dispatcher=capacity model.moe.dispatcher.factor=8' \
	  --case 'capacity that drops@8 pp=1/8: dispatcher=capacity model.moe.dispatcher.factor=1' \
	  --case 'float64@4,8 pp=1/8: train.dtype=float64' \
	  --case 'bfloat16@2,4,8 pp=1/6: train.dtype=bfloat16' \
	  --case 'ulysses@4,8 pp=1/8: context.method=ulysses' \
	  --case 'tied, QK-norm per head@8 pp=1/8: model.tie_embeddings=true model.qk_norm=head' \
	  --case 'one key head@12 pp=1/8: model.num_heads=12 model.num_kv_heads=1 model.moe.num_experts=12 train.batch=12' \
	  --case 'sixteen@16 pp=1/8: train.batch=16' \
	  --write docs/verified.md $(ARGS)
	@$(MAKE) --no-print-directory verified-pipelines

# The second half of the page: every schedule over every layout with pp > 1, and samples of what can be combined.
verified-pipelines: install
	@$(PY) -m moetrain verify experiment=verified train.batch=16 --all-layouts 8 --timeout 300 \
	  --case '1f1b@2,4,8 pp=2: pipeline.schedule=1f1b model.num_layers=4' \
	  --case '1f1b, 4 deep@4,8 pp=4: pipeline.schedule=1f1b model.num_layers=8' \
	  --case '1f1b, 8 deep@8 pp=8: pipeline.schedule=1f1b model.num_layers=16' \
	  --case 'interleaved@2,4,8 pp=2: pipeline.schedule=interleaved model.num_layers=4' \
	  --case 'interleaved, 4 deep@4,8 pp=4: pipeline.schedule=interleaved model.num_layers=8' \
	  --case 'interleaved, 8 deep@8 pp=8: pipeline.schedule=interleaved model.num_layers=16' \
	  --case 'zbv@2,4,8 pp=2: pipeline.schedule=zbv model.num_layers=4' \
	  --case 'zbv, 4 deep@4,8 pp=4: pipeline.schedule=zbv model.num_layers=8' \
	  --case 'zbv, 8 deep@8 pp=8: pipeline.schedule=zbv model.num_layers=16' \
	  --case 'dualpipev@2,4,8 pp=2: pipeline.schedule=dualpipev model.num_layers=4' \
	  --case 'dualpipev, 4 deep@4,8 pp=4: pipeline.schedule=dualpipev model.num_layers=8' \
	  --case 'dualpipev, 8 deep@8 pp=8: pipeline.schedule=dualpipev model.num_layers=16' \
	  --case '1f1b, five dimensions@16 pp=2 dp=2 cp=2 tp=2 ep=2,4,8 etp=1,2: pipeline.schedule=1f1b model.num_layers=4' \
	  --case 'interleaved, five dimensions@16 pp=2 dp=2 cp=2 tp=2 ep=2,4,8 etp=1,2: pipeline.schedule=interleaved model.num_layers=4' \
	  --case 'zbv, five dimensions@16 pp=2 dp=2 cp=2 tp=2 ep=2,4,8 etp=1,2: pipeline.schedule=zbv model.num_layers=4' \
	  --case 'dualpipev, five dimensions@16 pp=2 dp=2 cp=2 tp=2 ep=2,4,8 etp=1,2: pipeline.schedule=dualpipev model.num_layers=4' \
	  --case 'interleaved zero bubble@4,8 pp=2/4: pipeline.schedule=interleaved_zero_bubble model.num_layers=4' \
	  --case 'three stages a rank@4,8 pp=2/3: pipeline.schedule=interleaved pipeline.chunks=3 model.num_layers=7' \
	  --case 'recompute full@4,8 pp=2/4: recompute.mode=full pipeline.schedule=zbv model.num_layers=4' \
	  --case 'recompute selective@4,8 pp=2/4: recompute.mode=selective recompute.parts=[norm,attention,experts_activation] pipeline.schedule=dualpipev model.num_layers=4' \
	  --case 'recompute moe, chunked loss@4,8 pp=2/4: recompute.mode=selective recompute.parts=[moe] recompute.loss_rows=16 pipeline.schedule=interleaved model.num_layers=4' \
	  --case 'accumulation 1@8 pp=2 dp=1/4: train.micro_batch=16 pipeline.schedule=zbv model.num_layers=4' \
	  --case 'accumulation 4@8 pp=2 dp=1/4: train.micro_batch=4 pipeline.schedule=dualpipev model.num_layers=4' \
	  --case 'level 2@4,8 pp=2/4: sharding.dense=2 sharding.experts=2 pipeline.schedule=zbv model.num_layers=4' \
	  --case 'level 2 and 3, sharded gradients@4,8 pp=2/4: sharding.dense=2 sharding.experts=3 sharding.accumulate=sharded pipeline.schedule=dualpipev model.num_layers=4' \
	  --case 'HSDP@8 pp=2 dp=2,4 replicate=2/6: pipeline.schedule=zbv model.num_layers=4' \
	  --case 'capacity that drops@8 pp=2/4: dispatcher=capacity model.moe.dispatcher.factor=1 pipeline.schedule=zbv model.num_layers=4' \
	  --case 'tied@4,8 pp=2/3: model.tie_embeddings=true pipeline.schedule=interleaved model.num_layers=4' \
	  --case 'tied, V@4,8 pp=2/3: model.tie_embeddings=true pipeline.schedule=zbv model.num_layers=4' \
	  --case 'muon@4,8 pp=2/4: optim=muon pipeline.schedule=zbv model.num_layers=4' \
	  --case 'float64@4,8 pp=2/4: train.dtype=float64 pipeline.schedule=dualpipev model.num_layers=4' \
	  --case 'bfloat16@4,8 pp=2/3: train.dtype=bfloat16 pipeline.schedule=zbv model.num_layers=4' \
	  --write docs/verified.md --append $(ARGS)

# Experts that travel, over samples of the layouts of 2 to 16 ranks, with and without a pipeline.
verified-fssdp: install
	@$(PY) -m moetrain verify experiment=verified train.batch=16 placement=fssdp --all-layouts 8 --timeout 300 \
	  --case 'fssdp@8 pp=1/24:' \
	  --case 'fssdp, few ranks@2,4 pp=1/6:' \
	  --case 'shadow@8 pp=1/6: placement=shadow' \
	  --case 'replicate_all@8 pp=1/8: placement=replicate_all' \
	  --case 'float64@8 pp=1/8: train.dtype=float64' \
	  --case 'bfloat16@8 pp=1/6: train.dtype=bfloat16' \
	  --case 'level 2@8 pp=1/6: sharding.experts=2' \
	  --case 'gradients reduced each time@8 pp=1 dp=1,2/6: sharding.accumulate=sharded train.micro_batch=4' \
	  --case 'recompute full@8 pp=1/5: recompute.mode=full' \
	  --case 'recompute moe@8 pp=1/5: recompute.mode=selective recompute.parts=[norm,moe]' \
	  --case 'capacity that drops@8 pp=1/6: dispatcher=capacity model.moe.dispatcher.factor=1' \
	  --case 'all-gather@8 pp=1/5: dispatcher=allgather' \
	  --case 'Muon@8 pp=1/5: optim=muon' \
	  --case 'calibrated@8 pp=1/6: model.moe.placement.calibrate=true' \
	  --case '1f1b@4,8 pp=2/5: pipeline.schedule=1f1b model.num_layers=4' \
	  --case 'interleaved@4,8 pp=2/5: pipeline.schedule=interleaved model.num_layers=4' \
	  --case 'zbv@4,8 pp=2/5: pipeline.schedule=zbv model.num_layers=4' \
	  --case 'dualpipev@4,8 pp=2/5: pipeline.schedule=dualpipev model.num_layers=4' \
	  --case 'zbv, recompute, level 2@8 pp=2/4: pipeline.schedule=zbv model.num_layers=4 recompute.mode=full sharding.experts=2' \
	  --case 'dualpipev, calibrated@8 pp=2/4: pipeline.schedule=dualpipev model.num_layers=4 model.moe.placement.calibrate=true' \
	  --case 'sixteen@16 pp=1/6:' \
	  --case '1f1b, five dimensions@16 pp=2 dp=2 cp=2 tp=2 ep=2,4,8 etp=1,2: pipeline.schedule=1f1b model.num_layers=4' \
	  --case 'dualpipev, five dimensions@16 pp=2 dp=2 cp=2 tp=2 ep=2,4,8 etp=1,2: pipeline.schedule=dualpipev model.num_layers=4' \
	  --write docs/verified-fssdp.md $(ARGS)

# Seven ways of balancing, three seeds each; a run that is done is not run again, so that the same command continues.
balance-study: check-python
	@$(INSTALL) --extras "report,$(EXTRAS)"
	@$(PY) -m moetrain train -m sweep=balance_study $(ARGS)
	@$(PY) benchmarks/balance_study.py runs/balance-study --write docs/balance-study.md
