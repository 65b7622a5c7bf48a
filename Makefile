# Each target makes .venv and installs what it needs first. PYTHON=python3.12 make small takes another Python.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

.PHONY: small chat test check

# Train config/small.py on the standard library's source, then show what the model writes.
small: $(VENV)/installed
	$(RUN) train.py config/small.py
	$(RUN) sample.py out/small --prompt 'def'

# Train config/chat.py on generated questions, then ask it some that it has not seen.
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
