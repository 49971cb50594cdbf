# `make demo` trains on real data; `make test` passes the tests. Both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all prove accuracy mutate lint docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m xentjax demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Before a release: the cases and the long proofs that `make test` leaves out.
prove: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m prove

# The suite on every interpreter that is here, each with the newest JAX that it can have.
INTERPRETERS ?= 3.11 3.12 3.13
test-all:
	for version in $(INTERPRETERS); do \
	  if python$$version --version 2>/dev/null; then \
	    $(MAKE) test PYTHON=python$$version VENV=.venv-$$version || exit 1; \
	  else \
	    echo "There is no python$$version here."; \
	  fi; \
	done

# Measures how exact losses are, beside other libraries, PyTorch too if it is installed.
accuracy: $(VENV)/.test
	$(BIN)/python tests/prove/accuracy.py docs/accuracy.md

# Puts 150 faults into the mathematics, and looks whether tests fail for each.
mutate: $(VENV)/.test
	$(BIN)/python tests/prove/mutation.py 150

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The pages lie in docs/_build/html and are read without a network. Warnings are errors.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html

clean:
	rm -rf $(VENV) .venv-* docs/_build docs/api docs/notebooks docs/_fonts

$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group lint
	touch $@
