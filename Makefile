# Everything a newcomer needs: `make demo`, `make test`. CONTRIBUTING.md has the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PINS := requirements-dev.txt

.PHONY: build
build:  ## editable install into an existing environment that already has every dependency
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
