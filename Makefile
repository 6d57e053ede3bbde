# Everything runs in .venv, which any target makes first. It needs Python 3.11+ and make, nothing else:
# PostgreSQL and Node come as Python packages.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo admin test test-all check format sql sync bench postgres15 clean

help:
	@echo 'make demo        run examples/quickstart.py on an embedded Supabase'
	@echo 'make admin       the admin panel with made-up groups, on an embedded Supabase'
	@echo 'make test        the quick tests, on real servers, with the newest PostgreSQL'
	@echo 'make test-all    all tests: every PostgreSQL at hand, and what takes long'
	@echo 'make check       all linters and type checkers'
	@echo 'make format      format Python and SQL'
	@echo 'make sql         rebuild sql/tokenlimits.sql and the newest migration from sql/schema/'
	@echo 'make sync        rebuild the sync clients, client.py and groups.py, from the async ones'
	@echo 'make bench       measure, and write benchmarks/RESULTS.md'
	@echo 'make postgres15  (Debian 12, as root) install PostgreSQL 15, which the tests then use beside 16, 17 and 18'

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/python -W error examples/quickstart.py

admin: .venv/.ready
	$(BIN)/python examples/admin_panel.py

# Several processes, each with servers of its own.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

test: .venv/.ready
	$(PYTEST) -m 'not full and not slow'

test-all: .venv/.ready
	$(PYTEST)

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/build_sql.py --check
	$(BIN)/python tools/build_sync.py --check
	$(BIN)/sqlfluff lint --processes 0 sql
	$(BIN)/squawk sql/tokenlimits.sql sql/migrations/*.sql sql/uninstall.sql

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/sqlfluff fix sql/schema sql/uninstall.sql

sql: .venv/.ready
	$(BIN)/python tools/build_sql.py

sync: .venv/.ready
	$(BIN)/python tools/build_sync.py

bench: .venv/.ready
	$(BIN)/python -m benchmarks

postgres15:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends postgresql-15 postgresql-15-plpgsql-check

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .hypothesis
