"""EC2 on this machine: moto answers the API, and each instance that it says runs is a host with the instance's address.

So whoever launches and ends instances, here Ray's autoscaler, gets machines, and what ends one there ends one here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.local import hosts, network, services
from infra.local.record import Host, Record
from vswin_dist.errors import PreflightError

PORT = 5555
KEY, SECRET = "test-key", "test-secret-key"  # what moto gives to whoever asks an instance's metadata
REGION = "us-east-1"
IMAGE = "ami-12c6146b"  # one that moto knows
STATE = "/run/sshd"  # where sshd goes without rights, which Debian's service makes


def program(name: str, package: str) -> str:
    """Return a program, beside this Python or on the PATH.

    Raises:
        PreflightError: it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    if found := str(beside) if beside.exists() else shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return found
    raise PreflightError(f"there is no {name}: {package}")


def check() -> None:
    """Refuse to start where something is absent.

    Raises:
        PreflightError: names it, and the package that has it.
    """
    if reason := network.why_not():
        raise PreflightError(f"instances are hosts with networks of their own: {reason}")
    program("moto_server", "pip install 'moto[server,ec2,iam]'")
    program("sshd", "apt-get install openssh-server")
    program("rsync", "apt-get install rsync")


def gateway(record: Record) -> str:
    """Return the address at which services listen for hosts."""
    return network.address(record.number or 0, network.GATEWAY)


def start_api(record: Record) -> None:
    """Start moto."""
    place = record.services["aws"].removeprefix("http://")
    command = [program("moto_server", ""), "-H", gateway(record), "-p", str(PORT)]
    record.launch("moto", command, services.base_environment(record))
    record.wait_for("moto", lambda: services.listens(place), services.START_TIMEOUT_S)


def client(record: Record, service: str) -> Any:
    """Return boto3's client of a service, as the user of the account."""
    import boto3

    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    return boto3.client(service, REGION, endpoint_url=record.services["aws"], **keys)


@dataclass
class Machines:
    """Keeps hosts as moto's instances are, until it is stopped."""

    record: Record
    public_key: str
    env: dict[str, str]  # of every login on a host
    started: dict[str, float] = field(default_factory=dict)  # instance -> when its host was started
    _ending: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._api = client(self.record, "ec2")
        self._thread = threading.Thread(target=self._watch, name="machines", daemon=True)

    def __enter__(self) -> Machines:
        Path(STATE).mkdir(mode=0o755, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def instances(self, *states: str) -> dict[str, str]:
        """Return the private addresses of the instances in these states, by id."""
        wanted = [{"Name": "instance-state-name", "Values": list(states)}]
        found = self._api.describe_instances(Filters=wanted)["Reservations"]
        return {one["InstanceId"]: one["PrivateIpAddress"] for r in found for one in r["Instances"]}

    def running(self) -> dict[str, str]:
        """Return the private addresses of all instances that there are, by id."""
        return self.instances("pending", "running")

    def take(self, _: Record, host: Host) -> None:
        """End an instance as AWS ends one of the spot market that it wants back."""
        self._api.terminate_instances(InstanceIds=[host.name])

    def _watch(self) -> None:
        while not self._ending.wait(0.5):
            now = self.running()
            for name, place in now.items():
                if name not in self.started:
                    self.started[name] = time.monotonic()
                    self._start(self.record.set_host(Host(name, int(place.rpartition(".")[2]), place, 0, hosts.PORTS)))
            for name in [name for name in self.record.processes if name in self.record.hosts and name not in now]:
                hosts.crash(self.record, self.record.hosts[name])

    def _start(self, host: Host) -> None:
        """Start a machine on which there are this Python and an SSH server, and nothing of this project."""
        own = hosts.disk(self.record, host)
        home = f"{own}/home"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.record.folder / f"{host.name}-key")], check=True
        )
        key = self.record.folder / f"{host.name}-key"
        env = {**self.env, "HOME": home, "VSWIN_HOME": f"{home}/vswin-home"}
        settings = [
            f"ListenAddress {host.address}",
            f"HostKey {own}/host_key",
            f"AuthorizedKeysFile {own}/authorized_keys",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "MaxStartups 50",
            "SetEnv " + " ".join(f'{name}="{value}"' for name, value in env.items()),
        ]
        files = {"sshd_config": "\n".join(settings) + "\n", "authorized_keys": self.public_key, "host_key": key.read_text()}
        script = [
            f"mount --bind {own}/tmp /tmp",  # noqa: S108 # of Ray
            f"ln -sfn {shlex.quote(sys.prefix)} {home}/venv",
            f"touch {home}/.bashrc",
            f"sed 's#:/root:#:{home}:#' /etc/passwd > {own}/passwd",  # where ssh looks for ~
            f"mount --bind {own}/passwd /etc/passwd",
            f"exec {program('sshd', '')} -D -e -f {own}/sshd_config",
        ]
        hosts.start_host(self.record, host, ["bash", "-ec", "\n".join(script)], {"PATH": os.environ["PATH"]}, files)
