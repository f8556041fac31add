# All that has to be installed is make and Python 3.11 or newer. Every target makes and uses its own .venv.
PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Threads that wait for one another give way after a moment. By default they keep the processor busy, and where another program wants it
# too, a training step takes some ten times as long.
export GOMP_SPINCOUNT ?= 1000

.PHONY: help setup tutorial render test test-quick portable site lab lint format release-check clean

help:
	@echo 'make setup      create .venv and install the package with everything the course needs'
	@echo 'make tutorial   run every notebook on the real images; results in outputs/course/results.md'
	@echo 'make render     run the notebooks in place and keep their outputs, for those who read without a kernel'
	@echo 'make lab        open JupyterLab in notebooks/'
	@echo 'make test       check the style, then run all tests and all notebooks (PYTEST_ARGS="-k masks" for some of them)'
	@echo 'make test-quick the quick tests only, in a minute or two, while you work; no notebook'
	@echo 'make portable   run the tests and notebooks as other processors, precisions and versions of torch would'
	@echo 'make site       build the website into website/_build/html/, offline; open website/_build/html/index.html'
	@echo 'make lint       check the style only'
	@echo 'make format     put the code in the style'
	@echo 'make release-check  install in every way into empty environments, which downloads PyTorch: before a release'
	@echo 'make clean      remove .venv, caches, build files and outputs/course'

setup: $(STAMP)

# Redone only when the list of packages has changed.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'error: "$(PYTHON)" is not Python 3.11 or newer. Name one that is: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'error: "$(PYTHON)" cannot create virtual environments. On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'Installing into $(VENV). PyTorch is large: several minutes the first time ...'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[notebooks,test]'
	@touch $@
	@echo 'Installed.'

tutorial: setup
	@$(PY) scripts/run_course.py

render: setup
	@$(PY) scripts/render_notebooks.py

# As many tests at a time as there are cores; who runs out of them takes half of what another still has to do.
SIDE_BY_SIDE := -n logical --maxprocesses=8 --dist=worksteal

test: lint
	@$(PY) -m pytest --nbmake --nbmake-timeout=600 $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-quick: setup
	@$(PY) -m pytest -m "not slow" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

portable: setup
	@$(PY) -m benchmarks.portable

site: setup
	@$(PY) -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[site]'
	@$(PY) -m sphinx -q -E -W --keep-going -d website/_build/doctrees -b html website website/_build/html
	@echo 'Built: website/_build/html/index.html'

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: setup
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

release-check:
	@$(PYTHON) scripts/release_check.py

lab: setup
	@cd notebooks && ../$(PY) -m jupyterlab

# Not data/ nor the other outputs/: those may have taken hours.
clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis outputs/course website/_build website/_live website/notebooks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
