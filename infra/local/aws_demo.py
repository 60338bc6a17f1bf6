"""`make aws-demo`: the loop of infra/aws on this machine, with the files there as they are.

`ray up` and the autoscaler speak to moto, whose instances are hosts here: the head comes up with MLflow, a job has workers
launched for it, a training goes on that loses one of its two, idle workers go, and `ray down` ends all. Secrets come from
Secrets Manager by the instances' metadata; S3 and PostgreSQL stand beside the hosts.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.aws import configure, mlflow_server
from infra.local import ec2, hosts, services
from infra.local.cluster import RAY, free_ports, run_shown
from infra.local.ec2 import Machines
from infra.local.record import wait_until
from infra.local.trials import (
    REPOSITORY,
    TRAIN,
    Disturbance,
    Trial,
    compare,
    ending,
    fill_bucket,
    losses,
    prepare,
)
from vswin_dist.errors import PreflightError, WorkFailed, run_command

STACK = "vswin"
UP_TIMEOUT_S = 300.0
ON_HOSTS = {  # of this machine and no other
    "OMP_NUM_THREADS": "1",
    "PGSSLMODE": "prefer",  # PostgreSQL has no certificate here
    "RAY_worker_niceness": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(hosts.OBJECT_STORE_BYTES),
    **hosts.FAULT_TIMES,
}
OVERLAY: dict[str, Any] = {
    "auth": {"ssh_user": "root", "ssh_proxy_command": None, "ssh_proxy_use_node_id": None},
    "idle_timeout_minutes": 0.5,
    "available_node_types": {"cpu": {"min_workers": 1, "max_workers": 2, "resources": {"CPU": 1}}},
}


@dataclass
class AwsTrial(Trial):
    """A cluster on moto's EC2."""

    head: str = ""  # address
    dashboard: int = 0  # local port that leads to it

    def client(self) -> dict[str, str]:
        """Return what a user of this cluster needs."""
        made = services.all_secrets(self.record)
        return {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.record.folder / "secrets" / "token"),
            "MLFLOW_TRACKING_URI": f"http://{self.head}:{mlflow_server.PORT}",
            "MLFLOW_TRACKING_USERNAME": made["mlflow_user"],
            "MLFLOW_TRACKING_PASSWORD": made["mlflow_password"],
        }

    def user(self) -> dict[str, str]:
        """Return the environment of whoever calls `ray up`."""
        own = services.base_environment(self.record)
        keys = {"AWS_ACCESS_KEY_ID": ec2.KEY, "AWS_SECRET_ACCESS_KEY": ec2.SECRET}
        place = {"AWS_ENDPOINT_URL": self.record.services["aws"], "AWS_DEFAULT_REGION": ec2.REGION}
        return {**own, **keys, **place, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}

    def ray(self, *words: str) -> None:
        """Run one of Ray's commands on the configuration.

        Raises:
            WorkFailed: it failed.
        """
        code, _ = run_shown([RAY, *words, "--yes", str(self.file)], REPOSITORY, self.user())
        if code:
            raise WorkFailed(f"ray {words[0]} failed: its output stands above")

    @property
    def file(self) -> Path:
        """The configuration that Ray is given."""
        return self.record.folder / "cluster.yaml"

    @property
    def key(self) -> Path:
        """The private key of the cluster."""
        return self.record.folder / "secrets" / f"{STACK}.pem"


def start_services(trial: AwsTrial) -> None:
    """Start moto, S3 and PostgreSQL on the bridge, which the network of the hosts is."""
    record = trial.record
    with trial.step("moto, S3, PostgreSQL") as found:
        own = ec2.gateway(record)
        database = f"{own}:5432"
        record.services = {"s3": f"http://{own}:{services.S3_PORT}", "postgres": database, "aws": f"http://{own}:{ec2.PORT}"}
        made = services.make_all_secrets(record, database) | {"s3_key": ec2.KEY, "s3_secret": ec2.SECRET}
        services.write_secret(record.folder / "secrets" / services.SECRETS, json.dumps(made))
        record.save()
        services.start_s3(record, made)
        services.start_postgres(record, made)
        ec2.start_api(record)
        found.append(f"at {own}")


def make_stack(trial: AwsTrial) -> dict[str, str]:
    """Make the network and the stack; return its outputs, with those that moto's CloudFormation does not know."""
    with trial.step("stack.yaml, by CloudFormation") as found:
        api, record = ec2.client(trial.record, "ec2"), trial.record
        vpc = api.create_vpc(CidrBlock="10.77.0.0/16")["Vpc"]["VpcId"]
        zones = {f"10.77.{record.number}.0/24": "a", "10.77.255.0/25": "a", "10.77.255.128/25": "b"}
        subnets = [
            api.create_subnet(VpcId=vpc, CidrBlock=block, AvailabilityZone=ec2.REGION + zone)["Subnet"]["SubnetId"]
            for block, zone in zones.items()
        ]
        subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-m", "PEM", "-f", str(trial.key)], check=True)
        api.import_key_pair(KeyName=STACK, PublicKeyMaterial=public_key(trial).encode())
        ec2.client(record, "ssm").put_parameter(Name="/image", Value=ec2.IMAGE, Type="String")
        template = re.sub(r"Default: /aws/service/\S+", "Default: /image", (configure.FOLDER / "stack.yaml").read_text())
        given = {"Vpc": vpc, "HostSubnet": subnets[0], "DatabaseSubnets": ",".join(subnets[1:]), "KeyName": STACK}
        formation = ec2.client(record, "cloudformation")
        parameters = [{"ParameterKey": name, "ParameterValue": value} for name, value in given.items()]
        formation.create_stack(
            StackName=STACK, TemplateBody=template, Parameters=parameters, Capabilities=["CAPABILITY_IAM"]
        )
        stack = formation.describe_stacks(StackName=STACK)["Stacks"][0]
        values = {one["OutputKey"]: one["OutputValue"] for one in stack["Outputs"] if "OutputValue" in one}
        made = len(formation.list_stack_resources(StackName=STACK)["StackResourceSummaries"])
        found.append(f"{made} resources of those that moto knows")
        (record.folder / "s3" / values["Bucket"]).mkdir(mode=0o700)  # what moto makes, the S3 server here does not know
        return values | by_hand(trial)


def public_key(trial: AwsTrial) -> str:
    """Return the public key of the cluster."""
    return trial.key.with_suffix(".pem.pub").read_text()


def by_hand(trial: AwsTrial) -> dict[str, str]:
    """Make what moto's CloudFormation does not: the secrets and the placement group."""
    made, record = services.all_secrets(trial.record), trial.record
    secrets = {
        "RayToken": made["ray_token"],
        "MlflowAccount": json.dumps({"username": made["mlflow_user"], "password": made["mlflow_password"]}),
        "MlflowAdmin": json.dumps({"username": made["mlflow_admin"], "password": made["mlflow_admin_password"]}),
        "DatabaseOwner": json.dumps({"username": "mlflow", "password": made["mlflow_database_password"]}),
    }
    api = ec2.client(record, "secretsmanager")
    values = {name: api.create_secret(Name=name, SecretString=text)["ARN"] for name, text in secrets.items()}
    return values | {"PlacementGroup": STACK, "DatabaseHost": ec2.gateway(record)}


def write_configuration(trial: AwsTrial, values: dict[str, str]) -> None:
    """Write what `ray up` is given: cluster.yaml with the outputs, and what is other on this machine."""
    made = configure.merge(configure.cluster(values), OVERLAY)
    made["auth"]["ssh_private_key"] = str(trial.key)
    trial.file.write_text(yaml.safe_dump(made, sort_keys=False))


def ray_up(trial: AwsTrial, machines: Machines) -> None:
    """Start the head, and make a way to its dashboard."""
    with trial.step("ray up") as found:
        trial.ray("up", "--no-config-cache")
        trial.head = trial.record.head.address
        found.append(f"the head at {trial.head}")
    trial.dashboard = free_ports(1)[0]
    command = [RAY, "dashboard", "--port", str(trial.dashboard), "--no-config-cache", str(trial.file)]
    trial.record.launch("tunnel", command, trial.user())
    jobs = f"http://127.0.0.1:{trial.dashboard}/api/jobs/"
    token = services.all_secrets(trial.record)["ray_token"]
    if not wait_until(lambda: services.ask(jobs, token=token)[0] == 200, UP_TIMEOUT_S):
        raise WorkFailed(f"the dashboard does not answer: {trial.record.log_end('tunnel')}")
    trial.rows.append(("the dashboard", "", f"{services.ask(jobs)[0]} without the token"))


def scale_up(trial: AwsTrial, machines: Machines) -> None:
    """Run a job that needs two workers, of which there is one: moto launches as many as is the least that is asked for."""
    with trial.step("a second worker comes for a job") as found:
        output = trial.submit("python", "infra/aws/with_hosts.py", "--hosts", "2", "--", "python", "--version")
        found += re.findall(r"hosts with .* free (after \d+ s)", output)


def ask_mlflow(trial: AwsTrial, machines: Machines) -> None:
    """Wait until the head's MLflow knows the account of the jobs."""
    with trial.step("the head's MLflow") as found:
        url = f"http://{trial.head}:{mlflow_server.PORT}"
        account = (trial.client()["MLFLOW_TRACKING_USERNAME"], trial.client()["MLFLOW_TRACKING_PASSWORD"])
        experiment = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"
        if not wait_until(lambda: services.ask(experiment, account)[0] == 200, UP_TIMEOUT_S):
            raise WorkFailed(f"MLflow on the head does not answer {account[0]}: {services.ask(experiment, account)}")
        found.append(f"{services.ask(experiment)[0]} without an account")


def lose_a_worker(trial: AwsTrial, machines: Machines) -> None:
    """Train on one host, and on two of which one is taken away as EC2 takes back one of the spot market."""
    fill_bucket(trial)
    prepare(trial)
    with trial.step("train on one host") as found:
        alone = losses(trial, trial.submit(*TRAIN, "run.name=one-host", "training.workers=1"))
        found.append(f"{len(alone)} steps")
    loss = Disturbance(trial.record, machines.take)
    with trial.step("train on two, one is taken away") as found:
        two = ("python", "infra/aws/with_hosts.py", "--hosts", "2", "--", *TRAIN, "run.name=two-hosts", "training.workers=2")
        output = trial.submit(*two, meanwhile=loss)
        loss.check()
        resumed = re.findall(r"resumed from \S*step-0*(\d+)", output)
        found.append(
            f"at step {loss.reached}, resumed from {resumed[-1]} with a new host after {loss.stood_still_s or 0:.0f} s"
        )
        found.append(f"losses apart by {compare(alone, losses(trial, output)):.1e} at most")


def scale_down(trial: AwsTrial, machines: Machines) -> None:
    """Wait until the worker that is one too many has gone."""
    with trial.step("an idle worker goes") as found:
        if not wait_until(lambda: len(machines.running()) == 2, UP_TIMEOUT_S):
            raise WorkFailed(f"head and one worker should be left: {machines.running()}")
        found.append(f"{len(machines.started) - 1} workers were launched in all")


def ray_down(trial: AwsTrial, machines: Machines) -> None:
    """End the cluster."""
    with trial.step("ray down") as found:
        trial.ray("down")
        if not wait_until(lambda: not machines.running(), 60):
            raise WorkFailed(f"there still are {machines.running()}")
        wait_until(lambda: not any(trial.record.runs(name) for name in machines.started), 60)
        found.append(f"{len(machines.instances('terminated'))} instances, all terminated")


def take_steps(trial: AwsTrial) -> None:
    """Start the services and take the steps; where one fails, show what was done and the ends of the logs."""
    record = trial.record
    try:
        start_services(trial)
        values = make_stack(trial)
        write_configuration(trial, values)
        place = record.services["aws"]
        reach = {"AWS_ENDPOINT_URL": place, "AWS_EC2_METADATA_SERVICE_ENDPOINT": place, "AWS_DEFAULT_REGION": ec2.REGION}
        env = {**ON_HOSTS, **reach, "AWS_ENDPOINT_URL_S3": record.services["s3"]}
        with Machines(record, public_key(trial), env) as machines:
            for step in (ray_up, scale_up, ask_mlflow, lose_a_worker, scale_down, ray_down):
                step(trial, machines)
    except BaseException:
        print(hosts.table(trial.rows), file=sys.stderr)
        for name in record.processes:
            print(f"--- {name}.log ends:\n{record.log_end(name, 1500)}", file=sys.stderr)
        raise


def run(folder: Path) -> int:
    """Take the steps, end all, and print the table."""
    if folder.exists():
        raise PreflightError(f"{folder} is there: python -m infra.local.hosts --folder {folder} down ends what it is of")
    services.check()
    ec2.check()
    began, had_state = time.monotonic(), Path(ec2.STATE).exists()
    trial = AwsTrial(hosts.make(folder))
    try:
        with ending(trial, began):
            take_steps(trial)
    finally:
        if not had_state and Path(ec2.STATE).exists():
            Path(ec2.STATE).rmdir()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(f"{hosts.FOLDER}-aws"), help="of what it starts (%(default)s)")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hosts.stop)
    return run(args.folder.absolute())


if __name__ == "__main__":
    sys.exit(run_command(main))
