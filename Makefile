# Short names for the commands of CONTRIBUTING.md. Each of them also works without make.

.PHONY: help fast test lint types same flags mutations

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

fast:  ## the tests that take seconds; run these after every edit
	uv run pytest -m "not slow"

test:  ## the whole suite
	uv run pytest -n 2

lint:  ## ruff: rules and formatting, without changing a file
	uv run ruff check .
	uv run ruff format --check .

types:  ## mypy over the files named in pyproject.toml
	uv run mypy

same:  ## compare the logged numbers with another commit: make same REV=main
	@test -n "$(REV)" || { echo "which commit? make same REV=main"; exit 2; }
	uv run tests/same_numbers.py $(REV)

flags:  ## write docs/flags.md from config.py
	uv run config.py > docs/flags.md

mutations:  ## put 34 bugs in, one at a time, and check that a test notices each
	uv run tests/mutations.py
