# Two commands do everything: `make reproduce` and `make test`. Both build their own environment in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
# Stages call papermill, jupyter and python by name: the environment's own come first.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONUNBUFFERED := 1
# Threads that wait must not spin: beside any other busy program a spinning barrier costs ten times the work.
export OMP_WAIT_POLICY := PASSIVE
# A kernel of the same name that the user installed elsewhere must not be taken in place of the environment's.
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help env reproduce test readme docs lab bench bench-crop bench-embed libraries lint notebooks unit notebooks-and-unit smoke

help:
	@echo "make reproduce   every table and figure (profile of params.yaml, default demo)"
	@echo "make test        all checks, as CI runs them"
	@echo "make lab         JupyterLab on nbs/index.ipynb"
	@echo "make readme      README.md and figures/report.html from their templates and figures/ (make reproduce does it too)"
	@echo "make docs        the documentation as a site, in site/, from an environment of its own"
	@echo "make bench       pictures per second of a training step, beside I-JEPA's (minutes; nobody's CI runs it)"
	@echo "make bench-crop  photographs a second of the crop stage, beside the plain way; needs a quiet machine"
	@echo "make bench-embed PHOTOGRAPHS=DIR   mefem embed beside the cost of its parts, and its start; needs a quiet machine"

libraries:
	@$(PYTHON) tools/system_libraries.py

# Rebuilt when what is to be installed changes; the marker is written last, so a broken install is not taken for a whole one.
# Bytecode is compiled on all cores, where pip would on one.
$(INSTALLED): constraints.txt settings.ini setup.py pyproject.toml
	@echo "== environment: $(VENV) (first time: 3 to 6 minutes, 6 GB)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q --upgrade -c constraints.txt "pip>=24" setuptools wheel
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation --no-compile -e ".[dev]"
	@$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true  # templates among the packages are no Python
	@touch $@

env: libraries $(INSTALLED)

# Started through a script that first puts right what a power cut left of DVC's own files.
reproduce: env
	python tools/whole_lock.py dvc repro
	@mefem info reproduction

# The graph of `smoke` is half starting up: it runs beside the notebooks and the tests, which use what it leaves.
test: env lint
	@$(MAKE) --no-print-directory -j 2 smoke notebooks-and-unit
	@echo "== all checks passed"

lint:
	@echo "== ruff"
	ruff check .
	ruff format --check .
	@echo "== mypy"
	mypy

notebooks:
	@echo "== the package is what the notebooks export, and the notebooks are clean"
	python tools/check_notebooks.py
	@echo "== every notebook runs, and shows what it has stored"
	python tools/run_notebooks.py --workers 2

unit:
	@echo "== pytest"
	python -m pytest -q -n 2

notebooks-and-unit:
	@$(MAKE) --no-print-directory notebooks
	@$(MAKE) --no-print-directory unit

smoke:
	@echo "== the whole graph at profile smoke, in a scratch clone, twice (all of its output: data/smoke.log)"
	@set -o pipefail; bash tools/smoke.sh 2>&1 | tee data/smoke.log | grep --line-buffered -E "^(== |Running stage)" \
		|| { tail -n 80 data/smoke.log; exit 1; }

# From their templates in nbs/ and figures/; the graph's last stages do the same, but for the kept results on real faces.
readme: env
	python -c "from mefem.readme import write_readme; write_readme('.')"
	python -c "from mefem.page import write_report; write_report('.'); write_report('.', 'figures/faces')"

# The site needs neither torch nor the package's other requirements: a small environment, which cannot disturb the other.
DOCS := .venv-docs
$(DOCS)/.installed: constraints-docs.txt settings.ini
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -q -c constraints-docs.txt \
	    $$(sed -n 's/^docs_requirements = //p' settings.ini)
	@touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

# Jupyter refuses to run as root, which in a container is the only user, unless told that it may.
lab: env
	jupyter lab --notebook-dir=nbs --LabApp.default_url=/lab/tree/index.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

bench: env
	@mkdir -p data/bench
	papermill nbs/benchmarks/step.ipynb data/bench/step.ipynb -k python3 --log-output --no-progress-bar

bench-embed: env
	python benchmarks/embed.py --photographs $(PHOTOGRAPHS)

bench-crop: env
	python benchmarks/crop.py --write benchmarks/rates.json
