"""The files of infra/aws against Ray's schema, EC2's model, CloudFormation's, and the programs that they start.

Each check must find what is planted. The whole loop is `make aws-demo`.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.aws.configure import FOLDER, OVERLAYS, cluster, merge
from infra.aws.host_secrets import write
from tests.support.aws import (
    EC2,
    KNOWN,
    Object,
    allowed,
    calls,
    changed,
    configuration,
    outputs,
    policies,
    template,
    wrong_commands,
    wrong_hosts,
    wrong_requests,
    wrong_schema,
)
from tests.support.commands import ROOT, program, refused
from vswin_dist.config import load_settings
from vswin_dist.errors import ConfigError

Check = Callable[[Object], Iterator[str]]
GPU = "available_node_types.gpu.node_config"
START = ["~/venv/bin/ray start --head"]
PLANTED: list[tuple[Check, str, Any]] = [  # check, path, what is put there
    (wrong_schema, "max_workers", "x"),
    (wrong_schema, "available_node_types.gpu.node_config", None),
    (wrong_schema, "head_node_type", "haed"),
    (wrong_schema, "idle_timeout", 5),
    (wrong_requests, f"{GPU}.InstanceTyp", "p4d.24xlarge"),
    (wrong_requests, f"{GPU}.InstanceType", "p4d.25xlarge"),
    (wrong_requests, f"{GPU}.Placement", {"Group": "x"}),
    (wrong_requests, f"{GPU}.InstanceMarketOptions.MarketType", "spott"),
    (wrong_requests, f"{GPU}.NetworkInterfaces", [{"DeviceIndex": "0", "SubnetId": "s", "Groups": ["g"]}]),
    (wrong_hosts, f"{GPU}.MetadataOptions", {"HttpTokens": "optional"}),
    (wrong_hosts, f"{GPU}.InstanceMarketOptions", None),
    (wrong_hosts, f"{GPU}.IamInstanceProfile.Name", "HeadProfile"),
    (wrong_hosts, "available_node_types.gpu.min_workers", 1),
    (wrong_hosts, "available_node_types.head.resources.CPU", 4),
    (wrong_hosts, "provider.use_internal_ips", None),
    (wrong_hosts, "head_start_ray_commands", START),
    (wrong_commands, "head_start_ray_commands", ["~/venv/bin/ray start --head --dashboard-hosts=127.0.0.1"]),
    (wrong_commands, "setup_commands", ["bash ~/vswin/infra/aws/hosts.sh"]),
    (wrong_commands, "setup_commands", ["~/venv/bin/python ~/vswin/infra/aws/host_secrets.py --region x --tokens y"]),
    (wrong_commands, "setup_commands", ["~/venv/bin/python ~/vswin/jobs/train.py --recipe demo"]),
    (wrong_commands, "file_mounts", {"~/vswin/infra/aws": "infra/aw"}),
]
CHECKS = (wrong_schema, wrong_requests, wrong_hosts, wrong_commands)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("overlays", [(), ("efa",), tuple(OVERLAYS)], ids=lambda o: "+".join(o) or "as it is")
def test_nothing_is_wrong(overlays: tuple[str, ...], check: Check) -> None:
    assert list(check(configuration(*overlays))) == []


@pytest.mark.slow
@pytest.mark.parametrize("check, path, value", PLANTED, ids=[f"{c.__name__}-{p}" for c, p, _ in PLANTED])
def test_what_is_planted_is_found(check: Check, path: str, value: object) -> None:
    config = configuration()
    if path.endswith("NetworkInterfaces"):
        config = changed(changed(config, f"{GPU}.SubnetIds", None), f"{GPU}.SecurityGroupIds", None)
    assert list(check(changed(config, path, value))) != []


@pytest.mark.slow
def test_efa_has_all_cards_of_its_machine() -> None:
    """A p5.48xlarge has 32 network cards (AWS's list of EFA's instance types), and the subnet stands in the cards alone."""
    (request,) = [params for name, params in calls(configuration("efa"), "gpu") if name == "RunInstances"]
    assert request["InstanceType"] == "p5.48xlarge"
    assert sorted(card["NetworkCardIndex"] for card in request["NetworkInterfaces"]) == list(range(32))
    assert not request.keys() & {"SubnetId", "SecurityGroupIds"}


# --- configure --------------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_output_is_refused() -> None:
    values = outputs()
    del values["HostGroup"]
    with pytest.raises(ConfigError, match="HostGroup, which is no output of the stack"):
        cluster(values)


def test_overlays_merge_mappings_replace_the_rest_and_take_away_by_null() -> None:
    assert merge({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": None, "c": [3]}, "e": {"f": None}}) == {
        "a": {"c": [3]},
        "d": 2,
        "e": {},
    }


def test_all_outputs_are_used_and_all_that_is_used_is_put_out() -> None:
    text = "".join(p.read_text() for p in [FOLDER / "cluster.yaml", *FOLDER.glob("overlays/*.yaml")])
    assert set(re.findall(r"\$\{(\w+)\}", text)) - {"NAMES"} == outputs().keys()


# --- the template -----------------------------------------------------------------------------------------------------

WRONG = [  # what stands there, what is planted, the rule that finds it
    ("DeploymentType:", "DeploymentTyp:", "E3002"),
    ("StorageCapacity: !Ref LustreGiB", 'StorageCapacity: "1200x"', "E3012"),
    ("Roles: [!Ref WorkerRole]", "Roles: [!Ref WorkersRole]", "E1020"),
    ("BlockPublicAcls:", "BlockPublicAcl:", "E3002"),
    ("DBInstanceClass: db.t4g.small", "DBInstanceClass: db.t4g.smal", "E3025"),
]


def lint(path: Path) -> list[tuple[int, str]]:
    """What cfn-lint finds: line, rule. Another version of it knows other values."""
    linter = Path(sys.executable).with_name("cfn-lint")
    if not linter.exists():
        pytest.skip("cfn-lint is not installed (pip install cfn-lint)")
    found = subprocess.run([str(linter), "--format", "parseable", str(path)], capture_output=True, text=True)
    assert not found.stderr
    return [(int(line.split(":")[1]), line.split(":")[5]) for line in found.stdout.splitlines()]


@pytest.mark.slow
def test_the_linter_finds_nothing() -> None:
    assert lint(FOLDER / "stack.yaml") == []


@pytest.mark.slow
def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    text = (FOLDER / "stack.yaml").read_text()
    for stands, planted, _ in WRONG:
        assert stands in text
        text = text.replace(stands, planted)
    (tmp_path / "stack.yaml").write_text(text)
    found = lint(tmp_path / "stack.yaml")
    for _, planted, rule in WRONG:
        at = next(number for number, line in enumerate(text.splitlines(), 1) if planted in line)
        assert (at, rule) in found, planted


def statements() -> Iterator[tuple[str, Object]]:
    """Every statement that permits something, with its role."""
    for role in ("HeadRole", "WorkerRole"):
        yield from ((role, one) for one in policies(role) if one["Effect"] == "Allow")


def test_nothing_is_permitted_without_bounds() -> None:
    """But for what IAM knows no resources of."""
    unbounded = {"ec2:DescribeInstances", "ssm:UpdateInstanceInformation"}
    for role, one in statements():
        actions = one["Action"] if isinstance(one["Action"], list) else [one["Action"]]
        assert not any("*" in action for action in actions), one
        if one["Resource"] == "*":
            assert all(a in unbounded or a.startswith("ssmmessages:") for a in actions), (role, one)


S3 = [  # role, action, object, may it
    ("WorkerRole", "GetObject", "raw/k400/a.mp4", True),
    ("WorkerRole", "PutObject", "raw/k400/a.mp4", False),
    ("WorkerRole", "DeleteObject", "raw/k400/a.mp4", False),
    ("WorkerRole", "PutObject", "shards/k400/train/000.tar", True),
    ("WorkerRole", "DeleteObject", "runs/a/1/step-1/model.json", True),
    ("WorkerRole", "GetObject", "mlflow/1/model", False),
    ("HeadRole", "PutObject", "mlflow/1/model", True),
    ("HeadRole", "PutObject", "other/a", False),
    ("HeadRole", "PutBucketPolicy", "", False),
]


@pytest.mark.parametrize("role, action, key, may", S3)
def test_the_bucket_is_open_by_prefix(role: str, action: str, key: str, may: bool) -> None:
    own = list(policies(role))
    assert allowed(own, f"s3:{action}", f"{KNOWN['Bucket.Arn']}/{key}") == may
    assert not allowed(own, f"s3:{action}", f"arn:aws:s3:::another-bucket/{key}")


@pytest.mark.parametrize(
    "prefix, may", [("runs/a/", True), ("runs", True), ("", False), ("runsonly/", False), ("mlflow/", False)]
)
def test_the_bucket_is_listed_by_prefix(prefix: str, may: bool) -> None:
    assert allowed(list(policies("WorkerRole")), "s3:ListBucket", KNOWN["Bucket.Arn"], **{"s3:prefix": prefix}) == may
    assert not allowed(list(policies("WorkerRole")), "s3:ListBucket", KNOWN["Bucket.Arn"])


def test_the_bucket_is_closed_encrypted_and_asks_for_tls() -> None:
    bucket = template()["Resources"]["Bucket"]["Properties"]
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    (policy,) = template()["Resources"]["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert (policy["Effect"], policy["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    assert policy["Resource"] == [KNOWN["Bucket.Arn"], f"{KNOWN['Bucket.Arn']}/*"]


def needed(call: tuple[str, Object], cluster_name: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(action, resource, context) of what IAM asks about a call of the provider: EC2's table of actions."""
    operation, params = call
    tagged = {"aws:ResourceTag/ray-cluster-name": cluster_name}
    if operation == "DescribeInstances":
        yield "ec2:DescribeInstances", "*", {}
    elif operation == "CreateTags":
        yield from (("ec2:CreateTags", f"{EC2}instance/{one}", tagged) for one in params["Resources"])
    elif operation == "TerminateInstances":
        yield from (("ec2:TerminateInstances", f"{EC2}instance/{one}", tagged) for one in params["InstanceIds"])
    elif operation == "RunInstances":
        tags = {t["Key"]: t["Value"] for spec in params["TagSpecifications"] for t in spec["Tags"]}
        requested = {f"aws:RequestTag/{key}": value for key, value in tags.items()}
        yield "ec2:RunInstances", f"{EC2}instance/*", requested
        yield "ec2:CreateTags", f"{EC2}instance/*", {"ec2:CreateAction": "RunInstances"}
        yield "iam:PassRole", KNOWN["WorkerRole.Arn"], {"iam:PassedToService": "ec2.amazonaws.com"}
        cards = params.get(
            "NetworkInterfaces", [{"SubnetId": params.get("SubnetId"), "Groups": params.get("SecurityGroupIds")}]
        )
        others = {f"subnet/{card['SubnetId']}" for card in cards} | {
            f"security-group/{g}" for c in cards for g in c["Groups"]
        }
        others |= {"network-interface/*", "volume/*", f"key-pair/{params['KeyName']}"}
        if "InstanceMarketOptions" in params:
            others.add("spot-instances-request/*")
        if "Placement" in params:
            others.add(f"placement-group/{params['Placement']['GroupName']}")
        for one in [*(f"{EC2}{other}" for other in others), f"arn:aws:ec2:us-east-1::image/{params['ImageId']}"]:
            yield "ec2:RunInstances", one, {}
    else:
        raise AssertionError(f"what IAM asks about {operation} is not known")


@pytest.mark.slow
@pytest.mark.parametrize("node_type", ["cpu", "gpu"])
@pytest.mark.parametrize("overlays", [(), ("efa",)], ids=["as it is", "efa"])
def test_the_head_may_do_all_that_the_autoscaler_does_and_that_in_its_own_cluster_alone(
    overlays: tuple[str, ...], node_type: str
) -> None:
    config, own = configuration(*overlays), list(policies("HeadRole"))
    made = calls(config, node_type)
    assert {name for name, _ in made} == {"RunInstances", "DescribeInstances", "CreateTags", "TerminateInstances"}
    for call in made:
        for action, resource, context in needed(call, config["cluster_name"]):
            assert allowed(own, action, resource, **context), (action, resource)
            assert not allowed(list(policies("WorkerRole")), action, resource, **context)
    other = {"aws:ResourceTag/ray-cluster-name": "other", "aws:RequestTag/ray-cluster-name": "other"}
    for action in ("RunInstances", "CreateTags", "TerminateInstances"):
        assert not allowed(own, f"ec2:{action}", f"{EC2}instance/i-1", **other)
    assert not allowed(
        own, "iam:PassRole", "arn:aws:iam::123456789012:role/admin", **{"iam:PassedToService": "ec2.amazonaws.com"}
    )


def test_hosts_fetch_the_secrets_that_are_theirs() -> None:
    for role, secrets in {"WorkerRole": {"RayToken", "MlflowAccount"}, "HeadRole": set(KNOWN) & {*SECRETS}}.items():
        may = {name for name in SECRETS if allowed(list(policies(role)), "secretsmanager:GetSecretValue", KNOWN[name])}
        assert may == secrets


SECRETS = ("RayToken", "MlflowAccount", "MlflowAdmin", "DatabaseOwner")


def test_only_hosts_reach_hosts_and_the_database() -> None:
    """Beside Lustre's servers, where there are any."""
    resources = template()["Resources"]
    assert "SecurityGroupIngress" not in resources["Hosts"]["Properties"]
    rules = [r["Properties"] for r in resources.values() if r["Type"] == "AWS::EC2::SecurityGroupIngress"]
    rules += [r for one in resources.values() for r in one.get("Properties", {}).get("SecurityGroupIngress", [])]
    assert {r["SourceSecurityGroupId"] for r in rules} == {KNOWN["Hosts.GroupId"], "LustreGroup.GroupId"}
    database = resources["Database"]["Properties"]
    assert database["StorageEncrypted"] and not database["PubliclyAccessible"] and database["DeletionProtection"]


# --- secrets and times ------------------------------------------------------------------------------------------------


def secrets_in(text: str) -> list[str]:
    """What looks like a secret."""
    given = r"(?i:password|token|secret)\w*['\"]?(?:: +|=)['\"]?[\w+/]{12,}"
    return re.findall(rf"AKIA[0-9A-Z]{{16}}|BEGIN [A-Z ]*PRIVATE KEY|{given}", text)


def test_no_file_holds_a_secret() -> None:
    for path in (p for p in FOLDER.rglob("*") if p.suffix in (".yaml", ".sh", ".md")):
        assert secrets_in(path.read_text()) == [], path
    database = template()["Resources"]["Database"]["Properties"]
    assert database["MasterUserPassword"].startswith("{{resolve:secretsmanager:")
    for planted in ("AKIAIOSFODNN7EXAMPLE", "MasterUserPassword: correcthorsebattery", "RAY_AUTH_TOKEN=0123456789abcdef"):
        assert secrets_in(planted)


def test_what_is_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        write(tmp_path / ".ray/auth_token", "token")
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE((tmp_path / ".ray/auth_token").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / ".ray").stat().st_mode) == 0o700


def sourced(home: Path, **given: str) -> dict[str, str]:
    """The environment that environment.sh makes of an empty one."""
    (home / ".vswin-account").write_text("export MLFLOW_TRACKING_USERNAME=trainer\n")
    env = {"HOME": str(home), "PATH": os.environ["PATH"], **given}
    script = f". {shlex.quote(str(FOLDER / 'environment.sh'))} && env -0"
    done = subprocess.run(["bash", "-euc", script], env=env, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def test_hosts_know_mlflow_and_their_user(tmp_path: Path) -> None:
    worker = sourced(tmp_path, RAY_HEAD_IP="10.0.0.7")
    assert worker["MLFLOW_TRACKING_URI"] == "http://10.0.0.7:5000"
    assert worker["MLFLOW_TRACKING_USERNAME"] == "trainer" and worker["RAY_AUTH_MODE"] == "token"
    assert worker["PATH"].startswith(f"{tmp_path}/venv/bin:") and worker["VSWIN_CACHE"] == f"{tmp_path}/cache"
    assert re.fullmatch(r"http://[0-9.]+:5000", sourced(tmp_path)["MLFLOW_TRACKING_URI"])
    assert not worker.keys() & {"FI_PROVIDER", "FI_EFA_FORK_SAFE", "FI_EFA_USE_DEVICE_RDMA", "NCCL_PROTO", "RDMAV_FORK_SAFE"}


def readme_commands() -> list[list[str]]:
    """The jobs of README.md."""
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("ray job submit")]


def test_a_training_has_time_to_write_its_checkpoint_and_fits_its_hosts(tmp_path: Path) -> None:
    (training,) = [words for words in readme_commands() if "jobs/train.py" in words]
    submitted = training[training.index("--") + 1 :]
    parser, arguments = program(submitted[1 : submitted.index("--")] + submitted[submitted.index("--") :])
    asked = parser.parse_args(arguments)
    command = asked.words[asked.words.index("--") + 1 :]
    assert list(refused(command)) == []
    parser, arguments = program(command[1:])
    given = parser.parse_args(arguments)
    settings = load_settings(given.recipe, given.settings).training
    assert settings.grace_s + 10 <= float(sourced(tmp_path)["RAY_JOB_STOP_WAIT_TIME_S"])
    assert settings.workers == asked.hosts * asked.gpus and settings.use_gpu and settings.checkpoint_every
    assert asked.hosts <= configuration()["available_node_types"]["gpu"]["max_workers"]
    assert [list(refused(words)) for words in readme_commands()] == [[]] * 3


def test_mlflow_runs_where_the_hosts_look_for_it() -> None:
    from infra.aws import mlflow_server

    assert f"--port={mlflow_server.PORT}" in mlflow_server.command("s3://any")
    assert f":{mlflow_server.PORT}" in sourced_port()


def sourced_port() -> str:
    """What environment.sh says of MLflow's address."""
    return re.findall(r'MLFLOW_TRACKING_URI="(.*)"', (FOLDER / "environment.sh").read_text())[0]


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(p.name for p in FOLDER.glob("*.sh")))
def test_the_scripts_are_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(FOLDER / script)], capture_output=True).returncode == 0


def test_a_machine_that_has_it_all_stays_as_it_is(tmp_path: Path) -> None:
    """Packages are not installed again, nor is a cache emptied."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/ray").touch(mode=0o755)
    for _ in range(2):
        env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run(["bash", str(FOLDER / "host.sh")], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        (tmp_path / "cache/kept").touch()
    assert (tmp_path / "cache").is_dir() and not (tmp_path / "cache").is_symlink()


def test_what_is_installed_is_what_was_tested() -> None:
    text = (FOLDER / "host.sh").read_text()
    assert "--constraint ~/vswin/constraints.txt" in text
    extras = re.findall(r"~/vswin'\[(.*)\]'", text)[0].split(",")
    assert {"train", "server"} <= set(extras)
    assert sys.version_info[:2] == tuple(map(int, re.findall(r"python(3)\.(11) -m venv", text)[0]))
    copied = {
        w
        for line in re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "infra/docker/Dockerfile").read_text(), re.M)
        for w in line.split()[:-1]
    }
    needs = {path for path in copied if not path.startswith(("infra", "jobs"))}
    assert needs <= set(configuration()["file_mounts"].values())
