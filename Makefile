# Flat Minima. `make help` lists the commands.
# Everything runs in .venv, which is made if missing; for another environment: make VENV=path book (conda: VENV=$CONDA_PREFIX).
VENV   ?= .venv
PYTHON ?= python3
# chapters for `make notebooks`, or assignments for `make assignments`, e.g. N=02_flooding
N      ?=
# seed of the hidden tests of `make assignments`; for `make grade`: submissions, table, how many at once
SEED   ?= 2026
FROM   ?= submissions
TO     ?=
JOBS   ?= 1

# An unset $CONDA_PREFIX would be /, and make splits names at spaces.
ifneq ($(words $(VENV)),1)
$(error VENV must be a path without spaces, got "$(VENV)")
endif

SHELL := bash
BIN   := $(VENV)/bin
READY := $(VENV)/.flatmin-ready
EXTRAS := .[book,test,course]
CHAPTERS = $(wildcard book/[0-9]*.ipynb book/evidence/[0-9]*.ipynb)

# Tests and comparisons use two processes with one thread each, and the book's own seed.
ONE := OMP_NUM_THREADS=1 FLATMIN_SEED=0
RENDER = $(BIN)/jupyter-book build -W --keep-going -n --quiet
CHECKED := _build/check/_build/html

.DEFAULT_GOAL := help
.PHONY: help book pdf lint test test-fast test-units test-notebooks test-book test-assignments test-web notebooks reading claims colab bench new-chapter assignments grade lab clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Versions are those of constraints.txt. In an environment that was not made here, an installed torch (one for your GPU, say) is kept.
# Files that were only touched, as git does, need no installation and no network.
$(READY): pyproject.toml constraints.txt
	@set -o pipefail; \
	stop() { echo "setup: $$1"; exit 1; }; \
	recent() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }; \
	another="another one: make PYTHON=python3.12 ..."; \
	if cksum $^ | cmp -s - $@; then touch $@; exit; fi; \
	if [ ! -x $(BIN)/python ]; then \
		command -v $(PYTHON) >/dev/null || stop "there is no $(PYTHON) here. Install Python 3.11 or newer, or name $$another"; \
		recent $(PYTHON) || stop "Python 3.11 or newer is needed, and $(PYTHON) is older. Use $$another"; \
		$(PYTHON) -m venv $(VENV) || stop "a virtual environment could not be made, see above. On Debian and Ubuntu: sudo apt install python3-venv; rm -rf $(VENV)"; \
		touch $(VENV)/.made-by-flatmin; \
	fi; \
	recent $(BIN)/python || stop "Python 3.11 or newer is needed, and $(BIN)/python is older. Remove $(VENV), and use $$another"; \
	$(BIN)/python -m pip --version >/dev/null || stop "there is no pip in $(VENV): run $(BIN)/python -m ensurepip, or remove the folder and try again"; \
	pins=$(VENV)/flatmin-constraints.txt; cp constraints.txt $$pins; \
	torch=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null); \
	if [ "$$torch" ] && [ ! -e $(VENV)/.made-by-flatmin ]; then \
		echo "setup: torch $$torch is installed and is kept"; \
		sed "s/^torch==.*/torch==$$torch/" constraints.txt > $$pins; \
	fi; \
	echo "setup: installing flatmin and its tests into $(VENV), once. If torch is not installed yet, it takes some minutes, and up to 6 GB on Linux"; \
	$(BIN)/python -m pip install --disable-pip-version-check -c $$pins -e "$(EXTRAS)" \
		| sed -n -e '/Downloading .*[0-9][0-9]\(\.[0-9]*\)\{0,1\} MB/p' -e '/Downloading .* GB/p' -e 's/^Installing collected.*/  Installing/p' \
		|| stop "pip could not install everything, see above; $$(df -Ph $(VENV) | awk 'NR == 2 { print $$4 }') are free on this disk. This step needs a network (later ones need none); downloads are kept: run the same command again"; \
	cksum $^ > $@; echo "setup: $(VENV) is ready"

book: $(READY)  ## execute the chapters that changed, on this machine, and render the book
	@$(BIN)/python tools/notebooks.py book

pdf: book  ## the whole book as one PDF, with headless Chromium
	@$(BIN)/python tools/pdf.py

STAGES := lint test-units test-notebooks test-book test-assignments
test: $(READY)  ## everything but the browser
	@for stage in $(STAGES); do $(MAKE) --no-print-directory $$stage || { echo "test: FAILED in the stage above; to run it alone: make $$stage"; exit 1; }; done
	@echo "test: everything passed (unit tests and doctests; $(words $(CHAPTERS)) notebooks re-executed and compared with their stored outputs; book rendered without a warning; a chapter run as in Colab; $(words $(wildcard assignments/[0-9]*.md)) assignments graded by Otter)"

test-fast: test-units  ## unit tests and doctests, under 2 minutes
	@echo "test-fast: passed (style, types, notebooks, book, Otter and browser not run: make test test-web)"

lint: $(READY)  ## style of the code, types, halves of the chapters
	@echo "test: style, types, pairs"
	$(BIN)/ruff check --quiet && $(BIN)/ruff format --check --quiet
	$(BIN)/python -m mypy
	$(BIN)/python tools/notebooks.py check

test-units: $(READY)
	@echo "test: unit tests and doctests"
	$(ONE) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not web and not course and not colab" --junitxml=_build/reports/units.xml

test-notebooks: $(READY)
	@echo "test: every notebook, re-executed and compared with what it stores"
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout 600 --junitxml=_build/reports/notebooks.xml $(CHAPTERS)

# The committed notebooks, as Colab and GitHub show them; test-notebooks checks their outputs.
test-book: $(READY)
	@echo "test: the book from the committed notebooks, warnings are errors"
	$(RENDER) book --path-output _build/check
	@echo "test: a chapter alone in an empty folder, as in Colab"
	$(ONE) $(BIN)/python -m pytest -q -m colab tests/pages --junitxml=_build/reports/colab.xml

test-assignments: $(READY)
	@echo "test: reference, blank and wrong answers to the assignments, graded by Otter"
	$(ONE) $(BIN)/python -m pytest -q -n 2 -m course tests/pages --junitxml=_build/reports/assignments.xml

test-web: $(READY)  ## the rendered book in headless Chromium, after make test
	@echo "test: every page in Chromium, wide and narrow, light and dark"
	FLATMIN_HTML=$${FLATMIN_HTML:-$(CHECKED)} $(BIN)/python -m pytest -q -n 2 -m web tests/pages --junitxml=_build/reports/web.xml

notebooks: $(READY)  ## authors: text halves to notebooks, executed in place (one: N=02_flooding)
	$(BIN)/python tools/notebooks.py run $(N)

reading: $(READY)  ## authors: each lesson beside its measure, and numbers in the text that nothing holds (one: N=02_flooding)
	$(BIN)/python tools/reading.py $(N)

claims: $(READY)  ## authors: do all claims hold for five other seeds?
	$(BIN)/python tools/claims.py $(N)

# timm without its dependencies: only its mixup is measured, which needs none
bench: $(READY)  ## authors: compare the package with its peers, on an idle machine; writes benchmarks/README.md
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps timm
	$(ONE) TQDM_DISABLE=1 $(BIN)/python benchmarks/run_all.py --record

colab: $(READY)  ## every chapter alone, without flatmin, as in Colab (one: N=02_flooding; with Colab's versions: COLAB=python3.12)
	$(BIN)/python tools/colab.py $(if $(COLAB),--python $(COLAB)) $(N)

new-chapter: $(READY)  ## authors: a skeleton that runs and passes all tests: NAME=weight_averaging TITLE="Weight averaging"
	$(BIN)/python tools/new_chapter.py "$$NAME" --title "$$TITLE"

assignments: $(READY)  ## instructors: student notebooks, solutions and autograders (one: N=02_flooding)
	$(BIN)/python tools/assignments.py build --seed "$(SEED)" $(N)

grade: $(READY)  ## instructors: a folder of submissions into a table: N=02_flooding FROM=folder TO=grades.csv
	$(BIN)/python tools/assignments.py grade "$(N)" "$(FROM)" $(if $(TO),-o "$(TO)") -j $(JOBS)

lab: $(READY)  ## read and run the chapters in JupyterLab
	-@$(BIN)/python tools/notebooks.py check
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/book

clean:  ## remove what was built (not .venv)
	rm -rf _build .pytest_cache .hypothesis
