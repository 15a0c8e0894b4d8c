.PHONY: check format lint types site test quick smoke fuzz matrix gpu

# The tests of a file run in one process and share its fixtures; tests/conftest.py puts long files first.
PYTEST = python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

check: lint types site test   ## all checks that must pass before a merge

format:                  ## format the files
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

site:                    ## build the documentation site in site/; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

test:
	$(PYTEST)

quick:                   ## the tests that start no processes and train only briefly
	$(PYTEST) -m "not slow"

smoke:                   ## losses, rows, labels, the architecture, one method of each kind against TRL (a minute)
	$(PYTEST) -m "not slow" tests/test_golden.py tests/test_loss_contract.py tests/test_humanline.py \
		tests/test_architecture.py tests/test_tokens.py tests/test_group_sampler.py tests/test_kl_partners.py \
		tests/test_labelling.py tests/test_output_file.py tests/test_kto_trainer.py tests/test_paired_trainers.py

fuzz:                    ## 2,000 runs on invalid input: each must finish or name the cause (minutes)
	python -m pytest -q -n auto --dist load -m fuzz tests/test_fuzz.py

matrix:                  ## every method on every engine in two processes; updates the table in docs/scaling.md (minutes)
	python tests/engine_matrix.py

gpu:                     ## kernels, half precision and training on packed rows, on a machine with a CUDA device
	python -m pytest -q -m gpu tests/test_gpu.py
