# Each target works on a fresh machine with Linux, Python 3.11 or newer, and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAULTS ?= runs/faults
MARKS ?= slow or slurm

.PHONY: help demo test test-all faults check docs format clean docker-build docker-shell

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(BIN)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(BIN)/.installed  ## install, train the demo recipe end to end, sample, report
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_lm.py

test: $(BIN)/.installed-dev  ## install, the core tests: every law, one pairing of every mode
	$(BIN)/python -m pytest -q -n 2

# Three workers for two cores: these tests often wait, for signals and clusters.
test-all: $(BIN)/.installed-dev  ## the rest: whole matrices, Slurm, faults, the commands of the docs
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m '$(MARKS)'

faults: $(BIN)/.installed-dev  ## the large fault campaign: hours; resumable; FAULTS=folder of its results
	$(BIN)/python -m benchmarks.faults.campaign --all --out $(FAULTS)

check: $(BIN)/.installed-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(BIN)/.installed-dev  ## the documentation site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(BIN)/.installed-dev  ## write the format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what was built here (runs/ and token_stores/ stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

DEVICE ?= cuda
TAG := lmcore$(if $(filter cpu,$(DEVICE)),:cpu,)
# Another folder with text: make docker-shell DATA=/path/to/text, seen as /data.
DATA ?=

docker-build:  ## build the image; DEVICE=cpu for a machine without a GPU
	docker build --build-arg DEVICE=$(DEVICE) --tag $(TAG) .

docker-shell:  ## a shell in the image, this folder as /workspace; .env is passed if it is there
	docker run --rm -it $(if $(filter cuda,$(DEVICE)),--gpus all,) --shm-size 8g \
	    $(if $(wildcard .env),--env-file .env,) --user $$(id -u):$$(id -g) --volume "$(CURDIR)":/workspace \
	    $(if $(DATA),--volume "$(DATA)":/data:ro,) $(TAG) bash
