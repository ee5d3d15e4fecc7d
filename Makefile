# Each target sets up what it needs in .venv by itself (scripts/environment.py); later runs skip that at once.
#   make tutorial ARGS="--data cifar10"      make test PYTHON=python3.12      make test-full JOBS=8

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

python := .venv/bin/python
# The script itself reads from Python 3.7 on; this tells the users of older ones.
setup = command -v $(PYTHON) >/dev/null 2>&1 \
	|| { echo "error: no $(PYTHON) here; kilotune needs Python 3.11 to 3.13" >&2; exit 1; }; \
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 7))" \
	|| { echo "error: $(PYTHON) is too old; kilotune needs Python 3.11 to 3.13" >&2; exit 1; }; \
	$(PYTHON) scripts/environment.py $(if $(filter file,$(origin PYTHON)),,--explicit)
# One thread a worker: JOBS workers with a thread pool each would only wait for one another.
pytest = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(python) -m pytest -n $(JOBS) --dist worksteal

# vLLM starts processes of its own, two at a time where the tests are of two workers.
vllm_pytest = OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	.venv-vllm/bin/python -m pytest -c tests/vllm_plugin/pytest.ini tests/vllm_plugin

# Clients of the service have packages of their own, over those of .venv.
clients_pytest = OMP_NUM_THREADS=1 \
	.venv-clients/bin/python -m pytest -c tests/serve_clients/pytest.ini tests/serve_clients

.DEFAULT_GOAL := help
# The parts of a target share one .venv and one terminal: in order, under `make -j` too.
.NOTPARALLEL:
.PHONY: help demo tutorial test test-heavy test-full test-vllm test-clients lint type format bench docs clean env-demo env-dev env-docs env-postgresql env-chromium env-vllm env-clients

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: env-demo  ## a model for each of eight people over one language model (under 5 minutes); a report in runs/demo
	@.venv/bin/kilotune demo $(ARGS)

tutorial: env-demo  ## a small pretrained network, fine-tuned with VeRA, LoRA and in full on real images; a report in runs/
	@.venv/bin/kilotune experiment cnn $(ARGS)

test: lint type env-postgresql  ## lint, types, and the tests of every day (some 11 minutes on 2 cores)
	$(pytest) $(ARGS)

test-heavy: env-postgresql env-chromium env-clients  ## the second part of what CI runs: kills, browsers, processes, whole runs
	$(pytest) -m "heavy and not full" $(ARGS)
	$(clients_pytest)

test-full: lint type env-postgresql env-chromium env-clients env-vllm  ## everything, the slow tests too, and all of those of the vLLM plugin
	$(pytest) -m "" $(ARGS)
	$(clients_pytest)
	$(vllm_pytest) -m ""

test-vllm: env-vllm  ## the vLLM plugin in a real vLLM on this CPU, in .venv-vllm (3.4 GB); everything: ARGS='-m ""'
	$(vllm_pytest) $(ARGS)

test-clients: env-clients  ## LangChain, litellm and lm-evaluation-harness against a served process, in .venv-clients (0.3 GB)
	$(clients_pytest) $(ARGS)

lint: env-dev  ## ruff: rules and format
	$(python) -m ruff check --no-cache .
	$(python) -m ruff format --no-cache --check .

type: env-dev  ## mypy --strict
	$(python) -m mypy

format: env-dev  ## let ruff mend what it can
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

bench: env-dev  ## the benchmarks of benchmarks/README.md, over an hour on 2 cores; some: ARGS="inference adapters"
	@$(python) benchmarks/_all.py $(ARGS)

docs: env-docs  ## the documentation as a site in site/; a warning is an error
	$(python) -m sphinx -E -W --keep-going -q -b html docs site
	@echo "open site/index.html"

clean:  ## remove what the tools made (.venv and runs/ stay)
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

env-clients: env-dev
	@$(python) scripts/clients_environment.py

env-vllm: env-dev
	@$(python) scripts/vllm_environment.py

env-demo env-dev env-docs:
	@$(setup) $(@:env-%=%)

env-postgresql: env-dev
	@$(python) scripts/postgresql.py

env-chromium: env-dev
	@$(python) scripts/chromium.py
