# Every target makes what it needs from a bare checkout, in an environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= writesae-demo
MODEL ?= tiny-gdn

.PHONY: demo test test-slow tutorials docs lint bench bench-full cells atlas dist dist-demo test-transformer-lens-4 clean

demo: $(VENV)/.user  ## train a WriteSAE on a shipped model, test it, write a report
	$(BIN)/writesae-lens demo --model $(MODEL) --out $(OUT)

test: $(VENV)/.dev  ## the fast tests, a process a core; those of the report want chromium
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

tutorials: $(VENV)/.dev  ## run every notebook from top to bottom
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 -n auto -q -o addopts= tutorials

docs: $(VENV)/.dev  ## guides, tutorials and the API reference in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.dev  ## both sides of each ratio in one run, on one thread
	$(BIN)/python -m tests.benchmarks

bench-full: $(VENV)/.dev  ## a model of Qwen3.5-0.8B's size with random weights: every operation against what it needs
	$(BIN)/python -m tests.benchmarks.full_size

cells: $(VENV)/.dev  ## train and test every cell of a shipped model, print tables
	$(BIN)/writesae-lens sweep --model_name $(MODEL) --workers 2 --out writesae-cells-$(MODEL)
	$(BIN)/python -m tests.benchmarks.all_cells writesae-cells-$(MODEL) --workers 2

atlas: $(VENV)/.user  ## map, SAE and report of every cell of a shipped model, and one page of all: 15 minutes on 2 cores
	$(BIN)/writesae-lens map --model $(MODEL) --out writesae-atlas-$(MODEL)/map
	$(BIN)/writesae-lens sweep --model_name $(MODEL) --workers 2 --reports --out writesae-atlas-$(MODEL)
	$(BIN)/writesae-lens report --sae writesae-atlas-$(MODEL)

# pip would refuse: sae-lens wants TransformerLens below 4. docs/compatibility.md has what passes there.
test-transformer-lens-4: $(VENV)/.dev  ## the tests of hooks on TransformerLens 4.3, which this environment then has
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps transformer-lens==4.3.0
	$(BIN)/python -m pytest -n auto --dist loadfile -p tests.transformer_lens_4 tests/hooked_models

dist: $(VENV)/.dev  ## wheel and sdist in dist/, with all files of the packages and no others
	rm -rf build dist
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py dist

dist-demo: dist  ## the wheel in an empty environment, away from the checkout: package data included, its demo runs
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/empty && bin/writesae-lens demo --out demo

# torch is asked for by its exact version first: a range would fetch the registry's newest build and its CUDA
# packages where a CPU build of the tested version is at hand.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.user: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.user

clean:
	rm -rf $(VENV) $(OUT) site build dist *.egg-info
