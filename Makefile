# make sweep · figures · claims · ui · dashboard · lab · test · check · docs; each sets up .venv first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 5000
DASHBOARD_PORT ?= 8080
STUDY ?= default
export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/mlflow.db
export WORKBENCH_STORAGE ?= sqlite:///$(CURDIR)/optuna.db

.PHONY: install sweep claims test test-all check docs lab ui dashboard figures clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

sweep: install
	$(BIN)/python -m workbench.sweep --study $(STUDY)

# Byte code is kept even where the environment says no: each of the processes that tests start would compile anew.
test: install
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

test-all: install
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 -m 'not campaign' --hypothesis-profile new

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything below the first comment of the settings' page is printed by the code.
docs: install
	@sed -n '1,/^<!--/p' docs/settings.md > docs/.settings.md
	@$(BIN)/python -m workbench.train --settings >> docs/.settings.md
	@mv docs/.settings.md docs/settings.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open: site/index.html, or with its search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site"

lab: install
	WORKBENCH_HOME=$(CURDIR) $(BIN)/jupyter lab --notebook-dir=notebooks

ui: install
	@$(BIN)/python -c 'import sys; from workbench.common.ports import busy; sys.exit(busy($(PORT), "for another: make ui PORT=5001"))'
	@$(BIN)/python -c 'from workbench.tracking import connect, study_runs, ui; c = connect(); ui.PORT = $(PORT); print("\nOpen:", ui.ui_link(c, next(iter(study_runs.study_names(c)), None)), "\n")'
	@MLFLOW_BACKEND_STORE_URI="$(MLFLOW_TRACKING_URI)" MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1

# Optuna's own pages of this folder's studies; its package comes on top of the others the first time.
dashboard: $(BIN)/optuna-dashboard
	@$(BIN)/python -c 'import sys; from workbench.common.ports import busy; sys.exit(busy($(DASHBOARD_PORT), "for another: make dashboard DASHBOARD_PORT=8081"))'
	@$(BIN)/python -c 'import sys; from workbench.studies.storage import missing; none = missing("$(WORKBENCH_STORAGE)"); sys.exit(none and f"Error: {none}")'
	@printf '\nOpen: http://127.0.0.1:$(DASHBOARD_PORT)\n\n'
	@$(BIN)/optuna-dashboard "$(WORKBENCH_STORAGE)" --host 127.0.0.1 --port $(DASHBOARD_PORT)

$(BIN)/optuna-dashboard: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dashboard]'
	touch $@

figures: install
	$(BIN)/python -m workbench.report --study $(STUDY)

claims: install
	$(BIN)/python -m workbench.claims

clean:
	rm -rf $(VENV) .cache site dist
