# Each target first makes .venv and installs what it needs. PYTHON=python3.12 make small uses another Python.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: small chat test check

# Train config/small.py on the source of Python's standard library, then print a sample.
small: $(VENV)/installed
	$(RUN) train.py config/small.py
	$(RUN) sample.py out/small --prompt 'def'

# Train config/chat.py on generated questions, then ask it held-out ones.
chat: $(VENV)/installed
	$(RUN) train.py config/chat.py
	$(RUN) bench/chat.py chat

# The whole test suite.
test: $(VENV)/installed-dev
	$(RUN) -m pytest -n auto --dist worksteal

# Lint and types.
check: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
