# `make demo` and `make test` need Python 3.11 or newer and a package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP = $(BIN)/python -m pip install --quiet
LLMC = $(BIN)/llmc
DEMO = runs/demo
STEPS = 120

.PHONY: demo test test-witness test-cuda test-gpu soak lint format docs clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/installed-witness: $(VENV)/installed-dev
	$(PIP) --editable '.[dev,witness]'
	touch $@

# The whole pipeline on the bundled text: prepare, train, sample, decode.
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(LLMC) prepro tinyshakespeare --source bundled --out $(DEMO)/data
	$(LLMC) train --data '$(DEMO)/data/*_train.bin' --val-data '$(DEMO)/data/*_val.bin' --out $(DEMO) \
	  -b 4 -t 128 -x $(STEPS) -l 1e-3 -u 10 -q 0.1 -v 40 -m 5 -s 0
	$(LLMC) sample $(DEMO)/model_00000$(STEPS).bin 'ROMEO:' --max-tokens 64
	$(LLMC) sample $(DEMO)/model_00000$(STEPS).bin --ids --quiet --max-tokens 16 | $(LLMC) decode

test: $(VENV)/installed-dev
	$(BIN)/pytest -n auto --maxprocesses 8

# Compare with PyTorch and transformers, which take gigabytes on many machines.
test-witness: $(VENV)/installed-witness
	$(BIN)/pytest -m witness

# Check the CUDA backend against CuPy and NVIDIA's compilers, without a GPU. They are installed outside the environment,
# which shows that no other test needs them.
$(VENV)/installed-cuda: $(VENV)/installed-dev
	$(PIP) --upgrade --no-deps --target $(VENV)/cuda cupy-cuda12x==14.2.0 cuda-pathfinder \
	  nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-nvrtc-cu12==12.9.86
	touch $@

test-cuda: $(VENV)/installed-cuda
	PYTHONPATH=$(VENV)/cuda $(BIN)/pytest -m 'cupy or nvrtc'

# Run the CUDA backend on an NVIDIA GPU; install the extra `cuda12` or `cuda13` into .venv first.
test-gpu: $(VENV)/installed-dev
	$(BIN)/pytest -m gpu

# Tests that take minutes: crashes at random moments, many times.
soak: $(VENV)/installed-dev
	$(BIN)/pytest -m soak

# mypy checks the installed package: it runs in an environment of its own, outside the repository's root.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTHON) -m venv $(VENV)/typed
	$(VENV)/typed/$(notdir $(BIN))/python -m pip install --quiet '.[dev]'
	cd $(VENV)/typed && $(notdir $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Regenerate the generated parts of docs/.
docs: $(VENV)/installed-dev
	$(BIN)/python fixtures/make_docs.py
	$(BIN)/python fixtures/make_architecture.py
	$(BIN)/python fixtures/make_cuda_estimates.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
