# All that is run here and in CI. Each target makes its own virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
BENCH_READY := $(VENV)/bench-ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-wheel lint types format chart bench bench-subscriptions bench-http bench-clusters bench-typed bench-rivals bench-telemetry trace faults soak api docs docs-blocks docs-screenshots screenshots clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(READY) ## load this repository's git history into an embedded store and ask it questions
	$(BIN)/python examples/git_history.py

# Tests wait for servers much of their time: three at once keep two cores busy.
WORKERS ?= 3
test: $(READY) ## run the tests on every server that this machine has
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# What the wheel lacks can't be found beside it: the tests run where the package is not.
WHEEL := build/wheel
test-wheel: $(READY) ## build sdist and wheel, and run the tests on the wheel; PYTHON=python3.13 to choose: build/wheel-results.txt
	rm -rf $(WHEEL)
	$(BIN)/python -m build --outdir $(WHEEL)/dist
	mkdir $(WHEEL)/source
	tar -xzf $(WHEEL)/dist/*.tar.gz -C $(WHEEL)/source --strip-components 1
	rm -r $(WHEEL)/source/asyncstore
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls $(WHEEL)/dist/*.whl)[test]"
	cd $(WHEEL)/source && ../venv/bin/python -m pytest -n $(WORKERS) --dist loadfile \
		--junit-xml=../junit.xml $(TESTS); status=$$?; \
		../venv/bin/python -m tests.wheel_results ../junit.xml ../../wheel-results.txt; exit $$status

lint: $(READY) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## check types, strictly
	$(BIN)/mypy

format: $(READY) ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

api: $(READY) ## write the public API to tests/api.txt, which a test compares it with
	$(BIN)/python -m tests.api

docs: $(READY) ## build the documentation: build/docs/index.html
	rm -rf build/docs
	$(BIN)/python -m sphinx -E -W --keep-going -q -d build/docs-cache docs build/docs

docs-blocks: $(READY) ## run each code block of the documentation, and list them: build/docs-blocks.txt
	$(BIN)/python -m pytest -q tests/test_docs.py -k test_the_blocks
	@cat build/docs-blocks.txt

docs-screenshots: docs ## pictures of its pages by Chromium, wide and narrow, a minute: build/screenshots
	$(BIN)/python docs/screenshots.py build/docs build/screenshots

screenshots: $(READY) ## save what `doctor`, `read` and `tail` show as build/terminal/*.svg
	$(BIN)/python docs/terminal.py build/terminal

VALUES ?= examples/helm/orders-values.yaml
chart: $(READY) ## list the objects that the Helm chart makes of VALUES=…
	$(BIN)/python docs/chart.py $(VALUES)

bench: $(BENCH_READY) ## measure beside other clients, 5 minutes: tables, build/bench.json and .png
	$(BIN)/python -m benchmarks.bench

bench-subscriptions: $(BENCH_READY) ## measure subscriptions beside Redis Streams, and on a cluster, 6 minutes
	$(BIN)/python -m benchmarks.subscribing
	$(BIN)/python -m benchmarks.subscribing_on_clusters

bench-http: $(BENCH_READY) ## measure appends over HTTP beside redis-py by wrk, 2 minutes: build/bench-http.json
	$(BIN)/python -m benchmarks.web --output build/bench-http.json

bench-clusters: $(BENCH_READY) ## measure clusters of 3, 6 and 9 primaries, 3 minutes: build/clusters.json
	$(BIN)/python -m benchmarks.clusters

bench-typed: $(BENCH_READY) ## measure typed events beside plain JSON, half a minute: build/bench-typed.json
	$(BIN)/python -m benchmarks.typed_events

bench-rivals: $(BENCH_READY) ## measure beside other event stores, 3 minutes: build/bench-rivals.json
	$(BIN)/python -m benchmarks.rivals

bench-telemetry: $(BENCH_READY) ## measure what telemetry costs an append, off and on, 1 minute: build/telemetry.json
	$(BIN)/python -m benchmarks.telemetry

trace: $(BENCH_READY) ## draw a trace from an append to the handler of its event: build/trace.png
	$(BIN)/python examples/trace_picture.py

faults: $(READY) ## kill, cut and fill servers, clusters and workers under load, 30 minutes: table, build/faults.json
	$(BIN)/python -m tests.faults faults

MINUTES ?= 10
soak: $(READY) ## mixed load and faults at random; MINUTES=10, SEED=… to choose: build/soak.json
	$(BIN)/python -m tests.faults soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .asyncstore
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "asyncstore needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@
