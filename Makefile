# Make orders set-up, stages and reports. Whether a stage is up to date is its manifest's business, so stages are phony here.
PYTHON ?= python3
VENV ?= .venv
OPTIONS := PROFILE DATA RUN PROTOCOL STYLE CAPS SEED CODES KNOWLEDGE TEACHER MODEL TEMPLATE WORKERS CLUSTER YES
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env reproduce hospital trajectories index samples knowledge graphs chains baselines base adapt reason reinforce answers scores benchmarks ehrmind meds keep evaluate html reports test lab docs notebooks export readme lock hooks clean

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/installed
# what was installed stays: only EXTRA= on the command line changes it
EXTRA := $(shell head -n 1 $(STAMP) 2>/dev/null | grep -x -e gpu -e log)
export PATH := $(BIN):$(PATH)
# name=value words for the command line, from the variables that are set; SET adds any other profile field as it stands
lower = $(shell echo $1 | tr A-Z a-z)
given = $(findstring command line,$(origin $1))
words = $(foreach v,$(OPTIONS),$(if $(call given,$v),$(call lower,$v)='$($v)')) $(SET)
# a setting comes from the command line alone, and one that there is not stops
UNKNOWN := $(filter-out $(OPTIONS) SET EXTRA PYTHON VENV NB,$(foreach v,$(.VARIABLES),$(if $(call given,$v),$v)))
$(if $(UNKNOWN),$(error no setting $(UNKNOWN); there are $(OPTIONS), and SET="name=value ..." for the fields of a profile))
stage = $(BIN)/ehr_r1 $@ $(words)

help: ## this list
	@echo 'make TARGET [NAME=value ...], NAME one of: $(OPTIONS)'
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-14s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

reproduce: env ## everything: set-up, stages, reports (PROFILE=smoke|demo|study|paper, DATA=folder with MIMIC-IV)
	$(stage)

env: ## Python environment in .venv, exactly as requirements.lock says (PYTHON=python3.12 takes another Python; EXTRA=gpu: for GPUs, EXTRA=log: with TensorBoard and W&B)
	@{ echo '$(EXTRA)'; cat requirements*.lock pyproject.toml; } | cmp -s - $(STAMP) || { set -e; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ehr_r1 needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name one: make PYTHON=/path/to/python3.12"; exit 1; }; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV); \
	EXTRA='$(EXTRA)' $(BIN)/python .ci/install.py; \
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .; \
	{ echo '$(EXTRA)'; cat requirements*.lock pyproject.toml; } > $(STAMP); }

hospital: env ## stage 1: the synthetic hospital (not needed with DATA)
	$(stage)
trajectories: $(if $(DATA),env,hospital) ## stage 2: tables to patient trajectories
	$(stage)
index: trajectories ## stage 3: every trigger of the 45 tasks, with labels
	$(stage)
samples: index ## stage 4: EHR-Ins and EHR-Bench
	$(stage)
knowledge: samples ## stage 5: medical knowledge, compiled (KNOWLEDGE=folder of UMLS or open files; the hospital brings its own)
	$(stage)
graphs: knowledge ## stage 6: thinking graphs of the decision samples
	$(stage)
chains: graphs ## stage 7: reasoning chains, written by TEACHER and filtered
	$(stage)
baselines: chains ## stage 8: predictions of the systems that need no language model
	$(stage)
base: baselines ## stage 9: the base model, trained from scratch on records (MODEL=small, ...) or a checkpoint (MODEL=folder or name)
	$(stage)
adapt: base ## stage 10: domain adaptation, EHR-R1's first training stage
	$(stage)
reason: adapt ## stage 11: reasoning enhancement, its second
	$(stage)
reinforce: reason ## stage 12: reinforcement learning, its third
	$(stage)
answers: reinforce ## stage 13: every model asked
	$(stage)
scores: answers ## stage 14: F1, AUROC, AUPRC, Brier with intervals
	$(stage)
benchmarks: scores ## stage 15: EHRSHOT, MIMIC-IV-CDM, MedCalc-Bench, trial matching (EHR_R1_EHRSHOT=folder, ...)
	$(stage)
ehrmind: benchmarks ## stage 16: EHRMind's recipe and its pilot study
	$(stage)
reports: ehrmind ## stage 17: report notebooks, tables and figures
	$(stage)
meds: samples ## apart from these: trajectories and labels as a MEDS data set
	$(stage)
keep: base ## and: the base of a run on the synthetic hospital into the repository (PROFILE=pretraining), for MODEL=kept
	$(stage)
evaluate: env ## and: any other model asked what a run's models are asked (MODEL=folder, .gguf, name or server; SET='name=... bench=...')
	$(stage)

html: env ## each report of a run as one HTML file that can be mailed
	$(stage)

test: env ## notebooks, tests, library and notebooks in step, smoke profile end to end
	$(BIN)/python .ci/test.py

lab: env ## JupyterLab on the whole repository, open at its first page
	$(BIN)/jupyter lab --notebook-dir=. nbs/index.ipynb

docs: env ## site of notebooks, API and executed reports, into _docs/
	$(BIN)/python docs/pages.py

notebooks: env ## re-execute and clean the notebooks, export the library, write README.md (NB=nbs/x.ipynb for one)
	$(BIN)/nbdev_export
	$(BIN)/python .ci/execute.py $(NB)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python docs/readme.py

export: env ## clean the notebooks, export the library, write README.md, without running anything
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python docs/readme.py

readme: env ## README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

lock: env ## pyproject.toml, the locks and environment.yml from settings.ini (needs the network)
	$(BIN)/python .ci/lock.py

hooks: env ## git hooks that refuse uncleaned notebooks and data files
	$(BIN)/pre-commit install

clean: ## remove what was built, but not the environment, runs and reports
	rm -rf _docs _proc .pytest_cache .hypothesis build *.egg-info .ipynb_checkpoints nbs/.ipynb_checkpoints nbs/*/.ipynb_checkpoints
	find ehr_r1 tests docs .ci -name __pycache__ -type d -prune -exec rm -rf {} +
