# `make demo` needs Python 3.11 or newer and nothing else. constraints.txt is for 3.11.

# CMake writes Makefiles, and make says at length that it enters and leaves their folders.
MAKEFLAGS += --no-print-directory
VENV := .venv
# Python may keep what it compiles: pip does not compile (below), and the tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)

# The second variable is newer pip's name for the first where the build backend is concerned. Python compiles what it
# imports, a small part of what is installed.
INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(VENV)/bin/pip install --quiet --no-compile -c constraints.txt
# -rs: how many tests were skipped, and why. worksteal: neighbours, which share fixtures, run in one process.
PYTEST := $(VENV)/bin/pytest -n 2 --dist worksteal -rs
EMBED := build/embed
# what compiles C++ or CUDA
NATIVE := tests/cpp tests/plugins/native

.PHONY: help demo embed compiler test cpp cpp-packages cpp-build test-all lint docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
		| while IFS='|' read -r name text; do printf '  %-9s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.installed  ## install what is needed and run the demo
	$(VENV)/bin/qwenport demo

embed: compiler $(VENV)/.installed-embed  ## run the small checkpoint inside a C++ program
	rm -rf $(EMBED) && mkdir -p $(EMBED)
	$(VENV)/bin/qwenport export examples/tiny-qwen2.5 $(EMBED)/tiny.package
	$(VENV)/bin/qwenport build $(EMBED)/tiny.package $(EMBED)/tiny.engine --target onnxruntime
	$(VENV)/bin/qwenport cpp install $(EMBED)/usr
	$(VENV)/bin/cmake -S examples/cpp/minimal -B $(EMBED)/minimal "-DCMAKE_PREFIX_PATH=$(CURDIR)/$(EMBED)/usr"
	$(VENV)/bin/cmake --build $(EMBED)/minimal
	QWENPORT_ONNXRUNTIME=$$(ls $(VENV)/lib/python*/site-packages/onnxruntime/capi/libonnxruntime.so.*) \
		$(VENV)/bin/python examples/cpp/minimal/text.py \
		$(EMBED)/minimal/minimal $(EMBED)/tiny.engine "Once upon a time"

compiler:
	@printf '#include <filesystem>\n' | $${CXX:-c++} -std=c++17 -fsyntax-only -x c++ - 2>/dev/null || { \
		echo 'error: a C++17 compiler is needed; on Debian and Ubuntu: apt-get install g++' >&2; exit 1; }

test: lint  ## lint and run the fast tests
	$(PYTEST) $(addprefix --ignore ,$(NATIVE)) -m "not slow"

cpp: cpp-build  ## build, check and test the C++ library and the CUDA plugins
	$(PYTEST) $(NATIVE)

cpp-build: cpp-packages $(VENV)/.installed-cpp
	$(VENV)/bin/python tests/cpp/builds.py

cpp-packages:
	@printf '#include <nlohmann/json.hpp>\n#include <doctest/doctest.h>\n' \
		| $${CXX:-c++} -std=c++17 -fsyntax-only -x c++ - 2>/dev/null || { \
		echo 'error: a C++ compiler, nlohmann/json and doctest are needed; on Debian and Ubuntu:' \
			'apt-get install g++ nlohmann-json3-dev doctest-dev' >&2; exit 1; }

test-all: cpp-packages $(VENV)/.installed-cpp  ## lint and run every test
	$(MAKE) --jobs 2 lint cpp-build
	$(PYTEST)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy qwenport

docs: $(VENV)/.installed-dev  ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:  ## remove build products and caches, not the virtual environment
	rm -rf build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'error: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): PyTorch and TensorRT are large, this takes minutes the first time.'
	$(INSTALL) -e '.[cpu,rtx]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): PyTorch and TensorRT are large, this takes minutes the first time.'
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-embed: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): PyTorch is large, this takes minutes the first time.'
	$(INSTALL) -e '.[cpu,cpp]'
	touch $@

# TensorRT's headers come with a package whose own code and dependencies are not wanted; its lean runtime, whose
# registry loads plugins, asks for a CUDA runtime that it does not need for that.
$(VENV)/.installed-cpp: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo 'Installing into $(VENV): PyTorch and TensorRT are large, this takes minutes the first time.'
	$(INSTALL) -e '.[native]'
	$(INSTALL) --no-deps kernel-lens tensorrt-lean-cu13-bindings tensorrt-lean-cu13-libs
	touch $@ $(VENV)/.installed-dev $(VENV)/.installed-embed $(VENV)/.installed
