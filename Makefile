# make chat [PROMPT="..."]   install into .venv, fetch the small default model, talk to it
# make test                  install the test environment and run lint, types, import contracts and tests
# make bench [ARGS=--quick]  side by side with llama.cpp and OpenVINO on this machine

PYTHON ?= python3.11
BIN := .venv/bin
NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: chat test check bench clean

chat: .venv/core.stamp
ifdef PROMPT
	@$(BIN)/miniphi chat --prompt "$$PROMPT"
else
	@$(BIN)/miniphi chat
endif
export PROMPT

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/miniphi pull smollm2-135m-instruct
	$(BIN)/pytest

bench: .venv/bench.stamp
	$(BIN)/miniphi pull smollm2-135m-instruct
	$(BIN)/python -m benchmarks.suite $(ARGS)

clean:
	rm -rf .venv build dist

.venv/bin/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/core.stamp: .venv/bin/pip $(NATIVE)
	@echo "Installing miniphi (the kernels are compiled once; this takes about half a minute) ..."
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev.stamp: .venv/bin/pip $(NATIVE) constraints.txt
	@echo "Installing miniphi and its test environment ..."
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ .venv/core.stamp

.venv/bench.stamp: .venv/core.stamp
	@echo "Installing the engines to compare with ..."
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	@touch $@
