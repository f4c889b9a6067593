# All targets need Python >= 3.11 and nothing else: the first one installs the rest into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: compare quick test pytest lint clean

compare: $(READY)
	$(BIN)/python experiments/compare_modes.py $(ARGS)

quick: $(READY)
	$(BIN)/python -m pytest tests/unit -n 2 $(ARGS)

test: $(READY)
	$(MAKE) --jobs 2 lint pytest

pytest: $(READY)
	$(BIN)/python -m pytest -m "not multi_gpu" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "overlap_mtp needs Python >= 3.11; this is " + sys.version)'
	@echo "installing torch and the rest into $(VENV): some minutes, more than 2 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[experiments,megatron,dev]'
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
