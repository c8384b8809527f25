# Thin: each target is one command that also works without make.
BIN := .venv/bin/
PY := $(BIN)python
OUTPUTS :=

.PHONY: setup sync test tiny book check slow links bench checkpoints prompts captioners gpu-jobs

setup:        ## environment with the locked versions
	python3 -m venv .venv && .venv/bin/pip install -q uv && .venv/bin/uv pip install -q --compile-bytecode --python .venv/bin/python -r requirements.lock -e .

sync:         ## .ipynb from .py; OUTPUTS=executed.ipynb takes the outputs of tagged cells from there
	$(PY) data_scripts/sync_notebooks.py $(if $(OUTPUTS),--outputs-from $(OUTPUTS))

test:         ## unit tests
	$(PY) -m pytest tests/unit

tiny:         ## every chapter with its default profile
	set -e; for chapter in notebooks/[0-9]*.py; do $(BIN)robustvlm run $$(basename $$chapter .py); done

# The cache of executed pages compares notebooks only, so it is thrown away when package, cards, claims or lock changed.
book:         ## HTML in _build/html
	@mkdir -p _build; find robustvlm_lite book/cards book/claims.yml requirements.lock -type f ! -name '*.pyc' | LC_ALL=C sort | xargs sha256sum > _build/now.sha256
	@cmp -s _build/now.sha256 _build/built.sha256 || rm -rf _build/.jupyter_cache
	$(BIN)jupyter-book build . -W -n --keep-going
	@mv _build/now.sha256 _build/built.sha256

check:        ## what CI runs
	$(PY) -m pytest

slow:         ## what takes many minutes: the set-up that Colab runs, in an empty environment
	$(PY) -m pytest -m slow tests

links:        ## addresses on other hosts
	$(BIN)jupyter-book build . --builder linkcheck

bench:        ## our steps against the released order of operations
	set -e; for script in benchmarks/[a-z]*.py; do $(PY) $$script; done

checkpoints:  ## train the committed checkpoints again
	$(PY) data_scripts/train_defenses.py

prompts:      ## train the prompt files again; they sit on the checkpoints
	$(PY) data_scripts/train_prompts.py

captioners:   ## train the captioners again, then the methods of chapter 08 on them
	set -e; for model in tiny-vit-gpt2 tiny-blip2; do $(PY) data_scripts/train_captioners.py $$model --work _build/$$model; \
	$(PY) data_scripts/tune_captioners.py $$model; done

gpu-jobs:     ## what still needs a GPU
	$(PY) data_scripts/gpu_jobs.py
