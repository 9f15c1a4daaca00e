# make demo     the main job: pretrain a small CLIP, extract a cache, train heads, show the results
# make adapt    the next step: adapt a backbone where frozen features fall short (LoRA, prompts)
# make test     lint, types, import contracts, tests
# make install  the set-up alone, into .venv
# make bench    every benchmark; results in benchmarks/results
# make clean    remove what the demo wrote (caches, runs, drawn images); keeps .venv

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that wait for each other must not spin: two cores are often shared with something else.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help demo adapt test test-features test-heads install lint format bench clean

help:
	@sed -n '1,7s/^# //p' Makefile

install: $(STAMP)

# A failed install leaves no stamp, so the next call continues it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 3 minutes and 6 GB the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m flows.demo

adapt: $(STAMP)
	@$(BIN)/python -m flows.adapt

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Checks and tests side by side: each test session keeps about one core busy.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j2 lint test-features test-heads

test-features: $(STAMP)
	$(BIN)/python -m pytest tests/featcache tests/finetune

test-heads: $(STAMP)
	$(BIN)/python -m pytest --ignore tests/featcache --ignore tests/finetune

bench: $(STAMP)
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/inaturalist.py
	$(BIN)/python benchmarks/webdataset.py
	$(BIN)/python benchmarks/stores.py --rows 100000
	$(BIN)/python benchmarks/blip.py
	$(BIN)/python benchmarks/mop.py
	$(BIN)/python benchmarks/ml_decoder.py
	$(BIN)/python benchmarks/head_speed.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/finetuning.py

clean:
	rm -rf .demo runs cache/garden* data/garden* build
