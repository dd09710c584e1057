# Flat Minima. `make help` lists the commands.
# Everything runs in .venv, which is made if missing; for another environment: make VENV=path book (conda: VENV=$CONDA_PREFIX).
VENV   ?= .venv
PYTHON ?= python3
# chapters for `make notebooks`, or assignments for `make assignments`, e.g. N=02_flooding
N      ?=
# name and title for `make new-chapter`
NAME   ?=
TITLE  ?=
# seed of the hidden tests of `make assignments`; submissions and table of `make grade`
SEED   ?= 2026
FROM   ?= submissions
TO     ?= grades.csv

BIN   := $(VENV)/bin
READY := $(VENV)/.flatmin-ready
CHAPTERS = $(wildcard book/[0-9]*.ipynb)

# Tests and comparisons use two processes with one thread each, and the book's own seed.
ONE := OMP_NUM_THREADS=1 FLATMIN_SEED=0
QUIET := TQDM_DISABLE=1  # no progress bars in stored outputs
RENDER = $(BIN)/jupyter-book build -W --keep-going -n --quiet
CHECKED := _build/check/_build/html

.DEFAULT_GOAL := help
.PHONY: help book pdf test test-fast test-units test-notebooks test-book test-assignments test-web notebooks claims colab bench new-chapter assignments grade lab clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup: there is no $(PYTHON) here. Install Python 3.11 or newer, or name yours: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) tools/install.py $(VENV)

book: $(READY)  ## execute the chapters that changed, on this machine, and render the book
	@$(BIN)/python tools/notebooks.py book

pdf: book  ## the whole book as one PDF, with headless Chromium
	@$(BIN)/python tools/pdf.py

STAGES := units notebooks book assignments
test: $(READY)  ## everything but the browser
	@for stage in $(STAGES); do $(MAKE) --no-print-directory test-$$stage || { echo "test: FAILED in the stage above; to run it alone: make test-$$stage"; exit 1; }; done
	@echo "test: everything passed (unit tests and doctests; $(words $(CHAPTERS)) notebooks re-executed and compared with their stored outputs; book rendered without a warning; a chapter run as in Colab; $(words $(wildcard assignments/[0-9]*.md)) assignments graded by Otter)"

test-fast: test-units  ## unit tests and doctests, under 3 minutes
	@echo "test-fast: passed (notebooks, book, Otter and browser not run: make test test-web)"

test-units: $(READY)
	@echo "test: unit tests and doctests"
	$(ONE) $(BIN)/python -m pytest -q -n 2 -m "not web and not course and not colab" --junitxml=_build/reports/units.xml

test-notebooks: $(READY)
	@echo "test: every notebook, re-executed and compared with what it stores"
	$(ONE) $(QUIET) $(BIN)/python -m pytest -q -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout 600 --junitxml=_build/reports/notebooks.xml $(CHAPTERS)

# The committed notebooks, as Colab and GitHub show them; test-notebooks checks their outputs.
test-book: $(READY)
	@echo "test: the book from the committed notebooks, warnings are errors"
	$(RENDER) book --path-output _build/check
	@echo "test: a chapter alone in an empty folder, as in Colab"
	$(ONE) $(BIN)/python -m pytest -q -m colab tests/pages --junitxml=_build/reports/colab.xml

test-assignments: $(READY)
	@echo "test: reference, blank and wrong answers to the assignments, graded by Otter"
	$(ONE) $(QUIET) $(BIN)/python -m pytest -q -n 2 -m course tests/pages --junitxml=_build/reports/assignments.xml

test-web: $(READY)  ## the rendered book in headless Chromium, after make test
	@echo "test: every page in Chromium, wide and narrow, light and dark"
	FLATMIN_HTML=$${FLATMIN_HTML:-$(CHECKED)} $(BIN)/python -m pytest -q -n 2 -m web tests/pages --junitxml=_build/reports/web.xml

notebooks: $(READY)  ## authors: text halves to notebooks, executed in place (one: N=02_flooding)
	$(BIN)/python tools/links.py
	$(BIN)/python tools/notebooks.py run $(N)

claims: $(READY)  ## authors: do all claims hold for five other seeds?
	$(BIN)/python tools/claims.py $(N)

# timm without its dependencies: only its mixup is measured, which needs none
bench: $(READY)  ## authors: compare the package with its peers, on an idle machine; writes benchmarks/README.md
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps timm
	$(ONE) $(QUIET) $(BIN)/python benchmarks/run_all.py --record

colab: $(READY)  ## every chapter alone, without flatmin, as in Colab (one: N=02_flooding; with Colab's versions: COLAB=python3.12)
	$(BIN)/python tools/colab.py $(if $(COLAB),--python $(COLAB)) $(N)

new-chapter: $(READY)  ## authors: a skeleton that runs and passes all tests: NAME=weight_averaging TITLE="Weight averaging"
	$(BIN)/python tools/new_chapter.py "$(NAME)" --title "$(TITLE)"

assignments: $(READY)  ## instructors: student notebooks, solutions and autograders (one: N=02_flooding)
	$(BIN)/python tools/assignments.py build --seed $(SEED) $(N)

grade: $(READY)  ## instructors: a folder of submissions into a table: N=02_flooding FROM=folder TO=grades.csv
	$(BIN)/python tools/assignments.py grade $(N) $(FROM) -o $(TO)

lab: $(READY)  ## read and run the chapters in JupyterLab
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/book

clean:  ## remove what was built (not .venv)
	rm -rf _build .pytest_cache .hypothesis
