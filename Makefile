# Two commands do everything on a fresh machine: `make demo` and `make test`.

.PHONY: demo test faults docs lint format clean

demo: ## install what it needs, run the main job on an embedded source for 20 s, end by itself
	@tools/setup.sh demo
	@.venv/bin/stream-mmrnn live --source synthetic --duration 20

test: ## set up and run the whole test suite
	@tools/setup.sh test
	.venv/bin/pytest $(PYTEST)

faults: ## try to break every promise, in full, and write docs/reliability.md
	@tools/setup.sh test
	.venv/bin/python -m tools.faults --write

docs: ## the documentation as a site, in site/
	@tools/setup.sh docs
	.venv/bin/python -m tools.config_reference --write
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

lint: ## ruff, mypy, import-linter
	@tools/setup.sh test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist build site
