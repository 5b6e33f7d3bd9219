# `make demo` and `make test` need nothing but Python 3.11 or newer and a package index.
PYTHON ?= python3
VENV ?= .venv
LLMC = $(VENV)/bin/llmc
DEMO = runs/demo
STEPS = 120

.PHONY: demo test test-witness test-cuda soak lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-witness: $(VENV)/installed-dev
	$(VENV)/bin/pip install --quiet --editable '.[dev,witness]'
	touch $@

# The main job on the bundled text: prepare, train, sample, decode.
demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(LLMC) prepro tinyshakespeare --source bundled --out $(DEMO)/data
	$(LLMC) train --data '$(DEMO)/data/*_train.bin' --val-data '$(DEMO)/data/*_val.bin' --out $(DEMO) \
	  -b 4 -t 128 -x $(STEPS) -l 1e-3 -u 10 -q 0.1 -v 40 -m 5 -s 0
	$(LLMC) sample $(DEMO)/model_00000$(STEPS).bin 'ROMEO:' --max-tokens 64
	$(LLMC) sample $(DEMO)/model_00000$(STEPS).bin --ids --quiet --max-tokens 16 | $(LLMC) decode

test: $(VENV)/installed-dev
	$(VENV)/bin/pytest

# Against live PyTorch and transformers (gigabytes on many machines).
test-witness: $(VENV)/installed-witness
	$(VENV)/bin/pytest -m witness

# The CUDA backend against CuPy and NVIDIA's compilers, without a device. They are kept out of the environment, so that
# all other tests show that nothing else needs them.
$(VENV)/installed-cuda: $(VENV)/installed-dev
	$(VENV)/bin/pip install --quiet --upgrade --no-deps --target $(VENV)/cuda cupy-cuda12x==14.2.0 cuda-pathfinder \
	  nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-nvrtc-cu12==12.9.86
	touch $@

test-cuda: $(VENV)/installed-cuda
	PYTHONPATH=$(VENV)/cuda $(VENV)/bin/pytest -m 'cupy or nvrtc'

# What takes minutes: crashes at random moments, many times.
soak: $(VENV)/installed-dev
	$(VENV)/bin/pytest -m soak

# mypy sees the package as it is installed, not as it lies here: so it runs elsewhere.
lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m venv $(VENV)/typed
	$(VENV)/typed/bin/pip install --quiet '.[dev]'
	cd $(VENV)/typed && bin/mypy --config-file $(CURDIR)/pyproject.toml

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
