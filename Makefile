# Each target sets up .venv by itself. PYTHON chooses the interpreter that it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow fuzz lint docs bench clean

demo: .venv/demo-ready
	$(BIN)/lopt demo

# A process for each core, with one thread each; a file's tests stay together, as they share what is slow to set up.
# Those that start processes of torchrun, and kill some, have the machine for themselves.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --ignore tests/meta/test_torchrun.py
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/meta/test_torchrun.py

test-slow: .venv/examples-ready
	$(BIN)/pytest -m slow

# Damaged inputs for some minutes, other ones each time; FUZZ_SECONDS and FUZZ_SEED choose how long and which.
fuzz: .venv/ready
	FUZZ_SECONDS=$${FUZZ_SECONDS:-300} FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} $(BIN)/pytest -m slow tests/test_fuzz.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/ready
	$(BIN)/python -m bench meta

# pip shows what it downloads: torch is most of it, 0.2 to 3 GB by platform.
.venv/demo-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[train]'
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/examples-ready: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,examples,notebooks]'
	touch $@

.venv/docs-ready: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs,notebooks]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
