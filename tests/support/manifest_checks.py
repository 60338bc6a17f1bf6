"""What must agree in the manifests: with each other, with the image, and with the programs that they start.

Each check gives what is wrong; `objects` are those of an overlay with platform, services and queues.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

from infra.kubernetes.make_secrets import DATABASE, make
from tests.support.commands import ROOT, program, refused
from tests.support.manifests import Object, Pod, at, find, pods, quantity, ray_clusters, render
from vswin_dist import __version__
from vswin_dist.config import Settings, load_settings

IMAGE_ROOT = "/opt/vswin/"  # where the image keeps jobs/ and infra/docker/, as in the repository
OPERATORS_PORT = 8080  # KubeRay's, for the metrics of a host


def entrypoints(objects: list[Object]) -> list[list[str]]:
    """The words of each job's command, with the paths of this repository."""
    return [shlex.split(o["spec"]["entrypoint"].replace(IMAGE_ROOT, "")) for o in objects if o["kind"] == "RayJob"]


def trainings(objects: list[Object]) -> list[Settings]:
    """The settings of the jobs that train."""
    found = []
    for words in entrypoints(objects):
        if words[1] == "jobs/train.py":
            parser, arguments = program(words[1:])
            given = parser.parse_args(arguments)
            found.append(load_settings(given.recipe, given.settings))
    return found


def hook(pod: Pod) -> Any:
    """What the program of a host's preStop hook is given."""
    words = [w.replace(IMAGE_ROOT, "") for w in at(pod.main, "lifecycle.preStop.exec.command")]
    assert words[0] == "python"
    parser, arguments = program(words[1:])
    return parser.parse_args(arguments)


# --- commands ----------------------------------------------------------------------------------------------------


def wrong_commands(objects: list[Object]) -> Iterator[str]:
    """Commands that their programs refuse, and settings that are none."""
    from ray.scripts.scripts import start

    for words in entrypoints(objects):
        yield from refused(words)
    for pod in pods(objects):
        if pod.start is not None:
            known = {option for parameter in start.params for option in parameter.opts}
            yield from (f"ray start has no option --{name}" for name in pod.start if f"--{name}" not in known)
            yield from refused([w.replace(IMAGE_ROOT, "") for w in at(pod.main, "lifecycle.preStop.exec.command")])


def wrong_mlflow(objects: list[Object]) -> Iterator[str]:
    """A command that MLflow does not take, and hosts for which it refuses requests. Importing its server takes seconds."""
    from mlflow.cli import server
    from mlflow.server.security_utils import is_allowed_host_header

    (pod,) = [p for p in pods(objects) if p.owner == "mlflow"]
    if pod.main["command"] != ["tini", "--", "mlflow", "server"]:
        yield f"MLflow is started by {pod.main['command']}"
    known = {option for parameter in server.params for option in parameter.opts}
    given = [argument.split("=")[0] for argument in pod.main["args"]]
    yield from (f"mlflow server has no option {option}" for option in given if option not in known)
    tracking = find(objects, "ConfigMap", "vswin-endpoints")["data"]["MLFLOW_TRACKING_URI"]
    allowed = pod.environment()["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    if not is_allowed_host_header(allowed, tracking.removeprefix("http://")):
        yield f"MLflow refuses requests for {tracking}: they are not for {allowed}"


def wrong_sizes(objects: list[Object]) -> Iterator[str]:
    """Trainings that do not fit their hosts, and hosts whose parts are larger than the whole."""
    for pod in (p for p in pods(objects) if p.start is not None):
        limits, requests = pod.main["resources"]["limits"], pod.main["resources"]["requests"]
        volumes = {v["name"]: v["emptyDir"] for v in pod.spec["volumes"]}
        shared = quantity(volumes["shm"]["sizeLimit"])
        if float(pod.start["object-store-memory"]) > shared / 2:
            yield f"{pod.owner}: the object store leaves the loader less than half of /dev/shm"
        if shared > quantity(limits["memory"]) / 2:
            yield f"{pod.owner}: /dev/shm counts as memory, and is more than half of its limit"
        on_disk = sum(quantity(v["sizeLimit"]) for v in volumes.values() if v.get("medium") != "Memory")
        if on_disk > quantity(requests["ephemeral-storage"]):
            yield f"{pod.owner}: its folders may grow beyond the storage that it asks for"
    for cluster in ray_clusters(objects):
        if at(cluster, "headGroupSpec.rayStartParams.num-cpus") != "0":
            yield "the head takes ranks"
        for settings in trainings(objects):
            yield from _too_many_ranks(settings, [p for p in pods(objects) if p.owner == "worker"])
            if cluster.get("enableInTreeAutoscaling"):
                yield "a training is refused where its hosts come when asked for"


def _too_many_ranks(settings: Settings, workers: list[Pod]) -> Iterator[str]:
    wanted = settings.training
    room = 0.0
    for pod in workers:
        limits = pod.main["resources"]["limits"]
        cpus, gpus = quantity(limits["cpu"]), quantity(limits.get("nvidia.com/gpu", 0))
        room += pod.count * min(cpus // wanted.cpus_per_worker, gpus if wanted.use_gpu else float("inf"))
    if room != wanted.workers:
        yield f"training.workers={wanted.workers}, and the hosts have room for {room:g}"


def wrong_times(objects: list[Object]) -> Iterator[str]:
    """Times that do not let a training write its checkpoint before its hosts are ended."""
    times: list[tuple[str, float]] = [
        ("training.grace_s", max((s.training.grace_s for s in trainings(objects)), default=30))
    ]
    heads = [p for p in pods(objects) if p.owner == "head"]
    for pod in (p for p in pods(objects) if p.start is not None):
        patience = float(heads[0].environment()["RAY_JOB_STOP_WAIT_TIME_S"])
        ladder = [
            *times,
            ("RAY_JOB_STOP_WAIT_TIME_S", patience),
            ("preStop --within", hook(pod).within),
            ("terminationGracePeriodSeconds", pod.spec["terminationGracePeriodSeconds"]),
        ]
        for (lower, less), (higher, more) in pairwise(ladder):
            if more < less + 10:
                yield f"{pod.owner}: {higher} of {more:g} s is not 10 s above {lower} of {less:g} s"


# --- images, ports, names ----------------------------------------------------------------------------------------


@cache
def dockerfile() -> str:
    """The one of infra/docker."""
    return (ROOT / "infra/docker/Dockerfile").read_text()


def wrong_images(objects: list[Object]) -> Iterator[str]:
    """Images that nobody builds, of another version, or that run as another user than the one they were made for."""
    pinned = dict(re.findall(r"^(ray|mlflow)==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile(), re.MULTILINE)
    user = int(re.findall(r"^USER (\d+):\d+$", dockerfile(), re.MULTILINE)[-1])
    for pod in pods(objects):
        for container in pod.spec["containers"]:
            name, tag = re.fullmatch(r"(?:\S+/)+([\w-]+):([\w.-]+)", container["image"]).groups()  # type: ignore[union-attr]
            if tag == "latest":
                yield f"{pod.owner}: {container['image']} is another image tomorrow"
            if name.startswith("vswin-"):
                if name.removeprefix("vswin-") not in stages:
                    yield f"the Dockerfile has no stage for {name}"
                if tag != __version__:
                    yield f"{name}:{tag} is not of version {__version__}"
                if pod.spec["securityContext"]["runAsUser"] != user:
                    yield f"{pod.owner}: the image's user is {user}"
    for cluster in ray_clusters(objects):
        if cluster["rayVersion"] != pinned["ray"]:
            yield f"rayVersion {cluster['rayVersion']} is not the {pinned['ray']} of the image"


def wrong_ports(objects: list[Object]) -> Iterator[str]:
    """Ports on which nothing listens."""
    from ray._private import ray_constants

    agent, dashboard = ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT, ray_constants.DEFAULT_DASHBOARD_PORT
    for pod in (p for p in pods(objects) if p.start is not None):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if at(pod.main, f"{probe}.httpGet") != {"path": "/api/healthz", "port": agent}:
                yield f"{pod.owner}: its {probe} does not ask Ray's agent"
        ports = {p["name"]: p["containerPort"] for p in pod.main["ports"]}
        if not pod.start["metrics-export-port"] == str(ports["metrics"]) == str(OPERATORS_PORT):
            yield f"{pod.owner}: metrics are at {pod.start['metrics-export-port']}, declared as {ports['metrics']}"
        if pod.owner == "head":
            right = {"gcs-server": ray_constants.DEFAULT_PORT, "dashboard": dashboard, "client": 10001}
            yield from (f"head: {name} is at {port}" for name, port in right.items() if ports.get(name) != port)
    served = {}
    for service in (o for o in objects if o["kind"] == "Service"):
        (pod,) = [p for p in pods(objects) if service["spec"]["selector"].items() <= p.labels.items()]
        names = {p["name"]: p["containerPort"] for p in pod.main["ports"]}
        for port in service["spec"]["ports"]:
            if names.get(port["targetPort"]) != port["port"]:
                yield f"{service['metadata']['name']}: nothing listens on {port['port']} ({port['targetPort']})"
            served[f"{service['metadata']['name']}:{port['port']}"] = pod
    tracking = find(objects, "ConfigMap", "vswin-endpoints")["data"]["MLFLOW_TRACKING_URI"]
    redis = [c["gcsFaultToleranceOptions"]["redisAddress"] for c in ray_clusters(objects) if "gcsFaultToleranceOptions" in c]
    for place in [tracking.removeprefix("http://"), DATABASE.split("@")[1], *redis]:
        if place not in served:
            yield f"no service is at {place}"


def _named(pod: Pod) -> Iterator[tuple[str, str, str | None]]:
    """(kind, name, key) of the secrets and maps that a pod takes something from."""
    for container in pod.spec["containers"]:
        for source in [v.get("valueFrom", {}) for v in container.get("env", [])]:
            for kind in ("secretKeyRef", "configMapKeyRef"):
                if reference := source.get(kind):
                    yield kind[:-6], reference["name"], reference["key"]
        yield from (("configMap", e["configMapRef"]["name"], None) for e in container.get("envFrom", []))
    for volume in pod.spec.get("volumes", []):
        if "configMap" in volume:
            yield "configMap", volume["configMap"]["name"], None
        if secret := volume.get("secret"):
            yield from (("secret", secret["secretName"], item["key"]) for item in secret["items"])


def wrong_names(objects: list[Object]) -> Iterator[str]:
    """Secrets, maps, accounts and priorities that are not there."""
    made = {(s["metadata"]["name"], key) for s in make(DATABASE, "vswin") for key in s["stringData"]}
    maps = {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "ConfigMap"}
    there = {(o["kind"], o["metadata"]["name"]) for o in objects}
    used = [(pod.owner, *one) for pod in pods(objects) for one in _named(pod)]
    for cluster in ray_clusters(objects):
        if reference := at(cluster, "gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef"):
            used.append(("cluster", "secret", reference["name"], reference["key"]))
    for owner, kind, name, key in used:
        if kind == "secret" and (name, key) not in made:
            yield f"{owner}: make_secrets makes no {key} of {name}"
        if kind == "configMap" and (name not in maps or (key or next(iter(maps[name]))) not in maps[name]):
            yield f"{owner}: there is no {key} in the map {name}"
    for pod in pods(objects):
        for kind, field in (("ServiceAccount", "serviceAccountName"), ("PriorityClass", "priorityClassName")):
            if (name := pod.spec.get(field)) and (kind, name) not in there:
                yield f"{pod.owner}: there is no {kind} {name}"


def wrong_security(objects: list[Object]) -> Iterator[str]:
    """Secrets in the open, doors without a lock, and pods that the namespace's standard `restricted` refuses."""
    yield from (f"{o['metadata']['name']} is a secret" for o in objects if o["kind"] == "Secret")
    for cluster in ray_clusters(objects):
        if at(cluster, "authOptions.mode") != "token":
            yield "a cluster asks for no token"
    for pod in pods(objects):
        context = pod.spec["securityContext"]
        if not context.get("runAsNonRoot") or at(context, "seccompProfile.type") != "RuntimeDefault":
            yield f"{pod.owner}: may be root, or without seccomp"
        for container in pod.spec["containers"]:
            own = container["securityContext"]
            if own.get("allowPrivilegeEscalation") is not False or at(own, "capabilities") != {"drop": ["ALL"]}:
                yield f"{pod.owner}: may gain rights"
            if (
                not {"cpu", "memory"} <= container["resources"]["requests"].keys()
                or "memory" not in container["resources"]["limits"]
            ):
                yield f"{pod.owner}: does not say what it needs"
            if pod.owner != "submitter" and not container.keys() >= {"readinessProbe", "livenessProbe"}:
                yield f"{pod.owner}: is not probed"
            for variable in container.get("env", []):
                if re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY|STORE_URI", variable["name"]):
                    if "secretKeyRef" not in variable.get("valueFrom", {}):
                        yield f"{pod.owner}: {variable['name']} is in the open"
                    if variable["name"].startswith("AWS_"):
                        yield f"{pod.owner}: takes a key where its account has a role"
        if pod.labels.get("vswin/storage") and not _has_role(objects, pod.spec["serviceAccountName"]):
            yield f"{pod.owner}: its account has no role"
    (mlflow,) = [p for p in pods(objects) if p.owner == "mlflow"]
    if "--app-name=basic-auth" not in mlflow.main["args"]:
        yield "MLflow asks for no account"


def _has_role(objects: list[Object], account: str) -> bool:
    annotations = at(find(objects, "ServiceAccount", account), "metadata.annotations") or {}
    return str(annotations.get("eks.amazonaws.com/role-arn", "")).startswith("arn:aws:iam::")


# --- who may speak to whom ----------------------------------------------------------------------------------------


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a selector of labels takes a pod."""
    wanted: Any = selector.get("matchLabels", {}).items()
    listed = selector.get("matchExpressions", [])
    return wanted <= labels.items() and all(labels.get(e["key"]) in e["values"] for e in listed if e["operator"] == "In")


def _lets(objects: list[Object], way: str, here: dict[str, str], there: dict[str, str], port: int) -> bool:
    """Whether the policies of the pod `here` let it receive from (`Ingress`) or send to (`Egress`) the pod `there`."""
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    mine = [p for p in policies if way in p["policyTypes"] and _selects(p["podSelector"], here)]
    peers = {"Ingress": "from", "Egress": "to"}[way]
    rules = [rule for policy in mine for rule in policy.get(way.lower(), [])]
    return not mine or any(
        any("podSelector" in p and "namespaceSelector" not in p and _selects(p["podSelector"], there) for p in rule[peers])
        and port in [p["port"] for p in rule.get("ports", [{"port": port}])]
        for rule in rules
    )


def reachable(objects: list[Object]) -> set[tuple[str, str, int]]:
    """(from, to, port) of the connections between pods that the policies let through; 40000 is any port."""
    found = set()
    for a in pods(objects):
        for b in pods(objects):
            for port in (5000, 5432, 6379, 8080, 8265, 9090, 40000):
                if _lets(objects, "Egress", a.labels, b.labels, port) and _lets(
                    objects, "Ingress", b.labels, a.labels, port
                ):
                    found.add((a.owner, b.owner, port))
    return found


def let_in(objects: list[Object]) -> set[tuple[str, str, int]]:
    """(namespace, to, port) of what policies let in from other namespaces; `any`, and 40000, where they name none."""
    found = set()
    for policy in (o["spec"] for o in objects if o["kind"] == "NetworkPolicy"):
        rules = policy.get("ingress", []) if "Ingress" in policy["policyTypes"] else []
        peers = [(peer["namespaceSelector"], rule) for rule in rules for peer in rule["from"] if "namespaceSelector" in peer]
        for selector, rule in peers:
            namespace = selector.get("matchLabels", {}).get("kubernetes.io/metadata.name", "any")
            ports = [p["port"] for p in rule.get("ports", [{"port": 40000}])]
            taken = [pod.owner for pod in pods(objects) if _selects(policy["podSelector"], pod.labels)]
            found |= {(namespace, owner, port) for owner in taken for port in ports}
    return found


def wrong_policies(objects: list[Object]) -> Iterator[str]:
    """Connections that are needed and closed, or open and not needed."""
    owners = {pod.owner for pod in pods(objects)}
    hosts = {"head", "worker"}
    needed = {(a, b, port) for a in hosts for b in hosts for port in (5000, 5432, 6379, 8080, 8265, 9090, 40000)}
    needed |= (
        {(a, "mlflow", 5000) for a in hosts} | {("prometheus", b, 8080) for b in hosts} | {("mlflow", "postgres", 5432)}
    )
    needed |= {(a, "redis", 6379) for a in hosts if "redis" in owners} | (
        {("submitter", "head", 8265)} if "submitter" in owners else set()
    )
    needed |= {("kuberay-system", host, 8265) for host in hosts} | {("monitoring", "prometheus", 9090)}
    there = reachable(objects) | let_in(objects)
    yield from (f"closed: {' -> '.join(map(str, one))}" for one in sorted(needed - there))
    yield from (f"open: {' -> '.join(map(str, one))}" for one in sorted(there - needed))


# --- the queue ----------------------------------------------------------------------------------------------------


def wrong_quotas(objects: list[Object]) -> Iterator[str]:
    """Queued jobs that would wait for ever."""
    queues = {o["metadata"]["name"]: o["spec"]["clusterQueue"] for o in objects if o["kind"] == "LocalQueue"}
    for job in (o for o in objects if o["kind"] == "RayJob"):
        queue = at(job, "metadata.labels").get("kueue.x-k8s.io/queue-name") if at(job, "metadata.labels") else None
        if queue is None:
            continue
        if queue not in queues:
            yield f"{job['metadata']['name']}: there is no queue {queue}"
            continue
        (group,) = find(objects, "ClusterQueue", queues[queue])["spec"]["resourceGroups"]
        quota = {r["name"]: quantity(r["nominalQuota"]) for r in group["flavors"][0]["resources"]}
        asked: dict[str, float] = {}
        for pod in pods([job]):
            for name, amount in pod.main["resources"]["requests"].items():
                asked[name] = asked.get(name, 0) + pod.count * quantity(amount)
        yield from (
            f"{name}: {amount:g} of {quota.get(name, 0):g}" for name, amount in asked.items() if amount > quota.get(name, 0)
        )
        if at(job, "spec.rayClusterSpec.enableInTreeAutoscaling"):
            yield "a queued job has a size"


def scrape_configuration() -> Any:
    """Prometheus' own."""
    import yaml

    return yaml.safe_load(find(render("services"), "ConfigMap", "prometheus")["data"]["prometheus.yml"])
