# Set-up, demonstration and checks. Every target can be repeated; finished set-up costs nothing.
#
#   make demo          install, build, train a small DN-DAB-DETR on the generated data set, show its AP
#   make demo-compare  the same with and without denoising, and their curves in one picture
#   make test          install, build, run the tests but those marked slow
#   make test-all      all tests
#   make drills        kills, signals, full disks and a real Slurm: see docs/reliability.md
#   make build         install and build the deformable-attention operator
#   make lint          style and types
#   make docs          the pages of docs/ and the API reference as HTML: build/docs/index.html

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= outputs/demo
DEMO_OPTIONS ?=
TEST_OPTIONS ?=
COVERAGE := --cov --cov-report=term:skip-covered --cov-fail-under=85

.PHONY: demo demo-compare test test-all drills build lint docs install clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	mkdir -p $(@D) && touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	mkdir -p $(@D) && touch $@

build: models/ops/lib/built

models/ops/lib/built: $(VENV)/installed $(wildcard models/ops/csrc/*) models/ops/setup.py
	$(BIN)/python models/ops/setup.py build_ext --inplace
	mkdir -p $(@D) && touch $@

demo: build
	$(BIN)/python main.py --config_file configs/demo.py --output_dir $(OUTPUT) --resume auto $(DEMO_OPTIONS)

demo-compare: demo
	$(BIN)/python main.py --config_file configs/demo_matching.py --output_dir $(OUTPUT)-matching --resume auto $(DEMO_OPTIONS)
	$(BIN)/python -m tools.plot $(OUTPUT) $(OUTPUT)-matching --output $(OUTPUT)/compare.png

test: build $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow" $(COVERAGE) $(TEST_OPTIONS)

test-all: build $(VENV)/installed-dev
	$(BIN)/python -m pytest $(TEST_OPTIONS)

drills: build $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/test_reliability.py tests/test_reliability_processes.py tests/test_slurm.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	rm -rf build/docs docs/api
	$(BIN)/sphinx-build -W --keep-going -q docs build/docs

clean:
	rm -rf build docs/api models/ops/build models/ops/lib .pytest_cache .mypy_cache .ruff_cache .coverage
