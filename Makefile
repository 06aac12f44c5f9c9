# `make` lists the targets. PYTHON= chooses the interpreter: with it the environment is .venv-3.12 and the like, without it .venv.
SHELL := /bin/bash
.NOTPARALLEL:

ifeq ($(strip $(PYTHON)),)
  override PYTHON := python3
  VENV ?= .venv
endif
version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifeq ($(version),)
  $(error PYTHON=$(PYTHON) does not run: give the path of a Python 3.11 or newer)
endif
ifneq ($(shell $(PYTHON) -c 'import sys; print(sys.version_info < (3, 11))'),False)
  $(error PYTHON=$(PYTHON) is Python $(version), but 3.11 or newer is needed: give the path of one, as in PYTHON=python3.12)
endif
VENV ?= .venv-$(version)

# JAX runs several threads in each worker already, so more workers than two gain little on a small machine. 0: one process.
WORKERS ?= 2
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# A stamp is out of date when the packaging changes, and missing when the interpreter does.
runtime := $(VENV)/.installed-$(version)
testing := $(VENV)/.installed-$(version)-test

.PHONY: help env demo demo-real notebooks test test-slow test-mutants test-launch test-tpu-compile test-tpu tune-tpu check clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

env: $(runtime) ## makes the environment (.venv) with flexolmo installed

demo: $(runtime) ## the whole story on real text on a CPU
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash launch/demo.sh

demo-real: $(runtime) ## the same on SmolLM2, a real small model, in less than an hour
	$(VENV)/bin/flexolmo demo --anchor smollm2 --out demo-real

notebooks: $(testing) ## .ipynb files of notebooks/*.py, for Colab
	$(VENV)/bin/python launch/colab/build.py

test: $(testing) ## the fast tests; ARGS= adds pytest's arguments
	$(PYTEST) -m "not slow" $(ARGS)

# The story of tests/tiny.py, and what it is told on: pairs, merges, masks, opt-out, tuning, generation, evaluation.
families := llama qwen2 qwen3 olmo3
story := tests/coordinator/test_invariants.py tests/coordinator/test_router.py tests/owner/test_pair.py \
    tests/owner/test_package.py tests/train/test_evaluate.py tests/evals/test_predictors.py

test-slow: $(testing) ## the slow tests, the story on other families, then the fast ones in a random order; SEED= repeats one
	$(PYTEST) -m slow $(ARGS)
	for family in $(families); do TINY_FAMILY=$$family $(PYTEST) -m "not slow" $(story) || exit 1; done
	$(PYTEST) -m "not slow" --shuffle $(or $(SEED),$(shell echo $$RANDOM)) $(ARGS)

test-mutants: .venv-mutants/.installed-$(version) ## plants faults and makes mutants: which does no test see?
	.venv-mutants/bin/python tests/mutants/planted.py
	.venv-mutants/bin/python tests/mutants/mutate.py $(ARGS)

test-launch: .venv-launch/.installed-$(version) ## the launchers' commands against the real XPK and SkyPilot; ARGS=--update
	PATH="$(CURDIR)/.venv-launch/bin:$$PATH" .venv-launch/bin/python tests/launch/real_tools.py $(ARGS)

test-tpu-compile: .venv-tpu/.installed-$(version) ## compiles every kernel, and steps, for real TPU slices, without one; ARGS= for kernels
	.venv-tpu/bin/python tests/tpu/compile_kernels.py $(ARGS)
	.venv-tpu/bin/python tests/tpu/plan_steps.py

test-tpu: .venv-tpu/.installed-$(version)-test ## on a machine with a TPU: the kernels' tests on it, then their times
	JAX_PLATFORMS=tpu JAX_DEFAULT_MATMUL_PRECISION=highest .venv-tpu/bin/python -m pytest -n 0 -m tpu tests/kernels $(ARGS)
	JAX_PLATFORMS=tpu .venv-tpu/bin/python tests/tpu/time_kernels.py

tune-tpu: .venv-tpu/.installed-$(version) ## on a machine with a TPU: times blocks of attention and keeps the fastest
	JAX_PLATFORMS=tpu .venv-tpu/bin/python tests/tpu/tune_attention.py $(ARGS)

check: $(testing) ## lint, format, types, import contract
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports

clean: ## removes environments, caches and what the demo made
	rm -rf .venv .venv-* build dist demo demo-real .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

$(runtime): what := .
$(testing): what := .[test]
$(runtime) $(testing): setup.py pyproject.toml
	@[ "$$($(VENV)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = $(version) ] \
	    || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing -e '$(what)' into $(VENV) (log: $(VENV)/install.log)" >&2
	@$(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -e '$(what)' >>$(VENV)/install.log 2>&1 \
	    || { tail -n 20 $(VENV)/install.log >&2; exit 1; }
	@touch $@ $(runtime)

# libtpu and the launchers' tools stay out of the environment that the tests run in.
.venv-tpu/.installed-$(version): what := .[tpu]
.venv-tpu/.installed-$(version)-test: what := .[tpu,test]
.venv-launch/.installed-$(version): what := .[launch]
.venv-mutants/.installed-$(version): what := .[mutants,test]
.venv-tpu/.installed-$(version) .venv-tpu/.installed-$(version)-test .venv-launch/.installed-$(version) .venv-mutants/.installed-$(version): setup.py pyproject.toml
	@[ "$$($(@D)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = $(version) ] \
	    || $(PYTHON) -m venv --clear $(@D)
	@echo "installing -e '$(what)' into $(@D) (log: $(@D)/install.log)" >&2
	@$(@D)/bin/python -m pip install --disable-pip-version-check --progress-bar off -e '$(what)' >>$(@D)/install.log 2>&1 \
	    || { tail -n 20 $(@D)/install.log >&2; exit 1; }
	@touch $@
