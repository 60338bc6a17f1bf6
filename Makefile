# make install | demo | unit | test | faults | check | lint | cluster | cluster-status | cluster-down | cluster-demo |
# fault-demo | image-demo | slurm-demo | aws-demo | tracking-demo | kubernetes-dry-run. Needs Python 3.11 and make, and nothing
# else; for what a cluster needs see infra/README.md.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
SEED ?= 0
NODES ?= 3

.PHONY: install demo unit test faults check lint cluster cluster-status cluster-down cluster-demo fault-demo \
	image-demo slurm-demo aws-demo tracking-demo kubernetes-dry-run clean

install: $(VENV)/installed

# A Python's own pip can be years old, and takes twice as long. torch goes first: DeepSpeed's own build asks for it. pip compiles
# on one core, what is only tested too; so that is done beside it and after it.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -x /tests/ $(VENV)/lib >/dev/null 2>&1

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on the PATH; give make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) pip==26.3
	$(PIP_INSTALL) setuptools wheel torch numpy
	@$(COMPILE) & PYTHONWARNINGS='ignore:Editable installation' \
		$(PIP_INSTALL) --no-build-isolation --editable '.[dev]' && wait
	@$(COMPILE) -j 0 || true  # of other Pythons, some
	@touch $@

demo: install
	$(BIN)/python -m infra.local.demo --seed $(SEED) $(if $(DATA),--data $(DATA))

# What each of these runs stands in tests/conftest.py; three processes, and one thread for each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

unit: install
	$(PYTEST) tests/unit -m 'not slow'

test: install
	$(PYTEST) -m 'not faults'

faults: install
	$(PYTEST) -m faults --anew

# All of it at once, as CI does: what takes longest first, and each server and Ray head started once for both.
check: install
	$(PYTEST) tests/faults tests/integration tests/gpu tests/parity tests/unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Several hosts on this machine: infra/README.md.
cluster: install
	$(BIN)/python -m infra.local.hosts up --nodes $(NODES)

cluster-status: install
	$(BIN)/python -m infra.local.hosts status

cluster-down: install
	$(BIN)/python -m infra.local.hosts down

cluster-demo: install
	$(BIN)/python -m infra.local.cluster_demo --nodes $(NODES)

# A training on two hosts while links fail, and the head's host.
fault-demo: install
	$(BIN)/python -m infra.local.fault_demo

# infra/docker's CPU image, built and run here: needs buildah, podman, runc and mmdebstrap. SEEN="--volume=PLACE:PLACE:ro ..." is
# what the build is to see of this machine.
image-demo: install
	$(BIN)/python -m infra.local.image_demo $(SEEN)

slurm-demo: install
	$(BIN)/python -m infra.local.slurm_demo

# MLflow on PostgreSQL and S3, with accounts; KEEP=1 leaves it and the service running, to look at.
tracking-demo: install
	$(BIN)/python -m infra.local.tracking_demo $(if $(KEEP),--keep)

# infra/aws on this machine: needs moto beside the rest (pip install 'moto[server,ec2,iam]').
aws-demo: install
	$(BIN)/python -m infra.local.aws_demo

# What a cluster's API server says of the manifests; nothing is changed. The namespace `vswin` and the operators' CRDs must be
# there. Which cluster: KUBECONFIG, or KUBECTL="kubectl --context NAME".
KUBECTL ?= $(BIN)/kubectl
MANIFESTS ?= platform services kueue $(patsubst infra/kubernetes/%/,%,$(wildcard infra/kubernetes/overlays/*/))
kubernetes-dry-run: install
	@for part in $(MANIFESTS); do \
		echo "== $$part"; \
		$(KUBECTL) kustomize infra/kubernetes/$$part | $(KUBECTL) apply --dry-run=server --filename - || failed="$$failed $$part"; \
	done; [ -z "$$failed" ] || { echo "refused:$$failed"; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
