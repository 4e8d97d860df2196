# Two commands set everything up on a machine that has Python 3.11 and make:
#   make demo   install, train, compare, say where the picture is
#   make test   install, check style, types and layering, run the tests
# make bench DATA=folder measures docs/results.md anew; make bench-products DATA=folder its part on products and
# solvers alone.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test check bench bench-products clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cli: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[cli]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[cli,test,lint]'
	touch $@

# curvlinops without its dependencies: backpack asks for torchvision, which has no build for this torch and which
# nothing here imports. What is imported is in the extra, and so for the optimizers that the suite compares with.
$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps curvlinops-for-pytorch backpack-for-pytorch einconv unfoldNd linear_operator
	$(PIP) --no-deps torchzero torch-levenberg-marquardt
	touch $@

demo: $(VENV)/.cli
	$(BIN)/torchnewton train --out runs/demo --overwrite
	$(BIN)/torchnewton compare --data sine --methods newton,lbfgs,adam,sgd --seconds 3 --seeds 3 --target 1.1e-4 \
		--out runs/demo-compare --overwrite
	@echo "The pictures: runs/demo/curves.png, runs/demo-compare/compare.html and compare.png"

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n 2

DATA ?= data
bench: bench-products
	$(BIN)/python -m benchmarks.suite --data-dir $(DATA) --processes 2

# The first command needs the MNIST files; the second does without them.
bench-products: $(VENV)/.bench
	-$(BIN)/python -m benchmarks.preconditioners --data-dir $(DATA)
	$(BIN)/python -m benchmarks.products --data-dir $(DATA)

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
