# `make demo` and `make test` set everything up by themselves in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(wildcard csrc/*.cpp csrc/*.h) setup.py pyproject.toml

.PHONY: demo test lint format bench clean

demo: $(VENV)/.demo
	$(BIN)/zo-kernels demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

bench: $(VENV)/.demo $(VENV)/.test
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf build $(VENV) zo_kernels/_C*.so

$(VENV)/.torch:
	$(PYTHON) .ci/make_venv.py $(VENV)
	touch $@

$(VENV)/.test $(VENV)/.demo: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet 'ruff>=0.9' 'clang-format>=19'
	touch $@
