# The commands that people repeat.
.PHONY: check lint test docs generate demo

check: lint docs test

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test:
	python -m pytest

docs:
	python scripts/generate_docs.py --check
	mkdocs build --strict --quiet --site-dir build/site

generate:
	python scripts/generate_docs.py

demo:
	transmla convert recipes/smollm2-135m.yaml
