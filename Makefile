# Every command of the project as a make target; options are variables. `make help` lists all.
#
#   make recipe=A1 model=resnet50          train by a recipe and store the result row
#   make test                              the test suite
#
# The first call creates .venv from requirements.lock; no other set-up is needed.

.DEFAULT_GOAL := train
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV := .venv

# ---- a user's variables go to the program as words, `recipe=A1`, which knows what each command takes (trainer/cli/words.py).
# They reach it as text: never expanded by make, quoted for the shell.
override written := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
override own := PYTHON VENV
# make would expand a $(...) in a value when it exports the variable to a command's environment: a literal value prevents that
$(foreach name,$(written),$(eval override $(name) := $$(value $(name))))

override RSB = RSB_CALLED_AS=make $(VENV)/bin/python -m trainer
override SHELL := /bin/sh
override empty :=
override space := $(empty) $(empty)
override define newline


endef
override text = $(subst ','\'',$(subst $(newline),$(space),$(1)))
override quoted = '$(call text,$(value $(1)))'
override given = $(foreach name,$(filter-out $(own) $(1),$(written)),'$(call text,$(name)=$(value $(name)))')
# targets that are not the program's: what they take is checked here
override takes = $(if $(filter-out $(own) $(1),$(written)),$(error $(firstword $(filter-out $(own) $(1),$(written)))=: $@ does not take it; $(if $(strip $(1)),valid: $(addsuffix =,$(1)),it takes none)))

override COMMANDS := train plan runs watch ablate table figure compare reproduce explain diff recipes which from-timm from-torchvision from-convnext matrix lr-find launch-slurm check-data split data parity eval predict export latency push verify doctor
override TARGETS := $(COMMANDS) test lint drill bench help setup clean
.PHONY: $(TARGETS)
# folders of these names are here: they are no targets
.PHONY: results tests ablations trainer

$(COMMANDS): $(VENV)/.ready
	@$(RSB) $@ $(call given)

# a mistyped target is one line with the right one, as a mistyped variable is
.DEFAULT:
	@$(PYTHON) -I trainer/cli/hints.py '$(call text,$@)' $(TARGETS)

results tests ablations trainer:
	@$(PYTHON) -I trainer/cli/hints.py $@ $(TARGETS)

test: $(VENV)/.ready
	@$(call takes,pytest)PYTEST_ADDOPTS="-n auto --dist worksteal "$(if $(filter pytest,$(written)),$(call quoted,pytest)) $(VENV)/bin/python -m pytest

# ruff format and check, the import contracts, mypy
lint: $(VENV)/.ready
	@$(call takes,)$(VENV)/bin/ruff format --check trainer tests
	@$(VENV)/bin/ruff check trainer tests
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/mypy

# one process more than there are cores: a fault-injection test waits half of its time
drill: $(VENV)/.ready
	@$(RSB) drill $(call given,pytest)
	@PYTEST_ADDOPTS="-n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal -m drill "$(if $(filter pytest,$(written)),$(call quoted,pytest)) $(VENV)/bin/python -m pytest

# the second part compares the loaders with timm's
bench: $(VENV)/.ready
	@$(RSB) bench $(call given)
	$(if $(filter 1,$(if $(filter gpu,$(written)),$(value gpu))),,@$(VENV)/bin/python tests/benchmarks/bench_loader.py --rounds 4 --images 640 --dry $(if $(filter src,$(written)),--src $(call quoted,src)))

setup: $(VENV)/.ready
	@$(call takes,ffcv torch index)$(check_torch)$(if $(is_cpu),! ls -d $(VENV)/lib/python*/site-packages/nvidia >/dev/null 2>&1 || \
		{ echo 'error: torch=cpu: $(VENV) has the CUDA libraries already; make clean first' >&2; exit 2; },:)
ifneq ($(filter-out 0 no false,$(value ffcv)),)
	@./setup-ffcv.sh $(VENV)/bin/python
endif

clean:
	@$(call takes,):
	rm -rf $(VENV)

# a command's own help is the program's, and needs the environment; of the other targets it is asked here
override of_command = $(if $(filter of,$(written)),$(filter $(COMMANDS) drill bench,$(value of)))
help: $(if $(of_command),$(VENV)/.ready)
	@$(call takes,of)$(if $(of_command),$(RSB) $(call quoted,of) --help,$(PYTHON) -I trainer/cli/hints.py $(if $(filter of,$(written)),--of $(call quoted,of) $(TARGETS)))

# uv leaves bytecode to the first import; importing what a run imports once costs a third of compiling everything
warm := import timm, matplotlib.figure, sklearn.datasets, torchvision, torch.utils.tensorboard, torch.utils.flop_counter, trainer.cli.main, trainer.cli.run_commands

# torch=cpu: the lock without torch and its CUDA libraries, its hashes required; then torch and torchvision of the lock's versions
# from an index of CPU wheels, without hashes: the lock's are of other files
override is_cpu := $(filter torch,$(written))
override index_words = $(if $(filter index,$(written)),--index-url $(call quoted,index))
override check_torch = $(if $(is_cpu),$(if $(filter cpu,$(value torch)),$(if $(index_words),,$(error torch=cpu: needs index=<URL of torch CPU wheels>, which torch's own page on installing it shows for CPU: make setup torch=cpu index=...)),$(error torch=$(value torch): valid: cpu)))
override locked := $(VENV)/installed.lock
override pinned = $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[0-9.]*\).*/\1/p' requirements.lock)

# ---- set-up: uv where it is (or installed into the venv first), else pip alone; the lock's hashes are required
ifneq ($(shell test -L '$(call text,$(VENV))' && echo link),)
# a link is to an environment of somebody else's making: used as it is, never written to
$(VENV)/.ready:
	@test -x $(VENV)/bin/python || \
		{ echo 'error: $(VENV) is a link to a place without bin/python; remove it, and make builds one here' >&2; exit 2; }
else
$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'error: python3 is missing or older than 3.11; install one, or name it: make PYTHON=python3.12 ...' >&2; exit 2; }
	@$(check_torch)echo 'creating $(VENV) (once; again when pyproject.toml or requirements.lock changes)' >&2
	@echo '$(if $(is_cpu),about 2.5 GB on disk,about 7 GB on disk, 4 of them CUDA libraries: make setup torch=cpu index=<URL> does without); minutes, as fast as the network is' >&2
	@$(PYTHON) -m venv $(VENV)
	@$(if $(is_cpu),awk '/^[a-z]/ { out = /^(torch|torchvision|triton|nvidia-|cuda-)/ } !out',cat) requirements.lock >$(locked)
	@set -e; \
	if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then uv=uv; \
	elif $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then uv=$(VENV)/bin/uv; \
	else uv=; fi; \
	if [ -n "$$uv" ]; then \
		"$$uv" pip install --python $(VENV)/bin/python --no-deps --require-hashes -r $(locked); \
		$(if $(is_cpu),"$$uv" pip install --python $(VENV)/bin/python --no-deps $(index_words) $(pinned);) \
		"$$uv" pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation -e .; \
		env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -c '$(warm)'; \
	else \
		$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r $(locked); \
		$(if $(is_cpu),$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps $(index_words) $(pinned);) \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@touch $(VENV)/.ready
endif
