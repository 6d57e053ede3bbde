# Everything runs in .venv, which each target creates first. You need only Python 3.11+ and make:
# PostgreSQL and Node come as Python packages. requirements-dev.txt pins all packages, with hashes.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BIOME := tools/biome/node_modules
TYPES := tools/types/node_modules

.PHONY: help demo admin test test-all check hooks format sql sync types bench docs lock dist sbom postgres15 prometheus clean

help:
	@echo 'make demo        run examples/quickstart.py on a local Supabase'
	@echo 'make admin       run the admin panel with sample data on a local Supabase'
	@echo 'make test        run the quick tests on real servers, with the newest PostgreSQL'
	@echo 'make test-all    run all tests: every available PostgreSQL, and slow tests'
	@echo 'make check       run all linters, type checkers and checks of the English'
	@echo 'make hooks       run the linters before each git commit'
	@echo 'make format      format Python, SQL and JavaScript'
	@echo 'make sql         rebuild sql/tokenlimits.sql and the newest migration from sql/schema/'
	@echo 'make sync        rebuild the sync clients, client.py and groups.py, from the async ones'
	@echo 'make types       rebuild examples/frontend/tokenlimits.d.ts from the models and the SQL'
	@echo 'make docs        build the documentation, build/site/index.html'
	@echo 'make bench       run the benchmarks and write benchmarks/RESULTS.md'
	@echo 'make lock        pin the dependencies in pyproject.toml; UPGRADE=--upgrade takes the newest versions'
	@echo 'make dist sbom   build the wheel, the sdist and the SBOM of a release'
	@echo 'make postgres15  (Debian 12, as root) install PostgreSQL 15, which the tests then use too'
	@echo 'make prometheus  (Debian, as root) unpack Prometheus, which then loads the alerts and the board in the tests'

.venv/.ready: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes --requirement requirements-dev.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# npm is in .venv too.
tools/%/node_modules/.ready: .venv/.ready tools/%/package-lock.json
	cd tools/$* && PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

demo: .venv/.ready
	$(BIN)/python -W error examples/quickstart.py

admin: .venv/.ready
	$(BIN)/python examples/admin_panel.py

# Several processes, each with its own servers.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist loadscope --no-loadscope-reorder

test: .venv/.ready
	$(PYTEST) -m 'not full and not slow'

test-all: .venv/.ready
	$(PYTEST)

check: .venv/.ready $(BIOME)/.ready $(TYPES)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/build_sql.py --check
	$(BIN)/python tools/build_sync.py --check
	$(BIN)/python tools/build_types.py --check
	$(BIN)/sqlfluff lint --processes 0 sql
	$(BIN)/squawk sql/tokenlimits.sql sql/migrations/*.sql sql/uninstall.sql
	$(BIN)/djlint --lint --quiet src/tokenlimits/web
	$(BIOME)/.bin/biome check --error-on-warnings
	$(BIN)/zizmor --offline --quiet --strict-collection .github
	$(BIN)/codespell *.md docs examples benchmarks sql/schema src tools
	$(BIN)/python tools/check_words.py

hooks: .venv/.ready $(BIOME)/.ready $(TYPES)/.ready
	$(BIN)/pre-commit install

format: .venv/.ready $(BIOME)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/sqlfluff fix sql/schema sql/uninstall.sql
	$(BIOME)/.bin/biome check --write

sql: .venv/.ready
	$(BIN)/python tools/build_sql.py

sync: .venv/.ready
	$(BIN)/python tools/build_sync.py

types: .venv/.ready $(TYPES)/.ready
	$(BIN)/python tools/build_types.py

docs: .venv/.ready
	$(BIN)/python tools/build_reference.py
	$(BIN)/zensical build --strict --clean

bench: .venv/.ready
	$(BIN)/python -m benchmarks

# Keeps the pinned versions, except with UPGRADE=--upgrade or UPGRADE=--upgrade-package=NAME.
lock: .venv/.ready
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes $(UPGRADE) \
	  pyproject.toml --output-file requirements-dev.txt

dist: .venv/.ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# What users install: the wheel with its extras, in the tested versions.
sbom: dist
	rm -rf build/sbom
	$(PYTHON) -m venv --without-pip build/sbom
	$(BIN)/uv pip compile --quiet --extra cli --extra local --extra otel --extra web --generate-hashes \
	  --constraint requirements-dev.txt pyproject.toml --output-file build/sbom/requirements.txt
	$(BIN)/uv pip install --quiet --python build/sbom --require-hashes --requirement build/sbom/requirements.txt
	$(BIN)/uv pip install --quiet --python build/sbom --no-deps dist/*.whl
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-file build/sbom.cdx.json build/sbom

postgres15:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends postgresql-15 postgresql-15-plpgsql-check

# Unpacked and not installed, as the package would start a server.
prometheus:
	rm -rf build/prometheus
	mkdir -p build/prometheus
	apt-get update -qq
	cd build/prometheus && apt-get download -qq prometheus && dpkg-deb --fsys-tarfile prometheus_*.deb \
	  | tar -x ./usr/bin/prometheus ./usr/bin/promtool && rm prometheus_*.deb

clean:
	rm -rf .venv $(BIOME) $(TYPES) dist build .pytest_cache .ruff_cache .hypothesis
