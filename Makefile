# The front door: variables in, one command out. `make help` lists everything.
#
#   make recipe=A1 model=resnet50          train by a page and store the result row
#   make test                              the test suite
#
# The first call makes .venv from requirements.lock; no second command is ever needed before another.

.DEFAULT_GOAL := train
.DELETE_ON_ERROR:
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
RSB := $(VENV)/bin/python -m trainer

TRAIN_VARIABLES := recipe model data data_dir seed set device precision workers loader bad_images checkpoint_s runs results again
VARIABLES := $(TRAIN_VARIABLES) a b run models recipes pytest

# ---- variables reach the program as text: never expanded by make, quoted for the shell, unknown names refused
written := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
unknown := $(filter-out $(VARIABLES) PYTHON VENV,$(written))
ifneq ($(unknown),)
$(error $(firstword $(unknown))=: no such variable; there are $(VARIABLES) (make help))
endif
# make would expand a $(...) in a value when it exports the variable to a command's environment: plain text forestalls it
$(foreach name,$(written),$(eval override $(name) := $$(value $(name))))

empty :=
space := $(empty) $(empty)
define newline


endef
quoted = '$(subst $(newline),$(space),$(subst ','\'',$(value $(1))))'
flags = $(foreach name,$(filter $(filter-out again,$(1)),$(written)),--$(subst _,-,$(name)) $(call quoted,$(name)))
again_flag = $(if $(filter again,$(written)),$(if $(filter-out 0 no false,$(value again)),--again))

.PHONY: train plan explain diff recipes matrix check-data eval test bench help setup clean

# a mistyped target is one line with the nearest name, as a mistyped variable is
nearest = import difflib, sys; near = difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1); print(f"did you mean {near[0]}?" if near else "there are " + " ".join(sys.argv[2:]))
.DEFAULT:
	$(error $@: no such target; $(shell $(PYTHON) -c '$(nearest)' '$(subst ','\'',$@)' $$(sed -n 's/^.PHONY: //p' $(firstword $(MAKEFILE_LIST)))) (make help))

train: $(VENV)/.ready  ## train a model by a recipe, store its row (recipe model data data_dir seed set device precision workers loader bad_images checkpoint_s runs results again)
	@$(RSB) train $(call flags,$(TRAIN_VARIABLES)) $(again_flag)

plan: $(VENV)/.ready  ## what a run would do, without doing it (recipe model data data_dir seed set)
	@$(RSB) plan $(call flags,recipe model data data_dir seed set)

explain: $(VENV)/.ready  ## every value of a page and where it came from (recipe model data data_dir set)
	@$(RSB) explain $(call flags,recipe model data data_dir set)

diff: $(VENV)/.ready  ## what two pages say differently (a b)
	@$(RSB) diff $(call flags,a b)

recipes: $(VENV)/.ready  ## the pages there are
	@$(RSB) recipes

matrix: $(VENV)/.ready  ## one real step of every page on every family of models, or the reason why not (models recipes results)
	@$(RSB) matrix $(call flags,models recipes results)

check-data: $(VENV)/.ready  ## decode every image of a data set, list the bad and the odd (data data_dir workers)
	@$(RSB) check-data $(call flags,data data_dir workers)

eval: $(VENV)/.ready  ## score a run's exported model again (run device precision workers data_dir runs results)
	@$(RSB) eval $(call flags,run device precision workers data_dir runs results)

test: $(VENV)/.ready  ## the test suite (pytest="flags for pytest")
	@$(VENV)/bin/python -m pytest -n auto --dist worksteal $(if $(filter pytest,$(written)),$(value pytest))

bench: $(VENV)/.ready  ## the benchmarks of tests/benchmarks, one after the other
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(VENV)/bin/python $$script || exit 1; done

setup: $(VENV)/.ready  ## make or renew .venv (every other target does so by itself)

clean:  ## remove .venv; runs and results stay
	rm -rf $(VENV)

help:  ## this list
	@echo 'targets (make without one trains):'
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  \1 \2/p' Makefile | while read -r name text; do printf '  %-11s %s\n' "$$name" "$$text"; done
	@echo
	@echo 'variables, as in: make recipe=A1 model=resnet50 set="epochs=5 loss.name=ce"'
	@sed -n 's/^#: \([a-z_,]*\) \(.*\)/\1 \2/p' Makefile | while read -r name text; do printf '  %-11s %s\n' "$$name" "$$text"; done

#: recipe a page: A1 (newest version), A1.v1, or a path to a .yaml; default A1
#: model any timm ResNet or ConvNeXt; default resnet50
#: data digits (default), fashion-mnist, mnist (each also as <name>-grey, one channel), cifar10, cifar100, imagenet-1k, an image folder, a profile's .yaml
#: data_dir where the data set lies, or is downloaded to
#: seed which repeat this is; default 0
#: set departures from the page, each recorded: set="epochs=5 loss.name=ce"
#: device auto (default), cpu, cuda, cuda:N
#: precision auto (bf16 on a GPU, float32 on the CPU), float32, bf16, fp16
#: workers loader processes, auto or a number; never changes a result
#: loader who reads images: auto or torch
#: bad_images fail (default) or skip: take another image by a fixed rule, counted, at most 1 %
#: checkpoint_s least seconds between two checkpoints; default 60
#: runs folder of the run folders; default runs
#: results the store of rows; default results
#: again again=1 makes a new run where the row is there already
#: a,b the two pages of make diff
#: run a run's name, for make eval
#: models,recipes some of make matrix's: models="resnet18 convnext_atto" recipes="A1 A2"
#: pytest flags for make test

# uv leaves bytecode to the first import; importing what a run imports once costs a third of compiling everything
warm := import timm, matplotlib.figure, sklearn.datasets, torchvision, torch.utils.tensorboard, torch.utils.flop_counter, trainer.cli, trainer.job, trainer.show, trainer.train, trainer.export

# ---- set-up: uv where it is (or installed into the venv first), else pip alone; the lock's hashes are required
$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'error: python3 is missing or older than 3.11; install one, or name it: make PYTHON=python3.12 ...' >&2; exit 2; }
	@echo 'making $(VENV) (once; again when pyproject.toml or requirements.lock changes)' >&2
	@$(PYTHON) -m venv $(VENV)
	@set -e; \
	if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then uv=uv; \
	elif $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then uv=$(VENV)/bin/uv; \
	else uv=; fi; \
	if [ -n "$$uv" ]; then \
		"$$uv" pip install --quiet --python $(VENV)/bin/python --require-hashes -r requirements.lock; \
		"$$uv" pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation -e .; \
		env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -c '$(warm)'; \
	else \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@touch $(VENV)/.ready
