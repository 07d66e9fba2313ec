# The commands of this repository: people and CI call these targets, and nothing else.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
MINOR   = $(shell $(PYTHON) -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
# $(call step,WHAT,COMMAND,ADVICE) prints one line with the elapsed time; where COMMAND fails, also
# its output and ADVICE.
step    = @printf '%s ... ' "$(1)"; began=$$(date +%s); if output=$$({ $(2); } 2>&1); \
	then echo "done in $$(($$(date +%s) - began)) s"; \
	else echo "failed after $$(($$(date +%s) - began)) s"; printf '%s\n' "$$output" "" "$(3)" >&2; exit 1; fi
install = $(call step,installing $$(grep -c == $(1)) packages from $(1) into $(VENV),scripts/install-packages $(1) $(VENV),$(PIP_ADVICE))
PIP_ADVICE = What to do: check the network and its proxy (HTTPS_PROXY; for a mirror PIP_INDEX_URL) and run make again.
VENV_ADVICE = What to do: install the module venv of this Python (Debian and Ubuntu: apt install python3-venv) and run make again.
# Four processes share the tests, since many tests wait for a program. Tests marked serial run after
# them, alone.
TOGETHER = $(PY) -m pytest -n 4 --dist worksteal
# Only the modules that have such tests: collecting all others would take as long as running them.
SERIAL = $(PY) -m pytest -m "serial and not soak" $(if $(ARGS),,$$(grep -rl --include='test_*.py' 'mark\.serial' tests))
# With ARGS one of the two runs may select no test (exit code 5).
SELECTED = $(ARGS) $(if $(ARGS),|| [ $$? -eq 5 ])

# Containers often set it; every test process would then compile all test modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test quick fast lint types docs-check golden bench size soak agents cover locks clean help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

run: $(VENV)/run.stamp .env  ## serve on 127.0.0.1:8787; installs what is missing
	@exec $(PY) -m relay serve $(ARGS)

# Before the first run: collecting once compiles the test modules, which each of the four processes
# would do otherwise.
test: $(VENV)/test.stamp lint  ## all checks and tests
	$(PY) -m compileall -q relay  # once, before hundreds of relays start
	$(PY) -m mypy --no-error-summary & types=$$!; \
	$(if $(ARGS),,[ -d tests/__pycache__ ] || $(PY) -m pytest --collect-only -qq >/dev/null;) \
	$(TOGETHER) -m "not soak and not serial" $(SELECTED); tests=$$?; wait $$types && exit $$tests
	$(SERIAL) $(SELECTED)

# What starts no program and takes no second: half a minute on two quiet cores.
QUICK = tests/registry/test_load.py tests/core tests/calls tests/gate tests/sessions tests/cache tests/surfaces tests/test_layers.py tests/test_docs.py tests/test_names.py
SLOW_FILES = tests/surfaces/test_questions.py tests/surfaces/test_odd_questions.py tests/surfaces/test_slow_questions.py tests/gate/test_refunds.py tests/core/test_large_bodies.py tests/core/test_injection.py tests/core/meters/test_scanning.py tests/core/meters/test_documents.py tests/core/meters/test_tolerant_json.py
SLOW_NAMES = any_byte or bomb or bounded_work or slow

quick: $(VENV)/test.stamp lint  ## lint, layers, docs and the fastest tests, in half a minute
	$(TOGETHER) -m "not soak and not serial and not programs" -k "not ($(SLOW_NAMES))" $(SLOW_FILES:%=--ignore=%) $(QUICK) $(ARGS)

fast: $(VENV)/test.stamp  ## the tests that start no other program
	$(TOGETHER) -m "not soak and not serial and not programs" $(SELECTED)

lint: $(VENV)/test.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check relay

types: $(VENV)/test.stamp
	$(PY) -m mypy

docs-check: $(VENV)/test.stamp  ## docs against code
	$(PY) -m pytest tests/test_docs.py

golden: $(VENV)/test.stamp  ## rewrite the golden files; read the diff
	GOLDEN=write $(PY) -m pytest tests/cli/test_golden.py

bench: $(VENV)/test.stamp  ## speed beside nginx and a bare relay (needs gcc, wrk, nginx)
	scripts/bench/run $(ARGS)

size:  ## lines, longest functions, largest modules, writers of the Exchange (ARGS=COMMIT)
	@$(PYTHON) scripts/size $(ARGS)

soak: $(VENV)/test.stamp  ## tests that wait for minutes
	$(PY) -m pytest -m soak -o addopts= tests $(ARGS)

agents: $(VENV)/test.stamp  ## coding agents over many turns (needs scripts/install-test-tools)
	$(PY) -m pytest -o addopts= -n 2 tests/agents $(ARGS)

cover: $(VENV)/test.stamp  ## coverage of relay/
	$(PY) -m coverage erase
	PYTEST_PLUGINS=tests.measured $(TOGETHER) -m "not soak and not serial" $(SELECTED)
	PYTEST_PLUGINS=tests.measured $(SERIAL) $(SELECTED)
	$(PY) -m coverage combine -q
	$(PY) -m coverage report --skip-covered

locks:  ## resolve the locks again (needs uv)
	scripts/lock

clean:  ## remove generated files; .env and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov .coverage* scripts/bench/bin
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.env:
	@cp .env.example .env && chmod 600 .env && echo "created .env from .env.example: put your keys in it"

$(VENV)/made.stamp:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed. Install Python 3.11 or newer, or set PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "relay needs Python 3.11 or newer; set PYTHON=…")'
	@test -f requirements/$(MINOR).txt || { echo "no lock for this Python ($(MINOR)); there is one for: $$(ls requirements | sed -n 's/^\(py[0-9.]*\)\.txt$$/\1/p' | tr '\n' ' '). Set PYTHON=…, or run scripts/lock" >&2; exit 1; }
	$(call step,creating $(VENV) with $(MINOR),$(PYTHON) -m venv $(VENV),$(VENV_ADVICE))
	@touch $@

$(VENV)/run.stamp: $(VENV)/made.stamp requirements/$(MINOR).txt
	$(call install,requirements/$(MINOR).txt)
	@touch $@

$(VENV)/test.stamp: $(VENV)/made.stamp requirements/$(MINOR)-test.txt
	$(call install,requirements/$(MINOR)-test.txt)
	@touch $@ $(VENV)/run.stamp
