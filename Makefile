# Every target sets itself up: a virtual environment in .venv with what constraints.txt pins.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= passive

# What the tests compare Inception and the solvers with. The first two import torchvision, which the tests stand in for, and their
# presence would break torchmetrics; so all lie, without what they ask for, where only those tests look.
ORACLES := torch-fidelity==0.4.0 pytorch-fid==0.3.0 diffusers==0.42.1

# What `make bench` compares with, in an environment of its own.
PEERS := diffusers==0.42.1 denoising-diffusion-pytorch==2.3.4 datasets==5.2.0 torchvision
ORIGINAL ?=
NETWORK ?= small

# What --log_to is tried with, where only those tests look.
SINKS := wandb==0.31.0 mlflow-skinny==3.17.2

# What `make docs` builds the site with, in an environment of its own.
SITE := zensical==0.0.73

.PHONY: demo test test-slow bench docs lint types clean

demo: .venv/ready-demo
	@$(BIN)/iddpm data digits data/digits
	@$(BIN)/iddpm train data/digits/train --preset digits --run runs/digits
	@$(BIN)/iddpm sample runs/digits --out runs/digits/digits.png
	@echo "the picture: runs/digits/digits.png    the run: runs/digits"

test: lint types .venv/oracles/ready
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: .venv/ready-dev .venv/sinks/ready
	$(BIN)/python -m pytest -q -m slow -s

bench: .venv/ready-dev .venv/peers/ready
	$(BIN)/python benchmarks/speed.py --network $(NETWORK) --original "$(ORIGINAL)"

docs: .venv/ready-dev .venv/site/ready
	$(BIN)/python docs/site.py build/pages
	.venv/site/bin/zensical build --strict
	@echo "the site: build/site/index.html"

.venv/site/ready: Makefile
	test -x .venv/site/bin/python || $(PYTHON) -m venv .venv/site
	.venv/site/bin/python -m pip install --quiet $(SITE)
	touch $@

.venv/peers/ready: Makefile constraints.txt
	test -x .venv/peers/bin/python || $(PYTHON) -m venv .venv/peers
	.venv/peers/bin/python -m pip install --quiet --constraint constraints.txt torch $(PEERS)
	touch $@

.venv/oracles/ready: Makefile .venv/ready-dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/oracles $(ORACLES)
	touch $@

.venv/sinks/ready: Makefile .venv/ready-dev
	$(BIN)/python -m pip install --quiet --upgrade --target .venv/sinks $(SINKS)
	touch $@

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready-dev
	$(BIN)/mypy

.venv/ready-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
