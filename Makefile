# make demo     prepare text, train a small Attractor and a Transformer on it, compare them (minutes on 2 cores)
# make test     the whole test suite, offline
# make check    lint, format, types
# make format   let ruff format everything
# make bench    speed and memory of this machine
# make install  the virtual environment alone; the others call it, and it does nothing when nothing changed

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# Named by what it was installed from, so that a change of either file reinstalls and nothing else does.
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)

# Tests never look at the network, and each worker keeps to one thread.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline
THREADS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test check format bench install clean

demo: install
	@$(BIN)/attractor demo

test: install
	@$(OFFLINE) $(THREADS) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install
	@$(BIN)/attractor bench step
	@$(BIN)/attractor bench models
	@$(BIN)/attractor bench data

install: $(STAMP)

$(STAMP):
	@set -e; found=; \
	if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		for name in python3.11 python3.12 python3 python3.13 python; do \
			if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$name; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "error: no Python 3.11 or newer with the venv module was found (tried python3.11, python3.12, python3, python3.13, python)." >&2; \
			echo "Install one (Debian and Ubuntu: apt install python3 python3-venv) and run make again." >&2; exit 2; \
		fi; \
		$$found -m venv --clear $(VENV); \
	fi; \
	echo "Installing into $(VENV) with $$($(BIN)/python -V): about 3 minutes and 7 GB, once."; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt; \
	rm -f $(VENV)/installed-*; \
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
