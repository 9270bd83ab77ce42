# Two commands do it all: `make book` and `make test`. They need Python 3.11 or 3.12 with venv, and make.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PRESET ?= quick
JOBS ?= 2
SHOWN := runs/published-$(PRESET)
THREADS := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$(( n > $(JOBS) ? n / $(JOBS) : 1 )))

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

install: $(READY)  ## the environment .venv, nothing else

$(READY): pyproject.toml
	@python=; for p in $(PYTHON) python3.12 python3.11 python3; do \
	  "$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	    && { python=$$p; break; }; done; \
	[ -n "$$python" ] || { echo "No Python 3.11 or 3.12 with venv found; install one, or call: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'  # what is imported is compiled then
	$(BIN)/python -c 'from cxr_book.core import check_torchvision; check_torchvision()'
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null
	@touch $@

book: install  ## chapters, comparison and a prediction on the drawn data set, then the site (PRESET=smoke|quick|paper, JOBS=2)
	@mkdir -p $(SHOWN) && cp published/* $(SHOWN)/
	@PATH="$(CURDIR)/$(BIN):$$PATH" cxr-book run configs/book.yaml --preset $(PRESET) --workers $(JOBS) --publish $(SHOWN)
	@CXR_BOOK_PUBLISHED=$(SHOWN) $(MAKE) --no-print-directory site
	@echo; echo "Which method for what: $$(ls -td runs/21_compare-*/ | head -1)notebook.ipynb"
	@echo "A prediction, as a page: $$(ls -td runs/22_predict-*/ | head -1)predictions/index.html"
	@echo "All executed notebooks: $(SHOWN)/; runs, weights and figures: cxr-book runs"
	@! command -v quarto >/dev/null || echo "The site: _book/index.html"

edition: install  ## the published edition: all chapters with rivals, ablations and stress, taken into published/ (two hours)
	@$(BIN)/python -m cxr_book.phantom data/noise --preset quick --false-positives 0.05 --false-negatives 0.3
	@$(BIN)/python -m cxr_book.phantom data/shortcut --preset quick --shortcut-tube 0.9 --shortcut-marker 0.9
	@PATH="$(CURDIR)/$(BIN):$$PATH" cxr-book run configs/stress.yaml --out runs/stress --workers $(JOBS)
	@PATH="$(CURDIR)/$(BIN):$$PATH" cxr-book run configs/edition.yaml --workers $(JOBS) --publish published
	@$(BIN)/python -m cxr_book.site readme

gpu: install  ## the GPU edition: the papers' models and image sizes, on a CUDA GPU; it may be stopped and goes on
	@$(BIN)/python -m cxr_book.gpu --take

site: install  ## render the site from published/ with Quarto, where it is installed
	@if command -v quarto >/dev/null; then \
	  PATH="$(CURDIR)/$(BIN):$$PATH"; python -m cxr_book.site pages && quarto render && python -m cxr_book.site crawl _book; \
	else echo "Quarto is not on the PATH, so the site is not rendered (all else is done). Get it from quarto.org, or: pip install quarto-cli"; fi

test: install  ## all tests, file by file on JOBS processes
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

export: install  ## notebooks -> package, and clean the notebooks
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_export && PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_clean --fname nbs

twin: install  ## percent script beside a notebook to edit it in an editor: make twin NB=nbs/03_data.ipynb
	$(BIN)/jupytext --to py:percent $(NB)

untwin: install  ## the edited script back into its notebook, keeping cell ids and tags: make untwin NB=nbs/03_data.ipynb
	$(BIN)/jupytext --to ipynb --update --output $(NB) $(NB:.ipynb=.py) && rm $(NB:.ipynb=.py)
	$(MAKE) --no-print-directory export

.PHONY: help install book edition gpu site test export twin untwin
