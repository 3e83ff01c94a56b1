# `make serve` and `make test` bring what they need. To serve on GPUs, install the `vllm` extra instead (README).
PYTHON ?= python3
VENV ?= .venv
# On a host without a local CPU wheel of torch, point this at PyTorch's CPU wheel index to save about 4 GB.
TORCH_INDEX ?=
SERVE_FLAGS ?=
BENCH_FLAGS ?=
FUZZ_TIMES ?= 10
FUZZ_JSON ?= fuzz.json
# A row of the matrix, or several: "fp8 or convolution".
ROW ?=
MATRIX_JSON ?= matrix.json
MATRIX := $(addprefix tests/integration/test_,matrix.py check.py speculative_decoding.py two_hosts.py hybrid_memory.py reasoning.py)
# In the order of their files: xdist's own leaves those with few and long tests for the end. A process that ends (a test
# hangs: tests/conftest.py) ends the run: in another one, xdist would run that test again, without end.
IN_PARALLEL := --numprocesses 5 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# Two processes: the shared cluster's tests, and those with instances of their own (tests/integration/conftest.py).
ON_ENGINES := --numprocesses 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0
# Tests that wait may run out of time on a busy machine: one that fails runs once more, and is named in the summary.
PYTEST := $(VENV)/bin/python -m pytest --reruns 1 -raR
STAMP := $(VENV)/.ready

.PHONY: help setup serve test test-without-engines test-ray check compile-simulator compile-policies fuzz matrix bench package docs clean

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

setup: $(STAMP)  ## Make .venv with everything: vLLM's CPU build, NIXL, ARES, the test tools

$(STAMP): requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --no-deps --requirement requirements/cpu.txt
	$(VENV)/bin/python -m pip uninstall --quiet --yes ares  # what the distribution was called before
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

serve: setup  ## Serve a small model on 1 prefill and 2 decode instances behind one endpoint
	$(VENV)/bin/ares up $(SERVE_FLAGS)

check: setup  ## Lint, types, import rules
	$(VENV)/bin/ruff format --check src dev tests benchmarks
	$(VENV)/bin/ruff check src dev tests benchmarks
	$(VENV)/bin/mypy

compile-simulator: setup
	$(VENV)/bin/ares simulate --trace chat --requests 20 --preset static-rr --preset ares > /dev/null

compile-policies: setup
	$(VENV)/bin/python -c "from ares.gateway.control.compile_ahead import compile_ahead; compile_ahead()"

# Most of these tests wait, for timers and for processes of their own: more of them run at once than there are cores.
# Compiled code is kept for all processes: compiled once, before two of them compile the same at the same time.
test-without-engines: compile-simulator compile-policies
	$(PYTEST) --ignore tests/integration $(IN_PARALLEL)

test: setup  ## Check, then all tests, real engines included
	$(MAKE) --no-print-directory --jobs 2 check test-without-engines
	$(PYTEST) tests/integration $(ON_ENGINES)

fuzz: setup  ## Fuzz routes, wire and readers at length (docs/fuzzing.md)
	ARES_FUZZ_TIMES=$(FUZZ_TIMES) ARES_FUZZ_JSON=$(FUZZ_JSON) $(VENV)/bin/python -m pytest tests/fuzz --timeout 3600

matrix: setup  ## Moves under other configurations of vLLM, on real engines (docs/configurations.md)
	ARES_MATRIX_JSON=$(abspath $(MATRIX_JSON)) $(VENV)/bin/python -m pytest $(MATRIX) -m "matrix or not matrix" \
		$(if $(ROW),-k "$(ROW)")

bench: setup  ## A short comparison of static placement and ARES (on simulated engines; docs/benchmarks.md has the long ones)
	$(VENV)/bin/ares bench live --simulate r1-qwen-7b-24gb --workload chat --requests 200 --rounds 1 $(BENCH_FLAGS)

# In an environment of its own, of the extra: Ray and what it needs are larger than all but vLLM and torch.
test-ray:  ## Test the application of Ray Serve on a cluster of several raylets (docs/ray.md)
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --editable '.[ray,bench]' httpx hypothesis pytest pytest-asyncio pytest-timeout
	$(VENV)-ray/bin/python -m pytest tests/ray

# In an environment of its own: what is tested is what a user gets.
package:  ## Make wheel and source distribution in dist/, and check them
	$(PYTHON) -m venv $(VENV)-package
	$(VENV)-package/bin/python -m pip install --quiet build twine
	rm -rf dist
	$(VENV)-package/bin/python -m build --outdir dist .
	$(VENV)-package/bin/python -m twine check --strict dist/*

# The notice is about the future of mkdocs and its themes, not about these pages.
docs: setup  ## Make the documentation as a site in site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --clean

clean:  ## Remove the environments, and what was built
	rm -rf $(VENV) $(VENV)-package $(VENV)-ray site dist
