# Each target first sets up what it needs: in .venv, or, with PYTHON=/path/to/python, in that Python's environment,
# where whatever is installed keeps its version. VENV_PYTHON is the Python that .venv is made with.

VENV_PYTHON ?= python3
ifeq ($(PYTHON),)
  PY := .venv/bin/python
  SETUP := $(VENV_PYTHON) tools/setup_environment.py
else
  PY := $(PYTHON)
  SETUP := $(PYTHON) tools/setup_environment.py --keep
endif

# Threads that wait for one another sleep: where anything else runs, spinning costs more than it saves.
export OMP_WAIT_POLICY ?= PASSIVE

# Newer PyTorch warns of what Detectron2 uses at import.
QUIET := -W ignore::FutureWarning

# Where the program looks for data sets, too.
DATASETS := $(or $(DETECTRON2_DATASETS),datasets)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench train-nuclei setup setup-dev nuclei-given

help: ## Show this list
	@echo 'Targets (each sets up what it needs, which takes some minutes the first time and 6 GB with a CUDA torch):'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 17
	@echo 'PYTHON=/path/to/python uses that environment, with its own torch and Detectron2, in place of .venv.'

demo: setup ## Segment the pictures of demo/nuclei with the model beside them
	$(PY) $(QUIET) demo/nuclei/run.py --output output/demo

# The tests' models are tiny: more than two threads would only wait for each other.
test: export OMP_NUM_THREADS ?= 2
test: setup-dev ## Run the tests
	$(PY) -m pytest

lint: setup-dev ## Check formatting, rules and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# About ten minutes on two cores; each program has a longer run of its own.
# Nothing else should run: threads wait as OpenMP has them by itself, for a while without sleeping.
bench: BENCH := output/benchmarks
bench: BENCH_PY = env -u OMP_WAIT_POLICY $(PY) $(QUIET)
bench: setup-dev ## Measure model, deformable attention, evaluation and, on COCO in DETECTRON2_DATASETS, data loading
	@mkdir -p $(BENCH)
	$(BENCH_PY) benchmarks/model.py --rounds 2 --json $(BENCH)/model.json --plot $(BENCH)/model.png
	$(BENCH_PY) benchmarks/results_memory.py --cases labels --json $(BENCH)/results_memory.json
	$(BENCH_PY) benchmarks/ms_deform_attn.py --sizes 512 --threads 2 --rounds 2 --json $(BENCH)/ms_deform_attn.json
	$(BENCH_PY) benchmarks/panoptic_evaluation.py --rounds 2 --json $(BENCH)/panoptic_evaluation.json
	$(if $(wildcard $(DATASETS)/coco/annotations),$(BENCH_PY) benchmarks/mappers.py --rounds 2 \
	  --json $(BENCH)/mappers.json,@echo 'Data loading is not measured: there is no COCO in $(DATASETS)')

train-nuclei: nuclei-given setup ## Train the model of the demo anew: make train-nuclei NUCLEI=<folder of the data set>
	$(if $(NUCLEI),$(PY) datasets/prepare_nuclei.py --input '$(NUCLEI)' --output '$(DATASETS)/nuclei')
	$(PY) $(QUIET) train_net.py --config-file configs/quick/nuclei.yaml OUTPUT_DIR output/nuclei

nuclei-given:
	@test -n '$(NUCLEI)' || test -f '$(DATASETS)/nuclei/annotations/panoptic_train.json' || { \
	  echo 'error: there is no nuclei data set in $(DATASETS)/nuclei: name its folder, NUCLEI=<folder>, with'; \
	  echo '  train/*.png, val/*.png and annotations/{train,val}.json (COCO instances, one class).'; \
	  echo '  The pictures are those of the 2018 Data Science Bowl, set BBBC038 of the Broad Bioimage Benchmark'; \
	  echo '  Collection (CC0); datasets/README.md says how the folder is laid out.'; exit 1; } >&2

setup: ## Only set up what demo and train-nuclei need
	@$(SETUP)

setup-dev: ## Only set up what test and lint need
	@$(SETUP) --dev
