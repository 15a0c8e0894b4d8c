.PHONY: check format lint types site test quick smoke fuzz matrix gpu

# A file stays in one process, whose fixtures it shares; tests/conftest.py puts long files first.
PYTEST = python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

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
	$(PYTEST)

quick:                   ## the tests that start no processes and train for moments only
	$(PYTEST) -m "not slow"

smoke:                   ## in a minute: losses, rows, labels, the architecture, one method of each kind against TRL
	$(PYTEST) -m "not slow" tests/test_golden.py tests/test_loss_contract.py tests/test_humanline.py \
		tests/test_architecture.py tests/test_tokens.py tests/test_group_sampler.py tests/test_kl_partners.py \
		tests/test_labelling.py tests/test_output_file.py tests/test_kto_trainer.py tests/test_paired_trainers.py

fuzz:                    ## two thousand runs on wrong input: each trains or names its cause (minutes)
	python -m pytest -q -n auto --dist load -m fuzz tests/test_fuzz.py

matrix:                  ## every method on every engine in two processes, and the table in docs/scaling.md (minutes)
	python tests/engine_matrix.py

gpu:                     ## kernels, half precision and training on packed rows, on a machine with a CUDA device
	python -m pytest -q -m gpu tests/test_gpu.py
