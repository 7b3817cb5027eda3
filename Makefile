# The front door. Every target makes .venv and installs what it needs first; PYTHON=… chooses the interpreter.

.PHONY: help run demo test simulate chaos check format bench lock clean
.DEFAULT_GOAL := help
export PYTHON
SEEDS ?= 10000
KILLS ?= 20
PROCESSES ?= 2

help: ## what can be typed
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## start everything on http://127.0.0.1:8080 (ARGS="--port 9090" and other options of `lookup up`)
	@sh deploy/bootstrap.sh run
	@exec .venv/bin/lookup up $(ARGS)

demo: ## the same beside local peers, so that all four answers can be seen without internet
	@sh deploy/bootstrap.sh run
	@exec .venv/bin/lookup up --demo $(ARGS)

test: ## all tests, on real PostgreSQL, Valkey and RabbitMQ, PROCESSES=2 at a time (ARGS="-k saga" and other options of pytest)
	@sh deploy/bootstrap.sh test
	@exec .venv/bin/python -m pytest --numprocesses $(PROCESSES) --dist loadfile $(ARGS)

simulate: ## the whole system under SEEDS=10000 seeds of trouble (ARGS="--seed 42" runs one again and tells its story)
	@sh deploy/bootstrap.sh test
	@exec .venv/bin/python -m tests.simulation --seeds $(SEEDS) $(ARGS)

check: ## what a machine can say about the code: ruff, mypy, import-linter
	@sh deploy/bootstrap.sh test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

format: ## put the code into the house's format
	@sh deploy/bootstrap.sh test
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

chaos: ## the crash test: KILLS=20 of each part, servers too, under load, on both transports, and of the projector (ARGS="--seed 7 --transport redis")
	@sh deploy/bootstrap.sh test
	.venv/bin/python -m tests.chaos --kills $(KILLS) $(ARGS)
	.venv/bin/python -m tests.replay_proofs kills
	.venv/bin/python -m tests.replay_proofs clients
	.venv/bin/python -m pytest -m long

bench: ## jobs per second and the time of a single job, on both transports
	@sh deploy/bootstrap.sh test
	@exec .venv/bin/python -m bench $(ARGS)

lock: ## resolve pyproject.toml anew into requirements.lock and requirements-test.lock
	@sh deploy/lock.sh

clean: ## remove what can be made again; the data in .data stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
