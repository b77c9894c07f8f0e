# Every command of the project as a make target; options are variables. `make help` lists all.
#
#   make recipe=A1 model=resnet50          train by a recipe and store the result row
#   make test                              the test suite
#
# The first call creates .venv from requirements.lock; no other set-up is needed.

.DEFAULT_GOAL := train
.DELETE_ON_ERROR:
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
RSB := $(VENV)/bin/python -m trainer

TRAIN_VARIABLES := recipe model data data_dir seed set device precision workers loader bad_images checkpoint_s runs results again gpus procs micro_batch activation_checkpointing compile inject keep_every
VARIABLES := $(TRAIN_VARIABLES) plugins nodes cpus hours sbatch job a b run models recipes ablation measure jobs retries fail_fast on address per_cell seeds from to steps ramp curve metric sort columns filter format row anyway evaluate src out max_side jpeg_share quality images ffcv pytest gpu rounds

# ---- variables reach the program as text: never expanded by make, quoted for the shell, unknown names refused
written := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
unknown := $(filter-out $(VARIABLES) PYTHON VENV,$(written))
override nearest = import difflib, sys; near = difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1); print(f"did you mean {near[0]}?" if near else "there are " + " ".join(sys.argv[2:]))
ifneq ($(unknown),)
override first := $(firstword $(unknown))
$(error $(first)=: no such variable; $(shell $(PYTHON) -c '$(nearest)' '$(subst ','\'',$(first))' $(VARIABLES)) (make help))
endif
# make would expand a $(...) in a value when it exports the variable to a command's environment: a literal value prevents that
$(foreach name,$(written),$(eval override $(name) := $$(value $(name))))

empty :=
space := $(empty) $(empty)
define newline


endef
quoted = '$(subst $(newline),$(space),$(subst ','\'',$(value $(1))))'
flags = $(foreach name,$(filter $(filter-out again,$(1)) plugins,$(written)),--$(subst _,-,$(name)) $(call quoted,$(name)))
fail_fast_flag = $(if $(filter fail_fast,$(written)),$(if $(filter-out 0 no false,$(value fail_fast)),--fail-fast))
anyway_flag = $(if $(filter anyway,$(written)),$(if $(filter-out 0 no false,$(value anyway)),--anyway))
evaluate_flag = $(if $(filter evaluate,$(written)),$(if $(filter-out 0 no false,$(value evaluate)),--evaluate,--no-evaluate))
again_flag = $(if $(filter again,$(written)),$(if $(filter-out 0 no false,$(value again)),--again))

.PHONY: train plan ablate table compare reproduce explain diff recipes matrix lr-find launch-slurm check-data data parity eval verify doctor test lint drill bench help setup clean

# a mistyped target is one line with the nearest name, as a mistyped variable is
.DEFAULT:
	$(error $@: no such target; $(shell $(PYTHON) -c '$(nearest)' '$(subst ','\'',$@)' $$(sed -n 's/^.PHONY: //p' $(firstword $(MAKEFILE_LIST)))) (make help))

train: $(VENV)/.ready  ## train a model by a recipe, store its row (recipe model data data_dir seed set device precision workers loader bad_images checkpoint_s runs results again gpus procs micro_batch activation_checkpointing compile inject keep_every)
	@$(RSB) train $(call flags,$(TRAIN_VARIABLES)) $(again_flag)

plan: $(VENV)/.ready  ## the plan of a run or an ablation, without running it (recipe model data data_dir seed set, or ablation measure data_dir device precision workers results)
	@$(RSB) plan $(call flags,recipe model data data_dir seed set ablation measure device precision workers results)

ablate: $(VENV)/.ready  ## run the cells of an ablation that have no row yet (ablation jobs gpus retries fail_fast on address per_cell data_dir device precision workers checkpoint_s runs results plugins)
	@$(RSB) ablate $(call flags,ablation jobs gpus retries on address per_cell data_dir device precision workers checkpoint_s runs results) $(fail_fast_flag)

table: $(VENV)/.ready  ## an ablation's table from its rows, also as results/<ablation>.md .csv .tex .html; without one: all ablations and their number of rows (ablation metric sort columns filter format runs results)
	@$(RSB) table $(call flags,ablation metric sort columns filter format runs results)

compare: $(VENV)/.ready  ## compare two runs: where their rows differ, and both learning curves (a b runs results)
	@$(RSB) compare $(call flags,a b runs results)

reproduce: $(VENV)/.ready  ## run a stored row again: bit for bit the same, within the spread of seeds, or different (row recipe data data_dir device precision workers runs results anyway)
	@$(RSB) reproduce $(call flags,row recipe data data_dir device precision workers runs results) $(anyway_flag)

explain: $(VENV)/.ready  ## every value of a recipe and where it comes from (recipe model data data_dir set)
	@$(RSB) explain $(call flags,recipe model data data_dir set)

diff: $(VENV)/.ready  ## the values in which two recipes differ (a b)
	@$(RSB) diff $(call flags,a b)

recipes: $(VENV)/.ready  ## list the recipes
	@$(RSB) recipes $(call flags,)

matrix: $(VENV)/.ready  ## compatibility matrix: one optimizer step of every recipe on every model family, or the reason why not (models recipes results)
	@$(RSB) matrix $(call flags,models recipes results)

lr-find: $(VENV)/.ready  ## learning-rate range test, or of another hyperparameter, with the recipe's own training code (recipe model data data_dir set seeds from to steps ramp curve device gpus procs precision workers runs results again)
	@$(RSB) lr-find $(call flags,recipe model data data_dir set seeds from to steps ramp curve device gpus procs precision workers runs results) $(again_flag)

launch-slurm: $(VENV)/.ready  ## write a Slurm job file that trains by a recipe (nodes gpus cpus hours sbatch job, and those of make train)
	@$(RSB) launch-slurm $(call flags,nodes gpus cpus hours sbatch job $(filter-out gpus procs,$(TRAIN_VARIABLES))) $(again_flag)

check-data: $(VENV)/.ready  ## decode every image of a data set, list unreadable and unusual ones (data data_dir workers)
	@$(RSB) check-data $(call flags,data data_dir workers)

data: $(VENV)/.ready  ## write the .beton files of loader=ffcv from a data set or an image folder (data src out max_side jpeg_share quality workers)
	@$(RSB) data $(call flags,data src out max_side jpeg_share quality workers)

parity: $(VENV)/.ready  ## loader equivalence: torch's loader against ffcv by order, crop boxes, pixels, top-1; a certificate (data data_dir src recipe seed set images run runs results)
	@$(RSB) parity $(call flags,data data_dir src recipe seed set images run runs results)

eval: $(VENV)/.ready  ## evaluate a run's exported model again (run device precision workers data_dir runs results)
	@$(RSB) eval $(call flags,run device precision workers data_dir runs results)

verify: $(VENV)/.ready  ## check a run folder: checksums, plan, row, store, curves, weights, score (run evaluate device precision workers data_dir runs results)
	@$(RSB) verify $(call flags,run device precision workers data_dir runs results) $(evaluate_flag)

doctor: $(VENV)/.ready  ## diagnose this machine: packages, GPUs, disk, an optimizer step on each device, with remedies (runs results)
	@$(RSB) doctor $(call flags,runs results)

test: $(VENV)/.ready  ## the test suite (pytest="flags for pytest")
	@PYTEST_ADDOPTS="-n auto --dist worksteal "$(if $(filter pytest,$(written)),$(call quoted,pytest)) $(VENV)/bin/python -m pytest

lint: $(VENV)/.ready  ## ruff format and check, the import contracts, mypy
	@$(VENV)/bin/ruff format --check trainer tests
	@$(VENV)/bin/ruff check trainer tests
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/mypy

# one process more than there are cores: a fault-injection test waits half of its time
drill: $(VENV)/.ready  ## fault-injection tests: every fault of inject= on digits, in a table; then the tests that kill and resume processes, for minutes (pytest="flags for pytest")
	@$(RSB) drill
	@PYTEST_ADDOPTS="-n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal -m drill "$(if $(filter pytest,$(written)),$(call quoted,pytest)) $(VENV)/bin/python -m pytest

bench: $(VENV)/.ready  ## benchmark each part of a run and find the bottleneck; then compare the loader, or on a GPU the whole loop, with timm's (recipe model data data_dir src set device gpu precision workers loader rounds results)
	@$(RSB) bench $(call flags,recipe model data data_dir src set device gpu precision workers loader rounds results)
	$(if $(filter 1,$(if $(filter gpu,$(written)),$(value gpu))),,@$(VENV)/bin/python tests/benchmarks/bench_loader.py --rounds 4 --images 640 --dry $(if $(filter src,$(written)),--src $(call quoted,src)))

setup: $(VENV)/.ready  ## create or update .venv (every other target does so by itself); ffcv=1: build ffcv into it (ffcv)
ifneq ($(filter-out 0 no false,$(value ffcv)),)
	@./setup-ffcv.sh $(VENV)/bin/python
endif

clean:  ## remove .venv, keep runs and results
	rm -rf $(VENV)

help:  ## this list
	@echo 'targets (make without one trains):'
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  \1 \2/p' Makefile | while read -r name text; do printf '  %-11s %s\n' "$$name" "$$text"; done
	@echo
	@echo 'variables, as in: make recipe=A1 model=resnet50 set="epochs=5 loss.name=ce"'
	@sed -n 's/^#: \([a-z_,]*\) \(.*\)/\1 \2/p' Makefile | while read -r name text; do printf '  %-11s %s\n' "$$name" "$$text"; done

#: recipe A1 (its newest version), A1.v1, or a path to a .yaml; default A1
#: model any timm ResNet or ConvNeXt; default resnet50
#: data digits (default), fashion-mnist, mnist (each also as <name>-grey, one channel), cifar10, cifar100, imagenet-1k, an image folder, a folder of tar shards, parquet or `datasets`, a profile's .yaml
#: data_dir folder of the data set, or to download it to
#: seed random seed: which repeat this is; default 0
#: set overrides of the recipe, each recorded: set="epochs=5 loss.name=ce"
#: device auto (default), cpu, cuda, cuda:N
#: precision auto (bf16 on a GPU, float32 on the CPU), float32, bf16, fp16
#: workers dataloader processes, auto or a number; never changes a result
#: loader dataloader: auto (ffcv where it is installed and there are lossless .beton files, else torch), torch, pil (torch, with every JPEG file decoded in full by PIL), ffcv (see make data)
#: bad_images fail (default) or skip: replace unreadable images by others, counted, at most 1 %
#: checkpoint_s least seconds between two checkpoints; default 60
#: keep_every epochs between two checkpoints to keep: keep_every=50; default 0: keep only the last two
#: runs folder of the run folders; default runs
#: results folder of the stored rows; default results
#: plugins Python files with components of your own, in every command that reads a recipe: plugins=my_losses.py,my_norms.py
#: again again=1 starts a new run where the row exists already
#: nodes,cpus,hours of make launch-slurm: nodes, CPU cores per rank, time limit; default 1, 8, 24
#: sbatch more sbatch options: sbatch="--partition=big"; job is the job file, default job.sh
#: metric of make table: top1 (default), top5, loss, ema (top-1 of the averaged weights)
#: sort,columns,filter of make table: sort="-mean cell" columns="cell n mean difference" filter="mean > 90 and n >= 3"
#: format of make table: terminal (default), md, csv or tex, printed alone
#: row a run's name, for make reproduce; anyway=1 runs it although recipe, data or versions have changed
#: a,b the two recipes of make diff, or the two runs of make compare
#: run a run's name, or its folder, for make eval and make verify; evaluate=0: verify without an evaluation
#: models,recipes of make matrix, default all: models="resnet18 convnext_atto" recipes="A1 A2"
#: ablation a name in ablations/: norm-micro-batch, or a path to a .yaml; for make plan, make ablate and make table
#: measure of make plan ablation=: most steps to time for the estimate; default 20, 0 for none
#: seeds of make lr-find: number of repeats, each with its own seed; default 3
#: from,to the range of make lr-find; default 1e-6 to 10 for the learning rate
#: steps of a ramp of make lr-find; default 200, fewer where the run is short
#: ramp of make lr-find: exponential (default) or linear for the learning rate, or any other hyperparameter: weight_decay, optimizer.momentum
#: curve of make lr-find, the loss to analyse: train, heldout or both
#: jobs of make ablate: runs at a time; default: one per GPU, one without GPUs, on Ray what fits
#: gpus number of ranks, one GPU each: gpus=4; of make ablate: GPUs to use, one for each run, default all
#: procs number of ranks on the CPU: procs=2
#: micro_batch page (default: the recipe's batch.norm_images), or auto: on out-of-memory retry the step in smaller micro-batches
#: compile 1: compile the model (torch.compile), same result up to rounding; default 0
#: activation_checkpointing 1: recompute activations in the backward pass; less memory, same result; default 0
#: inject fault injection: inject=kill@37,nan@50,oom@12,enospc@80,slow@5:3s,bad_image@100,term@20,raise@9
#: retries of make ablate: how often this call retries a failed run; default 0: the next call does
#: fail_fast fail_fast=1: make ablate stops at the first failure
#: on backend of make ablate: here (default) or ray
#: address of the Ray cluster: auto (default), a URL, or local to start one here
#: per_cell Ray resources of each run: per_cell="cpus=4 gpus=1 memory_gib=8"
#: src folder of the source images (make data, make parity); a folder or a tar of JPEG files (make bench)
#: out of make data: folder for the .beton files
#: max_side,jpeg_share,quality of make data: shrink longer sides to this many px; share of images to store as JPEG, and their quality
#: images of make parity: least number of images to compare; default 2048
#: ffcv of make setup: ffcv=1 builds ffcv into .venv, or says what its build lacks
#: gpu,rounds of make bench: gpu=1 measures on a GPU, against timm's parts; most rounds of each part, default 8
#: pytest flags for make test

# uv leaves bytecode to the first import; importing what a run imports once costs a third of compiling everything
warm := import timm, matplotlib.figure, sklearn.datasets, torchvision, torch.utils.tensorboard, torch.utils.flop_counter, trainer.cli.main, trainer.cli.run_commands

# ---- set-up: uv where it is (or installed into the venv first), else pip alone; the lock's hashes are required
$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'error: python3 is missing or older than 3.11; install one, or name it: make PYTHON=python3.12 ...' >&2; exit 2; }
	@echo 'creating $(VENV) (once; again when pyproject.toml or requirements.lock changes)' >&2
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
