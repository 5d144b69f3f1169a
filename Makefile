# make demo   a real model: quantize, serve, stream an answer
# make test   the whole test suite, as CI runs it
# make check  style and types
# make docs   the site out of docs/, in build/site; a link that leads nowhere is an error
# make test-ray  octavo on a Ray cluster of two nodes on this machine, in an environment of its own, .ray
# make clients  real clients and coding agents against a server: installs them in .clients, with npm and uv, and runs them
# make gateways  sglang-router and vllm-router before two servers: installs them in .gateways and runs them
# make test-page  the server's page in Debian's chromium: installs selenium, and axe-core with npm in .page, and runs it
# make test-scale  chart, compose, dashboards and alerts by their own tools: needs Debian's prometheus and docker-compose
# make test-image  the CPU image built without a daemon, and run: as root, with Debian's buildah and debootstrap
# make gpu    on a machine with a GPU, in PYTHON's own environment: tests, tables of kernels and steps
# make install  the environment .venv, which all of the above use

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo docs test test-ray test-page test-scale test-image clients gateways gpu check clean

install: $(INSTALLED)

# --upgrade-strategy only-if-needed: a second run with a changed pyproject.toml adds what is missing and no more.
$(INSTALLED): pyproject.toml src/octavo/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m octavo.demo

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All pages are read anew, so that each run tells of all that is wrong.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx --builder html --fresh-env --nitpicky --fail-on-warning --keep-going --quiet docs build/site

# Two at a time: a third one on two cores costs more than the waits that it fills (652 and 585 s). Tests start a hundred
# interpreters, which compile what they import once and not each time, whatever the environment says.
test: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile

test-ray:
	test -x .ray/bin/python || $(PYTHON) -m venv .ray
	.ray/bin/python -m pip install --quiet --upgrade-strategy only-if-needed --editable '.[dev,ray]'
	RAY_worker_niceness=0 .ray/bin/python -m pytest -m ray tests/server/test_ray_engine.py
	RAY_worker_niceness=0 .ray/bin/python -m pytest -m ray tests/server/test_ray_serve.py
	RAY_worker_niceness=0 .ray/bin/python -m pytest -m ray tests/jobs/test_calibration_on_ray.py

# aider pins versions of what the libraries need, so it has an environment of its own.
clients: $(INSTALLED)
	$(PYTHON) -m venv .clients/libraries
	.clients/libraries/bin/python -m pip install --quiet uv
	.clients/libraries/bin/uv pip install --quiet --python .clients/libraries/bin/python -r tests/clients/requirements.txt
	$(PYTHON) -m venv .clients/aider
	.clients/libraries/bin/uv pip install --quiet --python .clients/aider/bin/python aider-chat
	cp tests/clients/package.json .clients/
	npm install --prefix .clients --no-audit --no-fund --silent
	$(BIN)/python -m pytest -m slow tests/clients

test-page: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --editable '.[browser]'
	npm install --prefix .page --no-audit --no-fund --silent axe-core@4
	$(BIN)/python -m pytest -m slow tests/server/test_page_browser.py tests/server/test_page_faults.py

test-scale: $(INSTALLED)
	$(BIN)/python -m pytest -m 'slow or not slow' --ignore tests/deploy/test_image_build.py tests/deploy

test-image: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/deploy/test_image_build.py

gateways: $(INSTALLED)
	$(PYTHON) -m venv .gateways
	.gateways/bin/python -m pip install --quiet -r tests/gateways/requirements.txt
	$(BIN)/python -m pytest -m slow tests/gateways

# Each goes on where the one before has failed; tables come to benchmarks/results.
gpu: export PYTHONPATH := src
gpu:
	failed=0; \
	$(PYTHON) -m pytest -m cuda tests/kernels tests/quant tests/runtime || failed=1; \
	$(PYTHON) -m benchmarks.kernels || failed=1; \
	$(PYTHON) -m benchmarks.gpu_step --dtype fp8 || failed=1; \
	$(PYTHON) -m benchmarks.gpu_step --dtype int4 || failed=1; \
	exit $$failed

clean:
	rm -rf $(VENV) .ray build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
