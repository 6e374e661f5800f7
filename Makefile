# `make demo` shows the main job, `make test` proves it; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test oracle pretrained peers chaos fuzz bench soak forgetting lint format clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Dropforge needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,test]'
	@touch $@

demo: setup
	$(BIN)/dropforge demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

# Ids and labels against TRL's own, and every chat template that it ships against the rule; `make test` has golden values.
oracle: peers
	$(BIN)/python -m pytest -m '' tests/integration/test_trainer_oracle.py tests/oracle

# A real model of 135M parameters, out of a package of 90 MB: after a short run its answers stop by themselves.
pretrained: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf
	$(BIN)/python -m pytest -m pretrained tests/pretrained

peers: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'

# What takes too long for every day: thousands of random kills, with the quick trainer and with the real one.
chaos: setup
	$(BIN)/python -m pytest -s tests/chaos --kills 3000
	$(BIN)/python -m pytest -s tests/chaos --kills 300 --real-trainer
	$(BIN)/python -m pytest -m chaos

# Odd sidecars, rows, names, settings, run directories, lineages and seals, guided by coverage, for FUZZ_SECONDS.
FUZZ_SECONDS ?= 600
fuzz: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

# Each script prints a table, with peers measured in the same run.
bench: peers
	@set -e; for script in $(filter-out benchmarks/soak.py benchmarks/forgetting.py,$(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py); done

# A week of jobs in fast motion, and an old root: half an hour.
soak: setup
	$(BIN)/python -m benchmarks.soak

# What earlier datasets lose by later ones, with a real model: hours, and it goes on where it was stopped.
forgetting: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf
	$(BIN)/python -m benchmarks.forgetting --work build/forgetting

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis
