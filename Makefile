# make quickstart   install, prepare, train a small model by RLVR on INT8 rollouts, write the report (about ten minutes on two cores)
# make ablation     every correction, INT8 and MXFP4 rollouts, 3 seeds, one page (80 to 100 minutes on two cores)
# make test         unit and end-to-end tests;  make check: lint, types, layers, unit tests
# make matrix       train every architecture of the README's table for two iterations, unquantized and in INT8

SHELL := /bin/bash
# Each process that compiles a module writes its bytecode, so that the next one need not.
export PYTHONDONTWRITEBYTECODE :=
QURL := .venv/bin/qurl
PYTHON := .venv/bin/python

.PHONY: help setup quickstart ablation test unit e2e matrix lint check lock bench clean

help:
	@grep '^# make' Makefile | cut -c3-

setup:
	@scripts/setup.sh

quickstart: setup
	$(QURL) doctor
	$(QURL) prepare quickstart
	$(QURL) train recipe=quickstart
	$(QURL) report runs/quickstart

ablation: setup
	$(QURL) prepare ablation
	$(QURL) ablation recipe=ablation --jobs 2

test: unit e2e

unit: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n auto --dist loadfile tests/unit tests/contract

e2e: setup
	RAY_worker_niceness=0 $(PYTHON) -m pytest -q -n 2 --dist loadfile --durations=10 tests/e2e tests/cluster

matrix: setup
	RAY_worker_niceness=0 $(PYTHON) -m pytest -q -n 2 -m matrix tests/e2e

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy

check: lint unit

lock: setup
	scripts/lock.sh

bench: setup
	$(QURL) bench rollout

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
