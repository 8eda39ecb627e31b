# The only door: `make` lists what it opens. Needs Python 3.11.4 or newer (with venv) and make, nothing else.
PYTHON ?= python3
REQUIREMENTS ?= env/requirements-cpu.txt
PROFILE ?= demo
DATA ?=
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
SNAKEFLAGS ?=
TESTFLAGS ?= -n $(CORES) --dist loadgroup

# What was typed, as the environment has it: neither make nor a shell reads it again, so that any path works.
override PROFILE := $(value PROFILE)
override DATA := $(value DATA)
export RATLIP_PROFILE := $(value PROFILE)
export RATLIP_DATA := $(value DATA)

# Jobs that the workflow and the tests start must find .venv's programs first, wherever make was called from.
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.DEFAULT_GOAL := help
.PHONY: help reproduce test lab env clean

help:  ## show this list
	@echo "make TARGET [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile
	@echo "variables:"
	@printf '  PROFILE=%s DATA=%s ' "$$RATLIP_PROFILE" "$$RATLIP_DATA"
	@echo "CORES=$(CORES) PYTHON=$(PYTHON) REQUIREMENTS=$(REQUIREMENTS)"

reproduce: env  ## run every notebook of PROFILE (data in DATA, generated if none) and write reports/PROFILE
	@$(IN_VENV) .venv/bin/python -m ratlip.report.reproduce --cores $(CORES) --rerun-incomplete --rerun-triggers mtime params \
		--keep-going --quiet all $(SNAKEFLAGS)
	@name="$$RATLIP_PROFILE"; name="$${name##*/}"; page="reports/$${name%.*}/index.html"; test ! -f "$$page" || \
		echo "Up to date: $$page. Open it; the notebooks with their answers are its links, or \`make lab\`."

test: env  ## run the whole test suite (TESTFLAGS are pytest's options)
	@$(IN_VENV) OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(TESTFLAGS)

lab: env  ## open the notebooks in JupyterLab
	@$(IN_VENV) .venv/bin/python -m jupyter lab notebooks/

env:  ## make .venv from REQUIREMENTS, or do nothing where it is up to date
	@sh env/venv.sh "$(PYTHON)" "$(REQUIREMENTS)"

clean:  ## remove .venv and caches; outputs/, reports/ and .snakemake/, which knows what they were made of, stay
	rm -rf .venv .venv.log .pytest_cache .ruff_cache build *.egg-info
	find ratlip tests notebooks env \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
