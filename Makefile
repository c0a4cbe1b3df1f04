# make demo   sets up .venv and runs the main job on bagel-nano; saves demo.png
# make test   sets up .venv and runs the tests
# make manifests   those of the released names and shapes, at full size on the meta device, with their times
# make lint   ruff (rules and format) and mypy
# make docs   the documentation, strictly, into site/

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test manifests lint docs clean

demo: .venv/demo.stamp
	$(BIN)/unimm demo

test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

manifests: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=0 -k "manifest_fits or manifests_fit or manifest_walk or released_names_and_shapes"

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy unimm

docs: .venv/docs.stamp
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build site *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "python 3.10 or newer is needed: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv

# a stamp says what is installed already; packaging files newer than it install again
.venv/demo.stamp: .venv/bin/python setup.py pyproject.toml
	$(BIN)/python -m pip install -e .
	@touch $@

.venv/docs.stamp: .venv/bin/python setup.py pyproject.toml
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@ .venv/demo.stamp

.venv/test.stamp: .venv/bin/python setup.py pyproject.toml
	$(BIN)/python -m pip install -e '.[test]'
	@touch $@ .venv/demo.stamp
