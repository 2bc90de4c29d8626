# `make demo` and `make test` set up what they need in .venv; nothing but Python, a compiler and make
# has to be there before.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-isa check wheel sanitize format bench clean

demo: $(VENV)/.installed
	$(BIN)/hanok generate "Once upon a time" --echo --temperature 0.5 --top-p 0.9 --seed 26
	$(BIN)/hanok bench --budget 45

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2

# What depends on the processor, once more as on older ones: torch's libraries are held to the same.
ISA_TESTS := tests/kernels tests/quant tests/attention tests/models/test_linear.py tests/engine tests/bench
AVX2 := HANOK_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
PORTABLE := HANOK_ISA=portable ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 \
	MKL_ENABLE_INSTRUCTIONS=SSE4_2
test-isa: $(VENV)/.installed-dev
	$(AVX2) $(BIN)/python -m pytest --numprocesses 2 $(ISA_TESTS)
	$(PORTABLE) $(BIN)/python -m pytest --numprocesses 2 $(ISA_TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The wheel, installed alone into a folder: it has its kernels and its model, and generates.
wheel: $(VENV)/.installed-dev
	rm -rf build/wheel
	$(PIP) --upgrade --no-deps --target build/wheel --no-build-isolation .
	cd build/wheel && ../../$(BIN)/python -I ../../scripts/try_wheel.py

# The tests of the compiled kernels, with every access and every overflow checked; needs g++.
sanitize: $(VENV)/.installed-dev
	$(BIN)/python scripts/sanitize.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/generate.py

clean:
	rm -rf $(VENV) build dist tests/server/node/node_modules

# torch comes first and alone: whatever depends on it then finds it there.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard src/hanok/kernels/cpp/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps instructor # it asks for an older jiter than openai does, and works with this one
	command -v npm > /dev/null && npm ci --silent --prefix tests/server/node || echo "npm's clients are not tested"
	touch $@
