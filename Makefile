# Watershed on this machine. Servers of your own are used where NATS_URL, POSTGRES_URL or MONGODB_URL is set (and, with
# a user for each service, NATS_COMMAND_URL, NATS_PROJECTION_URL, NATS_QUERY_URL, MONGODB_PROJECTION_URL,
# MONGODB_QUERY_URL). The ports of those that are started otherwise: WATERSHED_{NATS,POSTGRES,MONGODB}_PORT.

.DEFAULT_GOAL := help
.PHONY: help run up down unit test fmt lint bench soak retail new-aggregate new-view

SCRIPTS := scripts/stack scripts/run scripts/new $(wildcard scripts/*.py)

help: ## show this list
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-14s %s\n' "$$name" "$$what"; done

run: ## get the servers, build, migrate, and run the three services until Ctrl-C [DEV=1: built for debugging]
	@scripts/run run $(if $(DEV),--dev)

up: ## the same in the background; returns when every service is ready
	@scripts/run up $(if $(DEV),--dev)

down: ## stop what `make up` started; the data stays (scripts/stack down --wipe removes it)
	@scripts/run down

unit: ## the tests of the domain and of the views, in seconds and without servers
	cargo test --package domain --package views --locked --no-fail-fast

test: ## all tests, on servers and ports of their own
	python3 scripts/test_stack.py
	cargo test --workspace --locked

# Cargo does not find the modules that a macro declares.
LISTED := $(wildcard shared/domain/src/*.rs shared/views/src/*.rs shared/watershed/src/operations/*.rs)

fmt: ## format the code
	cargo fmt --all
	rustfmt --edition 2024 $(LISTED)

lint: ## formatting, clippy with warnings as errors, the scripts, docker-compose.yml
	cargo fmt --all --check
	rustfmt --edition 2024 --check $(LISTED)
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@python3 -c 'import ast, sys; [ast.parse(open(path).read(), path) for path in sys.argv[1:]]' $(SCRIPTS)
	@for script in .ci/run scripts/docker/*.sh; do bash -n $$script || exit 1; done
	@if docker compose version >/dev/null 2>&1; then docker compose config --quiet && \
		docker compose -f docker-compose.yml -f docker-compose.secrets.yml config --quiet; \
		else echo 'docker compose is not installed: docker-compose.yml is not checked'; fi

bench: ## measure against the bare parts: make bench [ONLY="row …"]
	cargo build --release --locked --workspace --bins
	target/release/bench $(if $(ONLY),--only $(ONLY))

new-aggregate: ## the skeleton of an aggregate: make new-aggregate NAME=review
	@scripts/new aggregate $(NAME)

new-view: ## the skeleton of a view of an aggregate: make new-view NAME=ratings OF=review
	@scripts/new view $(NAME) $(OF)

MINUTES := 30
soak: ## orders at 80 % of the highest rate, and whether anything grows: make soak [MINUTES=30]
	cargo build --release --locked --workspace --bins
	target/release/bench --soak $(MINUTES)

retail: ## replay invoices through NATS: make retail FILE=path.csv.gz [DATES=month-first]
	@test -n "$(FILE)" || { echo 'usage: make retail FILE=path.csv.gz [DATES=month-first|day-first]' >&2; exit 2; }
	@if [ -z "$$NATS_URL" ]; then eval "$$(scripts/stack env)"; fi; scripts/run retail "$(FILE)"
