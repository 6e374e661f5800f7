# `make demo` shows the main job, `make test` proves it; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test oracle pretrained peers chaos fuzz bench soak forgetting gate lint format clean

# TORCH=cpu takes a torch without CUDA, TORCH=cu128 one for that CUDA; what was asked for once is kept. Otherwise it is the
# package index's own, on Linux with CUDA.
HAS_TORCH := $(shell cat .venv/.installed 2>/dev/null)
TORCH ?= $(HAS_TORCH)
TORCH_INDEX ?= https://download.pytorch.org/whl/$(TORCH)
ifneq ($(TORCH),$(HAS_TORCH))
.PHONY: .venv/.installed
endif
# A comma would end an argument of $(if).
ifeq ($(TORCH),cpu)
LOADED := About 370 MB are loaded from the package index, 190 of them a torch without CUDA.
else
LOADED := On Linux about 2.9 GB are loaded, nearly all of it torch with CUDA; TORCH=cpu loads 370 MB in all.
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

setup: .venv/.installed
	@echo "Dropforge is installed in .venv: $(BIN)/dropforge. Next: make demo"

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Dropforge needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Installing Dropforge and what trains and tests it into .venv; nothing outside this folder changes."
	@echo "$(LOADED)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH),$(PIP) --upgrade --no-deps --index-url $(TORCH_INDEX) torch)
	$(PIP) -e '.[train,test]'
	@echo '$(TORCH)' > $@

demo: .venv/.installed
	$(BIN)/dropforge demo

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

# Ids and labels against TRL's own, and every chat template that it ships against the rule; `make test` has golden values.
oracle: peers
	$(BIN)/python -m pytest -m '' tests/integration/test_trainer_oracle.py tests/oracle

# A real model of 135M parameters, out of a package of 90 MB: after a short run its answers stop by themselves.
pretrained: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf
	$(BIN)/python -m pytest -m pretrained tests/pretrained

peers: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'

# What takes too long for every day: thousands of random kills, with the quick trainer and with the real one.
chaos: .venv/.installed
	$(BIN)/python -m pytest -s tests/chaos --kills 3000
	$(BIN)/python -m pytest -s tests/chaos --kills 300 --real-trainer
	$(BIN)/python -m pytest -m chaos

# Odd sidecars, rows, names, settings, run directories, lineages and seals, guided by coverage, for FUZZ_SECONDS.
FUZZ_SECONDS ?= 600
fuzz: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

# Each script prints a table, with peers measured in the same run.
bench: peers
	@set -e; for script in $(filter-out benchmarks/soak.py benchmarks/forgetting.py benchmarks/gate.py,$(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py); done

# A week of jobs in fast motion, and an old root: half an hour.
soak: .venv/.installed
	$(BIN)/python -m benchmarks.soak

# How often the gate stops what is harmless, and misses what is not: hours, and it goes on where it was stopped.
gate: .venv/.installed
	$(BIN)/python -m benchmarks.gate --work build/gate

# What earlier datasets lose by later ones, with a real model: hours, and it goes on where it was stopped.
forgetting: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf
	$(BIN)/python -m benchmarks.forgetting --work build/forgetting

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis
