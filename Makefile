# The one front door: people and CI call these, and nothing else.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
MINOR   = $(shell $(PYTHON) -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
# The lock names everything, with hashes: pip resolves nothing of its own (--no-deps), and falls back to nothing.
PIP     = $(PY) -m pip install --quiet --disable-pip-version-check
# Four processes share the tests: many wait for a program. Those marked serial come after them and
# have the machine to themselves.
TOGETHER = $(PY) -m pytest -n 4 --dist worksteal
# Of the modules that have some alone: to collect all the others would take as long as to run them.
SERIAL = $(PY) -m pytest -m "serial and not soak" $(if $(ARGS),,$$(grep -rl --include='test_*.py' 'mark\.serial' tests))
# With ARGS it is no failure (5) that one of two runs has nothing to do.
SELECTED = $(ARGS) $(if $(ARGS),|| [ $$? -eq 5 ])

# Containers often set it: every test process would then compile all test modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test fast lint types docs-check golden bench size soak cover locks clean help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

run: $(VENV)/run.stamp .env  ## serve on 127.0.0.1:8787, set up first if need be
	@exec $(PY) -m relay serve $(ARGS)

test: $(VENV)/test.stamp lint  ## all checks and tests
	$(PY) -m compileall -q relay  # hundreds of relays start: none compiles it again
	$(PY) -m mypy --no-error-summary & types=$$!; \
	$(TOGETHER) -m "not soak and not serial" $(SELECTED); tests=$$?; wait $$types && exit $$tests
	$(SERIAL) $(SELECTED)

fast: $(VENV)/test.stamp  ## the tests that start no other program
	$(TOGETHER) -m "not soak and not serial and not programs" $(SELECTED)

lint: $(VENV)/test.stamp
	$(PY) -m ruff check .

types: $(VENV)/test.stamp
	$(PY) -m mypy

docs-check: $(VENV)/test.stamp  ## docs against code
	$(PY) -m pytest tests/test_docs.py

golden: $(VENV)/test.stamp  ## rewrite the golden files; read the diff
	GOLDEN=write $(PY) -m pytest tests/cli/test_golden.py

bench: $(VENV)/test.stamp  ## speed beside nginx and a bare relay (needs gcc, wrk, nginx)
	scripts/bench/run $(ARGS)

size:  ## lines, longest functions, largest modules, and who writes the Exchange (ARGS=COMMIT: of a commit)
	@$(PYTHON) scripts/size $(ARGS)

soak: $(VENV)/test.stamp  ## the waits of minutes, in full
	$(PY) -m pytest -m soak -o addopts= tests $(ARGS)

cover: $(VENV)/test.stamp  ## coverage of relay/
	$(PY) -m coverage erase
	PYTEST_PLUGINS=tests.measured $(TOGETHER) -m "not soak and not serial" $(SELECTED)
	PYTEST_PLUGINS=tests.measured $(SERIAL) $(SELECTED)
	$(PY) -m coverage combine -q
	$(PY) -m coverage report --skip-covered

locks:  ## resolve the locks anew (needs uv)
	scripts/lock

clean:  ## remove what was made here; .env and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov .coverage* scripts/bench/bin
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.env:
	@cp .env.example .env && chmod 600 .env && echo "made .env from .env.example: put your keys in it"

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "relay needs Python 3.11 or newer; set PYTHON=…")'
	@test -f requirements/$(MINOR).txt || { echo "no lock for this Python ($(MINOR)); there is one for: $$(ls requirements | grep -v test | sed 's/\.txt//' | tr '\n' ' '). Set PYTHON=…, or run scripts/lock"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run.stamp: $(VENV)/made.stamp requirements/$(MINOR).txt
	$(PIP) --no-deps --require-hashes -r requirements/$(MINOR).txt
	@touch $@

$(VENV)/test.stamp: $(VENV)/made.stamp requirements/$(MINOR)-test.txt
	$(PIP) --no-deps --require-hashes -r requirements/$(MINOR)-test.txt
	@touch $@ $(VENV)/run.stamp
