# Two commands need nothing but Python 3.11 and make: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=

# The same quiet, repeatable surroundings for every step: no hub look-ups, no fights over two cores.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONUNBUFFERED := 1

.PHONY: help env demo test test-slow docs front readme notebooks lint sync hooks bench checkpoint smol constraints clean

help: ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## Make .venv and install (at once when nothing changed)
	@python="$$(tools/python.sh)" && "$$python" tools/install.py

demo: env ## Install, then the whole life of a small model (ARGS="--seed 1 --out runs/other")
	@.venv/bin/video-vlm demo $(ARGS)

test: env ## Install, then every check: export in sync, lint, notebooks, docs, pytest
	@$(PY) tools/check.py

test-slow: env ## The long tests only (ARGS="-k name")
	@$(PY) -m pytest -m slow $(ARGS)

docs: env ## Build the site into _docs (Quarto if it is on PATH, else smalldocs)
	@$(PY) tools/docs.py $(ARGS)

front: env ## Figures of the front page from reports of the demo (ARGS="runs/demo ...")
	@$(PY) tools/front.py $(ARGS)

readme: env ## README.md from nbs/index.ipynb
	@$(PY) tools/readme.py

notebooks: env ## Run notebooks from the top and keep their outputs (ARGS="nbs/02_frames.ipynb")
	@$(PY) tools/notebooks.py $(ARGS)

sync: env ## Are notebooks clean, modules exported, README made? (changes nothing)
	@$(PY) tools/sync.py

lint: env ## Errors in notebooks and modules
	@$(PY) -m ruff check nbs video_vlm tests tools

hooks: env ## Once per clone: clean notebooks on save and merge
	@nbdev_install_hooks

bench: env ## One measurement: make bench NAME=decode [ARGS=--quick]
	@test -n "$(NAME)" || { echo "which one? make bench NAME=demo" >&2; exit 2; }
	@.venv/bin/video-vlm bench $(NAME) --json $(ARGS)

constraints: ## Write constraints.txt from what is installed in .venv
	@$(PY) tools/freeze.py

clean: ## Remove built pages and caches (never .venv, never runs)
	@rm -rf _docs _proc .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

checkpoint: env ## Train the small checkpoint again from nothing (hours; can be killed and started again)
	@$(PY) -c "from video_vlm.pretrain import make_checkpoint; print(make_checkpoint())"

smol: env ## Train the preset smol: SmolLM2-135M reads the small tower's tokens (hours; can be killed and started again)
	@$(PY) -c "import shutil; from video_vlm.smol import make_smol; print(shutil.copytree(make_smol(), 'video_vlm/checkpoints/smol', dirs_exist_ok=True))"
