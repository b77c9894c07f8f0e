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
# make would expand a $(...) in a value when it exports the variable to a command's environment: plain text forestalls it
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

plan: $(VENV)/.ready  ## what a run or an ablation would do, without doing it (recipe model data data_dir seed set, or ablation measure data_dir device precision workers results)
	@$(RSB) plan $(call flags,recipe model data data_dir seed set ablation measure device precision workers results)

ablate: $(VENV)/.ready  ## run the cells of an ablation that have no row yet (ablation jobs gpus retries fail_fast on address per_cell data_dir device precision workers checkpoint_s runs results plugins)
	@$(RSB) ablate $(call flags,ablation jobs gpus retries on address per_cell data_dir device precision workers checkpoint_s runs results) $(fail_fast_flag)

table: $(VENV)/.ready  ## an ablation's table from its rows, in results/<ablation>.md .csv .tex .html too; without one: all, with what they have (ablation metric sort columns filter format runs results)
	@$(RSB) table $(call flags,ablation metric sort columns filter format runs results)

compare: $(VENV)/.ready  ## two runs side by side: where their rows differ, and both learning curves (a b runs results)
	@$(RSB) compare $(call flags,a b runs results)

reproduce: $(VENV)/.ready  ## run a row again from its own record: the same bits, within the seed spread, or different (row recipe data data_dir device precision workers runs results anyway)
	@$(RSB) reproduce $(call flags,row recipe data data_dir device precision workers runs results) $(anyway_flag)

explain: $(VENV)/.ready  ## every value of a page and where it came from (recipe model data data_dir set)
	@$(RSB) explain $(call flags,recipe model data data_dir set)

diff: $(VENV)/.ready  ## what two pages say differently (a b)
	@$(RSB) diff $(call flags,a b)

recipes: $(VENV)/.ready  ## the pages there are
	@$(RSB) recipes $(call flags,)

matrix: $(VENV)/.ready  ## one real step of every page on every family of models, or the reason why not (models recipes results)
	@$(RSB) matrix $(call flags,models recipes results)

lr-find: $(VENV)/.ready  ## find the learning rate, or another number of the page, on the recipe's own road (recipe model data data_dir set seeds from to steps ramp curve device gpus procs precision workers runs results again)
	@$(RSB) lr-find $(call flags,recipe model data data_dir set seeds from to steps ramp curve device gpus procs precision workers runs results) $(again_flag)

launch-slurm: $(VENV)/.ready  ## write a job file for sbatch that trains by a recipe (nodes gpus cpus hours sbatch job, and what make train takes)
	@$(RSB) launch-slurm $(call flags,nodes gpus cpus hours sbatch job $(filter-out gpus procs,$(TRAIN_VARIABLES))) $(again_flag)

check-data: $(VENV)/.ready  ## decode every image of a data set, list the bad and the odd (data data_dir workers)
	@$(RSB) check-data $(call flags,data data_dir workers)

data: $(VENV)/.ready  ## write the .beton files that loader=ffcv reads, from a data set or an image folder (data src out max_side jpeg_share quality workers)
	@$(RSB) data $(call flags,data src out max_side jpeg_share quality workers)

parity: $(VENV)/.ready  ## the torch loader against ffcv on the same images: order, boxes, pixels, top-1; a certificate (data data_dir src recipe seed set images run runs results)
	@$(RSB) parity $(call flags,data data_dir src recipe seed set images run runs results)

eval: $(VENV)/.ready  ## score a run's exported model again (run device precision workers data_dir runs results)
	@$(RSB) eval $(call flags,run device precision workers data_dir runs results)

verify: $(VENV)/.ready  ## check a run folder: checksums, plan, row, store, curves, weights, and its score once more (run evaluate device precision workers data_dir runs results)
	@$(RSB) verify $(call flags,run device precision workers data_dir runs results) $(evaluate_flag)

doctor: $(VENV)/.ready  ## does this machine train? Packages, GPUs, disk, a step on each device, and what mends what is missing (runs results)
	@$(RSB) doctor $(call flags,runs results)

test: $(VENV)/.ready  ## the test suite (pytest="flags for pytest")
	@PYTEST_ADDOPTS="-n auto --dist worksteal "$(if $(filter pytest,$(written)),$(call quoted,pytest)) $(VENV)/bin/python -m pytest

lint: $(VENV)/.ready  ## ruff format and check, the import contracts, mypy
	@$(VENV)/bin/ruff format --check trainer tests
	@$(VENV)/bin/ruff check trainer tests
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/mypy

# one process more than there are cores: a drill waits for half of its time
drill: $(VENV)/.ready  ## every fault of inject= on the digits, in a table; then the tests that kill, lose and take up processes for minutes (pytest="flags for pytest")
	@$(RSB) drill
	@PYTEST_ADDOPTS="-n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal -m drill "$(if $(filter pytest,$(written)),$(call quoted,pytest)) $(VENV)/bin/python -m pytest

bench: $(VENV)/.ready  ## what each part of a run could do alone and what holds it up; then the loader, or on a GPU the whole loop, beside timm's (recipe model data data_dir src set device gpu precision workers loader rounds results)
	@$(RSB) bench $(call flags,recipe model data data_dir src set device gpu precision workers loader rounds results)
	$(if $(filter 1,$(if $(filter gpu,$(written)),$(value gpu))),,@$(VENV)/bin/python tests/benchmarks/bench_loader.py --rounds 4 --images 640 --dry $(if $(filter src,$(written)),--src $(call quoted,src)))

setup: $(VENV)/.ready  ## make or renew .venv (every other target does so by itself); ffcv=1: with the loader that is built here (ffcv)
ifneq ($(filter-out 0 no false,$(value ffcv)),)
	@./setup-ffcv.sh $(VENV)/bin/python
endif

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
#: data digits (default), fashion-mnist, mnist (each also as <name>-grey, one channel), cifar10, cifar100, imagenet-1k, an image folder, a folder of tar shards, parquet or `datasets`, a profile's .yaml
#: data_dir where the data set lies, or is downloaded to
#: seed which repeat this is; default 0
#: set departures from the page, each recorded: set="epochs=5 loss.name=ce"
#: device auto (default), cpu, cuda, cuda:N
#: precision auto (bf16 on a GPU, float32 on the CPU), float32, bf16, fp16
#: workers loader processes, auto or a number; never changes a result
#: loader who reads images: auto (ffcv where it is installed and lossless .beton files lie there, else torch), torch, pil (torch with every JPEG file decoded whole by PIL), ffcv (see make data)
#: bad_images fail (default) or skip: take another image by a fixed rule, counted, at most 1 %
#: checkpoint_s least seconds between two checkpoints; default 60
#: keep_every epochs between two checkpoints that stay: keep_every=50; default 0: only the last two do
#: runs folder of the run folders; default runs
#: results the store of rows; default results
#: plugins Python files with components of your own, in every command that reads a page: plugins=my_losses.py,my_norms.py
#: again again=1 makes a new run where the row is there already
#: nodes,cpus,hours of make launch-slurm: machines, cores of each rank, the job's time; default 1, 8, 24
#: sbatch further words for sbatch: sbatch="--partition=big"; job is the file to write, default job.sh
#: metric of make table: top1 (default), top5, loss, ema (top-1 of the average)
#: sort,columns,filter of make table: sort="-mean cell" columns="cell n mean difference" filter="mean > 90 and n >= 3"
#: format of make table: terminal (default), md, csv or tex, printed alone
#: row a run's name, for make reproduce; anyway=1 runs it though page, data or versions are others now
#: a,b the two pages of make diff, or the two runs of make compare
#: run a run's name, or its folder, for make eval and make verify; evaluate=0: without scoring it once more
#: models,recipes some of make matrix's: models="resnet18 convnext_atto" recipes="A1 A2"
#: ablation a page of ablations/: norm-micro-batch, or a path to a .yaml; for make plan, make ablate and make table
#: measure of make plan ablation=: steps to time for the estimate, at most; default 20, 0 for none
#: seeds repeats of make lr-find, each with its own first weights; default 3
#: from,to the range of make lr-find; default 1e-6 to 10 for the learning rate
#: steps of a ramp of make lr-find; default 200, fewer where the run is short
#: ramp of make lr-find: exponential (default) or linear for the learning rate, or any other number: weight_decay, optimizer.momentum
#: curve what make lr-find reads: train, heldout or both
#: jobs of make ablate: runs at a time; absent: one for each GPU, one without GPUs, what fits on a cluster
#: gpus ranks, each on a GPU of its own: gpus=4; of make ablate: how many to use, one for each run; absent: all
#: procs ranks on the CPU: procs=2
#: micro_batch page (default), or auto: where memory runs out, the same step again in smaller pieces
#: compile 1: the model's passes as compiled code (torch.compile), the same result to rounding; default 0
#: activation_checkpointing 1: activations are made again in the backward pass; less memory, the same result; default 0
#: inject faults on purpose: inject=kill@37,nan@50,oom@12,enospc@80,slow@5:3s,bad_image@100,term@20,raise@9
#: retries of make ablate: how often this call tries again what failed; default 0: the next call does
#: fail_fast fail_fast=1: make ablate stops at the first failure
#: on here (default) or ray: where make ablate runs
#: address of the Ray cluster: auto (default), a URL, or local for one made here
#: per_cell each run's share of the cluster: per_cell="cpus=4 gpus=1 memory_gib=8"
#: src where the images lie (make data, make parity); a folder or a tar of JPEG files to measure on (make bench)
#: out of make data: the folder of the .beton files
#: max_side,jpeg_share,quality of make data: shrink longer sides to so many px; the share stored as JPEG, of that quality
#: images of make parity: how many to compare, at least; default 2048
#: ffcv of make setup: ffcv=1 builds ffcv into .venv, or says what its build lacks
#: gpu,rounds of make bench: gpu=1 measures on a GPU, beside timm's parts; rounds of each part, at most, default 8
#: pytest flags for make test

# uv leaves bytecode to the first import; importing what a run imports once costs a third of compiling everything
warm := import timm, matplotlib.figure, sklearn.datasets, torchvision, torch.utils.tensorboard, torch.utils.flop_counter, trainer.cli.main, trainer.runs.job, trainer.runs.summary, trainer.engine.train, trainer.runs.export

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
