.PHONY: check format lint types site test quick fuzz matrix gpu

check: lint types site test   ## everything that has to pass before a commit

format:                  ## rewrite the files in the project's format
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

site:                    ## the documentation site, in site/; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

test:
	python -m pytest -q -n auto --dist loadfile

quick:                   ## the tests that start no processes and train for moments only
	python -m pytest -q -n auto --dist loadfile -m "not slow"

fuzz:                    ## two thousand runs on wrong input: each trains or names its cause (minutes)
	python -m pytest -q -n auto --dist load -m fuzz tests/test_fuzz.py

matrix:                  ## every method on every engine in two processes, and the table in docs/scaling.md (minutes)
	python tests/engine_matrix.py

gpu:                     ## kernels, half precision and training on packed rows, on a machine with a CUDA device
	python -m pytest -q -m gpu tests/test_gpu.py
