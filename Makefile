# On a fresh machine `make demo` and `make test` install what they need. CONTRIBUTING.md says which target is for what.

# Else each program that a test starts would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

QUICK = not process and not slow and not devices

.PHONY: demo test quick coverage faults docs lint format clean

demo: ## install, then run a live session on the synthetic source for 20 s
	@tools/setup.sh demo
	@.venv/bin/stream-mmrnn live --source synthetic --duration 20

test: ## the whole test suite; options for pytest: make test PYTEST="-k replay"
	@tools/setup.sh test
	.venv/bin/pytest $(PYTEST)

quick: ## the tests that start no process, in under a minute
	@tools/setup.sh test
	.venv/bin/pytest -m "$(QUICK)" -n 2 $(PYTEST)

coverage: ## line and branch coverage of the quick tests; child processes are not measured
	@tools/setup.sh test
	.venv/bin/pytest -m "$(QUICK)" -n 2 --cov --cov-report=term $(PYTEST)

faults: ## try to break every guarantee, in full, and write docs/reliability.md
	@tools/setup.sh test
	.venv/bin/python -m tools.faults --write

docs: ## the documentation as a site, in site/
	@tools/setup.sh docs
	.venv/bin/python -m tools.config_reference --write
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

lint: ## ruff, mypy, import-linter; .pre-commit-config.yaml runs the same
	@tools/setup.sh test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

format: ## fix what ruff can fix
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove the virtual environment and all that was built
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.* dist build site
