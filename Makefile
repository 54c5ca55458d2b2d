# Two commands: `make quickstart` and `make test`. Both make their own virtual environment first.
PYTHON ?= python3
# Installed before the project, so that its dependencies do not pull another build of torch. On a GPU machine set it to
# the build for your CUDA, for instance TORCH="torch".
TORCH ?= torch==2.13.0
VENV ?= .venv
CONFIG ?= recipes/quickstart.yaml
ARGS ?=

.PHONY: install quickstart test lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: install
	HF_HUB_OFFLINE=1 $(VENV)/bin/trl-prime train --config $(CONFIG) $(ARGS)

test: install
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest $(ARGS)

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) runs
