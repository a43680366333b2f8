# Everything sets itself up on a fresh machine: `make app`, `make test`.
PYTHON ?= $(or $(shell command -v python3.11 || command -v python3.12),python3.11)
BIN := .venv/bin

.PHONY: app test check clean

app: .venv/app
	$(BIN)/python app.py

test: .venv/dev chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is left of one that failed would count as made.
.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/app: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@ .venv/app

# The browser test needs a Chromium; on Debian and Ubuntu, as root, it is installed.
.PHONY: chromium
chromium:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null \
	|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	|| echo "No Chromium found and none could be installed: the browser test will fail and say so."

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
