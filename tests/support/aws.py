"""The files of infra/aws as Ray and AWS see them: rendered, launched through Ray's own provider, and judged by policies."""

from __future__ import annotations

import copy
import fnmatch
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest.mock import patch

import yaml
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ParamValidationError
from botocore.model import ListShape, Shape, StringShape, StructureShape

from infra.aws.configure import FOLDER, cluster, merge
from tests.support.commands import ROOT, refused

Object = dict[str, Any]
Call = tuple[str, Object]  # operation and its parameters
REGION, ACCOUNT = "us-east-1", "123456789012"
EC2 = f"arn:aws:ec2:{REGION}:{ACCOUNT}:"
PROJECT = "~/vswin/"  # where hosts keep what is mounted

# --- the template ----------------------------------------------------------------------------------------------------

KNOWN = {  # what !Ref, !GetAtt and !Sub give for parameters and resources
    "AWS::Region": REGION,
    "AWS::Partition": "aws",
    "AWS::AccountId": ACCOUNT,
    "ClusterName": "vswin",
    "KeyName": "vswin",
    "CpuImage": "ami-0123456789abcdef0",
    "GpuImage": "ami-0123456789abcdef1",
    "HostSubnet": "subnet-0123456789abcdef0",
    "Hosts.GroupId": "sg-0123456789abcdef0",
    "PlacementGroup": "vswin-near",
    "Bucket": "vswin-bucket",
    "Bucket.Arn": "arn:aws:s3:::vswin-bucket",
    "WorkerRole.Arn": f"arn:aws:iam::{ACCOUNT}:role/worker",
    **{
        name: f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:{name}"
        for name in ("RayToken", "MlflowAdmin", "MlflowAccount", "DatabaseOwner")
    },
}


class Template(yaml.SafeLoader):
    """Reads CloudFormation's short functions as what they give."""


def _function(loader: Template, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return {tag: loader.construct_sequence(node, deep=True)}
    text = str(node.value)
    return re.sub(r"\$\{([^}]+)\}", lambda m: known(m[1]), text) if tag == "Sub" else known(text)


def known(name: str) -> str:
    """The value of a parameter, a resource or one of its attributes."""
    return KNOWN.get(name, name)


Template.add_multi_constructor("!", _function)


@cache
def template() -> Any:
    """stack.yaml, with its functions evaluated."""
    return yaml.load((FOLDER / "stack.yaml").read_text(), Template)


def outputs() -> dict[str, str]:
    """What the stack gives out."""
    return {name: str(one["Value"]) for name, one in template()["Outputs"].items()} | {"DatabaseHost": "10.0.0.5"}


def policies(role: str) -> Iterator[Object]:
    """The statements of all policies of a role."""
    resources = template()["Resources"]
    documents = [p["PolicyDocument"] for p in resources[role]["Properties"].get("Policies", [])]
    attached = [r["Properties"] for r in resources.values() if r["Type"] == "AWS::IAM::ManagedPolicy"]
    documents += [p["PolicyDocument"] for p in attached if role in p["Roles"]]
    yield from (statement for document in documents for statement in document["Statement"])


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def allowed(statements: list[Object], action: str, resource: str, **context: str) -> bool:
    """Whether IAM permits this; a condition on what is not in `context` does not hold."""
    for one in statements:
        conditions = [(how, *item) for how, items in one.get("Condition", {}).items() for item in items.items()]
        if (
            one["Effect"] == "Allow"
            and any(fnmatch.fnmatchcase(action, a) for a in _listed(one["Action"]))
            and any(fnmatch.fnmatchcase(resource, r) for r in _listed(one["Resource"]))
            and all(_holds(how, context.get(key), _listed(values)) for how, key, values in conditions)
        ):
            return True
    return False


def _holds(how: str, value: str | None, wanted: list[str]) -> bool:
    match = {"StringEquals": str.__eq__, "StringLike": fnmatch.fnmatchcase}[how]
    return value is not None and any(match(value, one) for one in wanted)


# --- the cluster ------------------------------------------------------------------------------------------------------


def configuration(*overlays: str) -> Object:
    """What `ray up` is given."""
    return cluster(outputs(), [FOLDER / "overlays" / f"{name}.yaml" for name in overlays])


def changed(config: Object, path: str, value: Any) -> Object:
    """A copy in which one thing is another; None takes it away."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(merge(copy.deepcopy(config), value))


INSTANCE = (
    "<instanceId>i-1</instanceId><privateIpAddress>10.0.0.9</privateIpAddress><instanceState><name>running</name>"
    "</instanceState><tagSet><item><key>Name</key><value>one</value></item></tagSet>"
)
INSTANCES = f"<instancesSet><item>{INSTANCE}</item></instancesSet>"
ANSWERS = {"RunInstances": INSTANCES, "DescribeInstances": f"<reservationSet><item>{INSTANCES}</item></reservationSet>"}


class Answer:
    """The body of an answer of EC2."""

    def __init__(self, text: str) -> None:
        self.text = text

    def stream(self) -> Iterator[bytes]:
        """As botocore reads it."""
        yield self.text.encode()


@cache
def provider(region: str, cluster_name: str) -> tuple[Any, list[Call]]:
    """Ray's own provider, and the calls that it makes; nothing leaves this process."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    made: list[Call] = []

    def note(params: Object, model: Any, **_: Any) -> None:
        made.append((model.name, params))

    def answer(request: Any, **_: Any) -> AWSResponse:
        name = made[-1][0]
        body = f"<{name}Response>{ANSWERS.get(name, '<return>true</return>')}</{name}Response>"
        return AWSResponse(request.url, 200, {}, Answer(body))

    with patch.dict(os.environ, {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}):
        its = AWSNodeProvider({"type": "aws", "region": region, "cache_stopped_nodes": False}, cluster_name)
        for client in (its.ec2.meta.client, its.ec2_fail_fast.meta.client):
            client.meta.events.register("before-parameter-build.ec2.*", note)
            client.meta.events.register("before-send.ec2.*", answer)
    return its, made


def calls(config: Object, node_type: str) -> list[Call]:
    """What Ray's provider asks EC2 for, from the launch of a host of a type to its end.

    Raises:
        ParamValidationError: EC2's own model does not know such a request.
    """
    its, made = provider(config["provider"]["region"], config["cluster_name"])
    made.clear()
    tags = {"ray-node-type": "worker", "ray-launch-config": "0", "ray-user-node-type": node_type, "ray-node-name": "one"}
    (node,) = its.create_node(_bootstrapped(config["available_node_types"][node_type]["node_config"]), tags, 1)
    its.non_terminated_nodes({})
    assert its.is_running(node) and its.internal_ip(node) == "10.0.0.9"
    its.set_node_tags(node, {"ray-node-status": "up-to-date"})
    its.terminate_nodes([node])
    return list(made)


def _bootstrapped(node: Object) -> Object:
    """As Ray hands a node_config to its provider."""
    from ray.autoscaler._private.aws.config import _configure_node_type_from_network_interface

    return dict(_configure_node_type_from_network_interface({"node_config": node})["node_config"])


def not_in(shape: Shape, value: Any, place: str) -> Iterator[str]:
    """Words that the model has no such value for: botocore itself does not look."""
    if isinstance(shape, StringShape) and shape.enum and value not in shape.enum:
        yield f"{place}: {value} is none of EC2's values"
    elif isinstance(shape, ListShape):
        for item in value:
            yield from not_in(shape.member, item, place)
    elif isinstance(shape, StructureShape):
        for name, item in value.items():
            yield from not_in(shape.members[name], item, f"{place}.{name}")


# --- what must hold ---------------------------------------------------------------------------------------------------


def wrong_schema(config: Object) -> Iterator[str]:
    """What Ray itself refuses."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:
        yield str(error).splitlines()[0]


def wrong_requests(config: Object) -> Iterator[str]:
    """Hosts that EC2 cannot be asked for."""
    its, _ = provider(config["provider"]["region"], config["cluster_name"])
    model = its.ec2.meta.client.meta.service_model.operation_model("RunInstances").input_shape
    for name in config["available_node_types"]:
        try:
            for operation, params in calls(config, name):
                if operation == "RunInstances":
                    yield from not_in(model, params, name)
        except (ParamValidationError, ValueError) as error:
            yield f"{name}: {error}"


def wrong_hosts(config: Object) -> Iterator[str]:
    """Hosts that are open, that cost where nothing works, or that lose what they must not."""
    types = config["available_node_types"]
    if config["provider"].get("cache_stopped_nodes") is not False or not config["provider"].get("use_internal_ips"):
        yield "hosts are kept when they go, or have public addresses"
    for name, one in types.items():
        node, is_head = one["node_config"], name == config["head_node_type"]
        if node["MetadataOptions"]["HttpTokens"] != "required" or not all(
            disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"]
        ):
            yield f"{name}: its role is for every process that can make it ask, or its disk is plain"
        if node["IamInstanceProfile"]["Name"] != known("HeadProfile" if is_head else "WorkerProfile"):
            yield f"{name}: has another role than its own"
        if is_head != ("InstanceMarketOptions" not in node) or is_head != (one["resources"].get("CPU") == 0):
            yield f"{name}: the head holds drivers and stays; workers are spot"
        if one.get("min_workers", 0):
            yield f"{name}: costs while nothing works"
        for card in node.get("NetworkInterfaces", []):
            if (card["InterfaceType"], card["DeviceIndex"]) != (("efa-only", 1) if card["NetworkCardIndex"] else ("efa", 0)):
                yield f"{name}: card {card['NetworkCardIndex']} is {card['InterfaceType']} {card['DeviceIndex']}"
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    if not any("--autoscaling-config=~/ray_bootstrap_config.yaml" in line for line in head):
        yield "the head launches no workers"
    if any(
        "ray start" in line and not line.startswith(f". {PROJECT}infra/aws/environment.sh && ") for line in head + worker
    ):
        yield "Ray starts without its environment, and so without a token"
    if not any("--dashboard-host=127.0.0.1" in line for line in head):
        yield "the dashboard listens for others"


def shell_commands(config: Object) -> Iterator[list[str]]:
    """The words of every command that a host runs, without the shell's own."""
    for key in (
        "setup_commands",
        *(f"{one}_{kind}_commands" for one in ("head", "worker") for kind in ("setup", "start_ray")),
    ):
        for line in config[key]:
            for part in re.split(r"&&|;", line):
                words = shlex.split(re.sub(r"[<>]+ *\S+|2>&1", "", part))
                while words and words[0] in ("setsid", "--fork", "flock", "--nonblock", "~/mlflow.lock"):
                    del words[0]
                yield words


def wrong_commands(config: Object) -> Iterator[str]:
    """Commands that their programs refuse, and files that no host has."""
    from ray.scripts.scripts import start

    mounts = {place.removeprefix(PROJECT): source for place, source in config["file_mounts"].items()}
    yield from (f"{source} is not there" for source in mounts.values() if not (ROOT / source).exists())
    for words in shell_commands(config):
        for word in (w for w in words if w.startswith(PROJECT)):
            path = word.removeprefix(PROJECT)
            if not any(path == m or path.startswith(f"{m}/") for m in mounts) or not (ROOT / path).is_file():
                yield f"no host has {path}"
                return
        name, arguments = os.path.basename(words[0]), [w.removeprefix(PROJECT) for w in words[1:]]
        if name == "ray" and arguments[0] == "start":
            options = {option for parameter in start.params for option in parameter.opts}
            given = {word.split("=")[0] for word in arguments[1:]}
            yield from (f"ray start has no option {option}" for option in sorted(given - options))
        elif name == "python":
            yield from refused(["python", *arguments])
        elif name not in ("ray", "bash", ".", "cd"):
            yield f"nothing is known of {name}"
