"""The Kubernetes manifests are valid, and agree with each other, with the image and with the programs that they start.

Schemas are Kubernetes' own and KubeRay's. Each check must find what is planted.
"""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.kubernetes.make_secrets import DATABASE, make
from tests.support import manifest_checks as checks
from tests.support.commands import ROOT
from tests.support.manifests import (
    FOLDER,
    OVERLAYS,
    Object,
    at,
    changed,
    find,
    pods,
    program,
    render,
    world,
    wrong_core_objects,
    wrong_ray_objects,
)

Check = Callable[[list[Object]], Iterator[str]]
SLOW = pytest.mark.slow
CHECKS = [
    wrong_ray_objects,
    checks.wrong_commands,
    pytest.param(checks.wrong_mlflow, marks=SLOW),
    checks.wrong_sizes,
    checks.wrong_times,
    checks.wrong_images,
    checks.wrong_ports,
    checks.wrong_names,
    checks.wrong_security,
    checks.wrong_policies,
    checks.wrong_quotas,
]
HEAD, WORKER = "spec.headGroupSpec", "spec.workerGroupSpecs.0"
JOB = "spec.rayClusterSpec"
GPU = f"{JOB}.workerGroupSpecs.0.template.spec"
CPU = f"{WORKER}.template.spec"
ANYBODY = [{"podSelector": {}}]
OPEN = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{"from": ANYBODY}], "egress": [{"to": ANYBODY}]}
MLFLOW = "spec.template.spec.containers.0"
PLANTED = [  # check, overlay, kind, path, what is put there, name
    (wrong_ray_objects, "trial", "RayCluster", "spec.headGroupSpecs", {}, None),
    (wrong_ray_objects, "trial", "RayCluster", f"{HEAD}.rayStartParam", {}, None),
    (wrong_ray_objects, "trial", "RayCluster", f"{WORKER}.replicas", "one", None),
    (wrong_ray_objects, "trial", "RayCluster", "spec.authOptions.mode", "tokenn", None),
    (wrong_ray_objects, "trial", "RayCluster", f"{CPU}.containers.0.resources.limits.memory", "8 GB", None),
    (wrong_ray_objects, "trial", "RayCluster", f"{CPU}.containers.0.resources.limits.memory", "8Gb", None),
    (wrong_ray_objects, "trial", "RayCluster", "apiVersion", "ray.io/v1alpha1", None),
    (wrong_ray_objects, "trial-job", "RayJob", "spec.backOffLimit", 3, None),
    (wrong_ray_objects, "trial-job", "RayJob", f"{GPU}.containers.0.nme", "x", None),
    (wrong_ray_objects, "trial-job", "RayJob", f"{JOB}.headGroupSpec.template", ..., None),
    (wrong_core_objects, "trial", "Service", "spec.ports.0.port", "http", "redis"),
    (wrong_core_objects, "trial", "StatefulSet", "spec.template.spec.container", [], "redis"),
    (wrong_core_objects, "trial", "NetworkPolicy", "spec.podSelecter", {}, "redis"),
    (wrong_core_objects, "trial", "RayCluster", f"{CPU}.terminationGracePeriodSecond", 1, None),
    (
        checks.wrong_commands,
        "trial-job",
        "RayJob",
        "spec.entrypoint",
        "python /opt/vswin/jobs/train.py --recipes demo",
        None,
    ),
    (checks.wrong_commands, "trial-job", "RayJob", "spec.entrypoint", "python /opt/vswin/jobs/train.py --recipe k", None),
    (
        checks.wrong_commands,
        "prepare",
        "RayJob",
        "spec.entrypoint",
        "python /opt/vswin/jobs/prepare.py folder --out x",
        None,
    ),
    (checks.wrong_commands, "trial", "RayCluster", f"{WORKER}.rayStartParams.num-cpu", "1", None),
    (checks.wrong_commands, "trial", "RayCluster", f"{CPU}.containers.0.lifecycle.preStop.exec.command.2", "--for", None),
    pytest.param(checks.wrong_mlflow, "trial", "Deployment", f"{MLFLOW}.args.0", "--ap-name=x", "mlflow", marks=SLOW),
    pytest.param(checks.wrong_mlflow, "trial", "Deployment", f"{MLFLOW}.env.3.value", "10.*", "mlflow", marks=SLOW),
    (checks.wrong_sizes, "train-efa", "RayJob", f"{JOB}.workerGroupSpecs.0.replicas", 3, None),
    (checks.wrong_sizes, "train-efa", "RayJob", f"{GPU}.containers.0.resources.limits.cpu", "70", None),
    (checks.wrong_sizes, "train-efa", "RayJob", f"{GPU}.volumes.0.emptyDir.sizeLimit", "600Gi", None),
    (checks.wrong_sizes, "train-efa", "RayJob", f"{GPU}.volumes.2.emptyDir.sizeLimit", "600Gi", None),
    (checks.wrong_sizes, "trial-job", "RayJob", f"{JOB}.enableInTreeAutoscaling", True, None),
    (checks.wrong_sizes, "trial", "RayCluster", f"{HEAD}.rayStartParams.num-cpus", "2", None),
    (checks.wrong_times, "trial-job", "RayJob", f"{GPU}.terminationGracePeriodSeconds", 30, None),
    (checks.wrong_times, "trial-job", "RayJob", f"{GPU}.containers.0.lifecycle.preStop.exec.command.3", "120", None),
    (checks.wrong_times, "train-efa", "RayJob", f"{JOB}.headGroupSpec.template.spec.containers.0.env.3.value", "3", None),
    (checks.wrong_images, "trial", "RayCluster", f"{CPU}.containers.0.image", "registry.example.com/vswin-tpu:0.1.0", None),
    (checks.wrong_images, "trial", "RayCluster", f"{CPU}.containers.0.image", "registry.example.com/vswin-cpu:0.0.9", None),
    (checks.wrong_images, "trial", "RayCluster", f"{CPU}.containers.0.image", "docker.io/rayproject/ray:latest", None),
    (checks.wrong_images, "trial", "RayCluster", "spec.rayVersion", "2.59.0", None),
    (checks.wrong_images, "trial", "RayCluster", f"{CPU}.securityContext.runAsUser", 1001, None),
    (checks.wrong_ports, "trial", "RayCluster", f"{CPU}.containers.0.livenessProbe.httpGet.port", 8265, None),
    (checks.wrong_ports, "trial", "RayCluster", f"{WORKER}.rayStartParams.metrics-export-port", "8081", None),
    (checks.wrong_ports, "trial", "RayCluster", "spec.gcsFaultToleranceOptions.redisAddress", "redis:6380", None),
    (checks.wrong_ports, "trial", "Service", "spec.ports.0.port", 5001, "mlflow"),
    (checks.wrong_ports, "trial", "ConfigMap", "data.MLFLOW_TRACKING_URI", "http://tracking:5000", "vswin-endpoints"),
    (checks.wrong_names, "trial", "RayCluster", f"{CPU}.containers.0.env.0.valueFrom.secretKeyRef.key", "user", None),
    (checks.wrong_names, "trial", "RayCluster", f"{CPU}.containers.0.envFrom.0.configMapRef.name", "endpoints", None),
    (checks.wrong_names, "trial", "RayCluster", f"{CPU}.priorityClassName", "high", None),
    (checks.wrong_names, "trial", "ServiceAccount", "metadata.name", "ray", "vswin-ray"),
    (checks.wrong_security, "trial", "RayCluster", "spec.authOptions", ..., None),
    (checks.wrong_security, "trial", "RayCluster", f"{CPU}.containers.0.env.1", {"name": "A_PASSWORD", "value": "x"}, None),
    (checks.wrong_security, "trial", "RayCluster", f"{CPU}.securityContext.runAsNonRoot", False, None),
    (checks.wrong_security, "trial", "RayCluster", f"{CPU}.containers.0.livenessProbe", ..., None),
    (checks.wrong_security, "trial", "Deployment", f"{MLFLOW}.args.0", "--app-name=none", "mlflow"),
    (checks.wrong_security, "trial", "ServiceAccount", "metadata.annotations", ..., "vswin-ray"),
    (checks.wrong_policies, "trial", "NetworkPolicy", "spec.egress.1", ..., "ray"),
    (checks.wrong_policies, "trial", "NetworkPolicy", "spec.podSelector.matchLabels", {"app": "none"}, "postgres"),
    (checks.wrong_policies, "trial", "NetworkPolicy", "spec", OPEN, "deny"),
    (checks.wrong_policies, "trial-job", "NetworkPolicy", "spec.ingress.1", ..., "ray"),
    (checks.wrong_policies, "trial", "NetworkPolicy", "spec.ingress", [], "prometheus"),
    (checks.wrong_policies, "trial", "NetworkPolicy", "spec.ingress.0.from.0", {"namespaceSelector": {}}, "prometheus"),
    (checks.wrong_policies, "trial", "NetworkPolicy", "spec.ingress.0.ports", ..., "prometheus"),
    (checks.wrong_quotas, "train-efa", "RayJob", f"{JOB}.workerGroupSpecs.0.replicas", 5, None),
    (checks.wrong_quotas, "train-efa", "RayJob", f"{GPU}.containers.0.resources.requests.other", 1, None),
    (checks.wrong_quotas, "train-efa", "LocalQueue", "metadata.name", "other", None),
]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_wrong(check: Check, overlay: str) -> None:
    assert list(check(world(overlay))) == []


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["platform", "services", *(f"overlays/{name}" for name in OVERLAYS)])
def test_kubernetes_takes_every_object(folder: str) -> None:
    assert list(wrong_core_objects(render(folder))) == []


@pytest.mark.slow
@pytest.mark.parametrize("check, overlay, kind, path, value, name", PLANTED)
def test_a_check_finds_what_is_wrong(check: Check, overlay: str, kind: str, path: str, value: Any, name: str | None) -> None:
    objects = render(f"overlays/{overlay}") if check is wrong_core_objects else world(overlay)
    assert list(check(changed(objects, kind, path, value, name)))


def test_every_manifest_is_rendered() -> None:
    """No folder is left out of the checks, and no file out of its folder's list."""
    files = {p for p in FOLDER.rglob("*.yaml") if p.name != "kustomization.yaml"}
    for file in files:
        assert re.search(rf"^  - {file.name}$", (file.parent / "kustomization.yaml").read_text(), re.MULTILINE), file
    used = "".join(p.read_text() for p in (FOLDER / "overlays").rglob("kustomization.yaml"))
    for component in (FOLDER / "components").iterdir():
        assert f"../../components/{component.name}\n" in used, component


def test_each_fabric_has_its_devices_and_its_variables() -> None:
    """And no others of NCCL and libfabric."""
    expected = {
        "gpu": {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN"},
        "train-efa": {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN", "FI_EFA_USE_HUGE_PAGE": "0"},
        "train-infiniband": {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "mlx5"},
    }
    fabric = {"train-efa": {"vpc.amazonaws.com/efa": 32}, "train-infiniband": {"rdma/rdma_shared_device_a": 1}}
    for overlay, variables in expected.items():
        (worker,) = [p for p in pods(render(f"overlays/{overlay}")) if p.owner == "worker"]
        assert {k: v for k, v in worker.environment().items() if re.match("NCCL|FI_|RDMAV", k)} == variables
        limits = {k: v for k, v in worker.main["resources"]["limits"].items() if "/" in k}
        assert limits == {"nvidia.com/gpu": 8} | fabric.get(overlay, {})
        assert limits.items() <= worker.main["resources"]["requests"].items()
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker.spec["tolerations"]


def test_what_is_to_be_replaced_is_named() -> None:
    """The namespaces of others that policies let in."""
    readme = " ".join((FOLDER / "README.md").read_text().split())
    named = {name for name, _, _ in checks.let_in(world("trial"))}
    assert named == {"kuberay-system", "monitoring"} and all(f"`{name}`" in readme for name in named)


def test_a_job_leaves_no_cluster() -> None:
    for overlay in OVERLAYS:
        objects = render(f"overlays/{overlay}")
        kinds = [o["kind"] for o in objects if o["apiVersion"] == "ray.io/v1"]
        assert len(kinds) == 1
        if kinds == ["RayJob"]:
            assert at(find(objects, "RayJob"), "spec.shutdownAfterJobFinishes") is True
            assert at(find(objects, "RayJob"), "spec.backoffLimit") > 0


def test_prometheus_scrapes_the_hosts_of_ray() -> None:
    (job,) = checks.scrape_configuration()["scrape_configs"]
    kept = {r["source_labels"][0]: r["regex"] for r in job["relabel_configs"] if r.get("action") == "keep"}
    for pod in pods(render("overlays/trial")):
        labels = {f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', k)}": v for k, v in pod.labels.items()}
        names = [labels | {"__meta_kubernetes_pod_container_port_name": p["name"]} for p in pod.main["ports"]]
        scraped = [n for n in names if all(re.fullmatch(regex, n.get(label, "")) for label, regex in kept.items())]
        assert len(scraped) == (pod.start is not None), pod.owner


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    promtool = program("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's prometheus)")
    given = yaml.safe_load(find(render("services"), "ConfigMap", "prometheus")["data"]["prometheus.yml"])
    [job] = given["scrape_configs"]
    # Debian's build knows no Kubernetes, and refuses the section.
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"own_namespace": True}}]
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(yaml.safe_dump(given))
    done = subprocess.run([promtool, "check", "config", configuration], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_secrets_are_all_used_and_agree() -> None:
    secrets = {s["metadata"]["name"]: s["stringData"] for s in make(DATABASE, "vswin")}
    used = {(n, k) for o in OVERLAYS for p in pods(world(o)) for kind, n, k in checks._named(p) if kind == "secret"}
    assert used | {("redis", "password")} == {(name, key) for name, data in secrets.items() for key in data}
    uri = f"postgresql://mlflow:{secrets['postgres']['mlflow-password']}@postgres:5432"
    assert secrets["mlflow-server"]["backend-store-uri"] == f"{uri}/mlflow"
    accounts = configparser.RawConfigParser()
    accounts.read_string(secrets["mlflow-server"]["auth.ini"])
    assert accounts["mlflow"]["database_uri"] == f"{uri}/mlflow_auth"
    again = {s["metadata"]["name"]: s["stringData"] for s in make(DATABASE, "vswin")}
    assert all(
        value != again[name][key] for name, data in secrets.items() for key, value in data.items() if key != "username"
    )
    script = find(render("services"), "ConfigMap", "postgres-init")["data"]["10-mlflow.sh"]
    assert set(re.findall(r"CREATE DATABASE (\w+) OWNER mlflow", script)) == {"mlflow", "mlflow_auth"}
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_mlflow_reads_the_accounts_that_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own reader, without the server around it."""
    command = [
        sys.executable,
        "-m",
        "infra.kubernetes.make_secrets",
        "--namespace",
        "other",
        "--database",
        "postgresql://db:1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    secrets = {s["metadata"]["name"]: s for s in json.loads(done.stdout)["items"]}
    assert {s["metadata"]["namespace"] for s in secrets.values()} == {"other"}
    (tmp_path / "auth.ini").write_text(secrets["mlflow-server"]["stringData"]["auth.ini"])
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(tmp_path / "auth.ini"))
    mlflow = importlib.util.find_spec("mlflow")
    assert mlflow is not None and mlflow.submodule_search_locations
    reader = runpy.run_path(str(Path(mlflow.submodule_search_locations[0], "server/auth/config.py")))
    accounts = reader["read_auth_config"]()
    assert accounts.default_permission == "READ", "with none, nobody may ask for a name that is not taken yet"
    assert accounts.database_uri == "postgresql://db:1/mlflow_auth"
    assert len(accounts.admin_password) >= 12  # fewer are refused
