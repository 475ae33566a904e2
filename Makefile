# Everything a person types. Each target does its own set-up and is cheap when run again.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help libtorch tools data nextest build demo test lint sim bench-step bench-train bench-gpu bench-allreduce bench-overlap bench-loader bench-accuracy chaos parity parity-fixtures deny clean

# An empty LIBTORCH would hide the folder that .cargo/config.toml names.
ifeq ($(LIBTORCH),)
unexport LIBTORCH
endif

# What the set-up scripts fetch is found behind what the system has.
export PATH := $(PATH):$(or $(LOCKSTEP_DEPS),$(CURDIR)/.deps)/tools/bin

WORKERS ?= 2
SEEDS ?= 2000
coordinator := target/release/coordinator
chaos_arguments = $(if $(SEED),--seed $(SEED)) $(if $(EVENTS),--events $(EVENTS)) \
	$(if $(MINUTES),--minutes $(MINUTES)) $(if $(MEAN_S),--mean-s $(MEAN_S)) $(if $(JOBS),--jobs $(JOBS))

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

libtorch: ## Fetch libtorch 2.11.0 (unless LIBTORCH names one)
	@deploy/setup/libtorch.sh > /dev/null

tools: ## Fetch cmake and nasm (unless they are here), which build libjpeg-turbo
	@deploy/setup/build-tools.sh > /dev/null

data: ## Fetch Fashion-MNIST and print its folder
	@deploy/setup/fashion-mnist.sh

nextest:
	@deploy/setup/nextest.sh > /dev/null

build: libtorch tools ## Build target/release/coordinator and target/release/worker
	@cargo build --release --locked

demo: build ## Train a network on Fashion-MNIST with 2 workers (WORKERS=N for more)
	@folder=$$(deploy/setup/fashion-mnist.sh)
	$(coordinator) dataset add fashion-mnist --format idx "$$folder"
	$(coordinator) run jobs/fashion-nin.toml --workers $(WORKERS)

test: libtorch tools nextest ## Run every test, from nothing
	@started=$$SECONDS
	FASHION_MNIST=$$(deploy/setup/fashion-mnist.sh)
	export FASHION_MNIST
	deploy/setup/promtool.sh
	# The tests in tests/ drive these programs.
	cargo build --release --locked --bins
	cargo nextest run --release --locked --workspace
	cargo test --quiet --release --locked --workspace --doc
	echo "make test: $$((SECONDS - started)) s"

lint: libtorch tools ## Format, clippy, dependency rules, scripts, dashboards
	@deploy/setup/lint.sh

sim: ## Simulated days of a cluster, each drawn from a seed (SEEDS=N for more than 2000)
	@cargo run --quiet --release --locked --package lockstep-sim -- --seeds $(SEEDS)

bench-step: build ## Images/s side by side with PyTorch DistributedDataParallel
	@tests/bench/run_step.sh

bench-train: build ## Training images/s of three networks side by side with PyTorch (CASES="nin googlenet" for some)
	@tests/bench/run_train.sh $(CASES)

bench-gpu: build ## Training images/s on a GPU side by side with PyTorch, eager and compiled (CASES="googlenet" for some)
	@tests/bench/run_gpu.sh $(CASES)

bench-allreduce: build ## All-reduce side by side with Gloo (CASES="shm2 wan" for some; as root for all)
	@tests/bench/run_allreduce.sh

bench-overlap: build ## What part of a step waits for other workers
	@tests/bench/run_overlap.sh

bench-loader: tools ## JPEG decoding and cropping side by side with torchvision (PHOTOS=folder for your own)
	@tests/bench/run_loader.sh

bench-accuracy: build ## Train the small recipes and tell what they reach (CASES="nin googlenet" for some)
	@tests/bench/run_accuracy.sh $(CASES)

chaos: build ## Kill, stop and cut off real processes in the midst of jobs (SEED=n, EVENTS=n or MINUTES=m, JOBS=small; as root for all)
	@export FASHION_MNIST
	FASHION_MNIST=$$(deploy/setup/fashion-mnist.sh)
	chaos=(target/release/chaos --json target/chaos.json $(chaos_arguments))
	# As root in namespaces of its own: whatever ends the run, its processes, mounts and hosts end with it.
	isolated=(unshare --mount --pid --fork --kill-child --mount-proc
	    sh -c 'mkdir -p /run/netns && mount -t tmpfs chaos /run/netns && exec "$$@"' chaos)
	((EUID)) || chaos=("$${isolated[@]}" "$${chaos[@]}")
	exec "$${chaos[@]}"

parity: build ## Every network beside torchvision, timm and others: outputs, gradients, exports, ten steps (CASES="inception-v4" for some)
	@python=$$(deploy/setup/python-parity.sh)
	cargo build --quiet --release --locked --package lockstep-nn --example parity
	data=$$(deploy/setup/fashion-mnist.sh)
	"$$python" worker/nn/parity/compare.py --programs "$$PWD/target/release" --data "$$data" $(CASES)
	"$$python" worker/nn/parity/training.py --programs "$$PWD/target/release" --data "$$data" $(CASES)

parity-fixtures: libtorch ## Compute the reference values of the parity tests again, with PyTorch and the libraries
	@python=$$(deploy/setup/python-parity.sh)
	"$$python" worker/nn/parity/reference.py
	"$$python" worker/nn/parity/architectures.py

deny: ## Licences, advisories and bans of the dependencies (needs cargo-deny)
	@command -v cargo-deny > /dev/null || { echo 'error: cargo-deny is missing' >&2; echo 'hint: cargo install --locked cargo-deny' >&2; exit 1; }
	cargo deny check

clean: ## Remove what was built; what was fetched stays in .deps
	@cargo clean

.ONESHELL:
