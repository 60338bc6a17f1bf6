"""`make image-demo`: the CPU image of infra/docker, built by buildah and run by podman as the one worker of a cluster here.

No registry is asked: the base is made by mmdebstrap. The ranks of a training run in the container, as its user, who is not
root; the head and the services are hosts and processes as `infra.local.hosts` starts them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.local import hosts, network, services
from infra.local.record import Host, Record, wait_until
from infra.local.secret_search import SecretSearch
from infra.local.trials import BUCKET, REPOSITORY, Trial, ending, fill_bucket, prepare
from vswin_dist.errors import PreflightError, WorkFailed, run_command

PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap")  # as Debian calls their packages, too
BASE, IMAGE = "localhost/vswin-base:trial", "localhost/vswin-cpu:trial"
SUITE, SOURCES = "bookworm", Path("/etc/apt/sources.list.d/debian.sources")
USER = 1000  # of the image
CPUS = 2  # of the container: two ranks
TOKEN = "/run/secrets/ray-token"  # noqa: S105 # where it lies in the container
OF_THE_IMAGE = ("PATH", "HOME", "TMPDIR", "RAY_TMPDIR", "VSWIN_HOME", "VSWIN_CACHE", "LANG")  # not told to the container
TRAIN = (
    *("python", "jobs/train.py", "--recipe", "demo", "run.name=in-a-container", f"storage.root={BUCKET}/runs"),
    *("training.epochs=1", "optim.warmup_epochs=0", f"data.train={BUCKET}/shards/train", f"data.val={BUCKET}/shards/val"),
)


@dataclass(frozen=True)
class Images:
    """A store of images of its own, and how they are built here."""

    folder: Path
    volumes: list[str]  # what the build sees of this machine, as pip's configuration

    def call(self, program: str, *words: str, shown: bool = False) -> str:
        """Run buildah or podman on the store; returns what it prints, unless it is shown.

        Raises:
            WorkFailed: it failed; says with what.
        """
        env = {**os.environ, "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf")}
        command = [program, *(("--runtime", "runc") if program == "podman" else ()), *words]
        done = subprocess.run(
            command,
            env=env,
            cwd=REPOSITORY,
            text=True,
            stdout=None if shown else subprocess.PIPE,
            stderr=None if shown else subprocess.PIPE,
        )
        if done.returncode:
            raise WorkFailed(f"{' '.join(command)}: {(done.stderr or 'its output stands above').strip()}")
        return done.stdout or ""


def check() -> None:
    """Refuse to start where a program is absent.

    Raises:
        PreflightError: names it, and the package that has it.
    """
    if reason := network.why_not():
        raise PreflightError(f"a container takes a network of its own: {reason}")
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        raise PreflightError(f"there is no {absent[0]}: apt-get install {' '.join(absent)}")


def make_base(trial: Trial, images: Images) -> None:
    """Make a small Debian, of this machine's sources of packages."""
    if BASE in images.call("buildah", "images", "--format={{.Name}}:{{.Tag}}").split():
        return  # kept from the last time
    with trial.step("base, by mmdebstrap") as found, tempfile.TemporaryDirectory(dir=images.folder) as folder:
        base = Path(folder, "base.tar")
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", SUITE, base, SOURCES], check=True
        )
        Path(folder, "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        images.call("buildah", "bud", "--quiet", "--isolation=chroot", f"--tag={BASE}", folder)
        found.append(f"{base.stat().st_size / 1e6:.0f} MB")


def build(trial: Trial, images: Images) -> None:
    """Build the image as infra/docker/Dockerfile says."""
    with trial.step("build, by buildah") as found:
        seen = [f"--volume={volume}" for volume in images.volumes]
        words = (
            "--layers",
            "--format=docker",
            "--isolation=chroot",
            "--network=host",
            f"--build-arg=BASE={BASE}",
            "--target=cpu",
        )
        images.call("buildah", "bud", *words, *seen, "--file=infra/docker/Dockerfile", f"--tag={IMAGE}", ".", shown=True)
        size = json.loads(images.call("podman", "image", "inspect", IMAGE))[0]["Size"]
        found.append(f"{size / 1e9:.2f} GB")


@contextmanager
def container(record: Record, images: Images) -> Iterator[Host]:
    """Run the image as a host of the cluster, with a link at its bridge, for the time of the block."""
    host = hosts.add_host(record, "container", CPUS)
    name, cable = f"vsw{record.number}c{host.number}", f"vsw{record.number}h{host.number}"
    token, env = record.folder / "secrets" / "container-token", record.folder / "secrets" / "container.env"
    made = services.all_secrets(record)
    services.write_secret(token, made["ray_token"])
    os.chown(token, USER, USER)
    given = {k: v for k, v in hosts.host_environment(record, host, made).items() if k not in OF_THE_IMAGE}
    given |= {"RAY_AUTH_TOKEN_PATH": TOKEN, "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor"}  # the head's may be 3.11.7
    services.write_secret(env, "".join(f"{k}={v}\n" for k, v in given.items()))
    try:
        network.command("ip", "netns", "add", name)
        network.command("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        network.command("ip", "link", "set", cable, "master", network.bridge(record), "up")
        gateway = network.address(record.number or 0, network.GATEWAY)
        for words in (["ip", "link", "set", "lo", "up"], *network.plugged_in(host.address, gateway, "eth0")):
            network.command("ip", "netns", "exec", name, *words)
        files = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        limits = (f"--ulimit=nofile={files}:{files}", "--ulimit=nproc=4096:4096", "--shm-size=2g")
        known = (f"--hostname={name}", f"--add-host={name}:{host.address}")  # gloo asks for its own name's address
        run = ("run", "--detach", f"--name={name}", f"--network=ns:/run/netns/{name}", *known, *limits, f"--env-file={env}")
        images.call("podman", *run, f"--volume={token}:{TOKEN}:ro", IMAGE, *ray_command(record, host))
        yield host
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ray_command(record: Record, host: Host) -> list[str]:
    """Return what the container runs."""
    place = f"{record.head.address}:{record.head.ports['gcs']}"
    own = [f"--node-ip-address={host.address}", f"--num-cpus={host.cpus}", "--temp-dir=/tmp/ray"]  # else that of the head
    return ["ray", "start", "--block", f"--address={place}", *own, f"--object-store-memory={hosts.OBJECT_STORE_BYTES}"]


def look_at(trial: Trial, images: Images, host: Host) -> None:
    """Wait until the container is a member of the cluster, and ask it what it is.

    Raises:
        WorkFailed: it is not as it should be.
    """
    name = f"vsw{trial.record.number}c{host.number}"
    with trial.step("the container joins") as found:
        running = ("inspect", "--format={{.State.Running}}", name)
        wait_until(
            lambda: host.name in hosts.joined(trial.record) or "true" not in images.call("podman", *running),
            hosts.START_TIMEOUT_S,
        )
        if host.name not in hosts.joined(trial.record):
            raise WorkFailed(f"it does not join; its log ends:\n{images.call('podman', 'logs', '--tail=30', name)}")
        images.call("podman", "healthcheck", "run", name)  # fails where it is not well
        user = images.call("podman", "exec", name, "id", "--user").strip()
        compilers = images.call("podman", "exec", name, "sh", "-c", "command -v cc gcc g++ clang || true").split()
        if user != str(USER) or compilers:
            raise WorkFailed(f"it runs as user {user} and has the compilers {compilers}")
        bom = json.loads(images.call("podman", "exec", name, "cat", "/opt/vswin/sbom.cdx.json"))
        found += ["answers its health check", f"user {user}", "no compiler", f"{len(bom['components'])} packages listed"]


def train(trial: Trial, host: Host) -> None:
    """Prepare shards and train on two ranks in the container.

    Raises:
        WorkFailed: a rank was elsewhere.
    """
    fill_bucket(trial)
    prepare(trial)
    with trial.step("train") as found:
        places = re.findall(r"\(ip=(\S+), pid=\d+\) world_rank=", trial.submit(*TRAIN))
        if set(places) != {host.address}:
            raise WorkFailed(f"two ranks should be at {host.address}: they were at {places}")
        found.append(f"{len(places)} ranks at {host.address}, the container")


def stop(trial: Trial, images: Images, host: Host) -> None:
    """Stop the container as an orchestrator does, and look for secrets in the image."""
    name = f"vsw{trial.record.number}c{host.number}"
    with trial.step("stop the container"):
        images.call("podman", "stop", "--time=60", name)
        images.call("podman", "rm", "--force", name)
    with trial.step("search the image for secrets") as found:
        search = SecretSearch.of(trial.record)
        for words in (("image", "inspect", IMAGE), ("history", "--no-trunc", IMAGE)):
            search.text(" ".join(words), images.call("podman", *words))
        files = Path(images.call("podman", "image", "mount", IMAGE).strip())
        for part in ("opt/vswin", "home", "root", "etc", "cache", "run"):
            search.below(files / part)
        images.call("podman", "image", "unmount", IMAGE)
        found.append(search.check())


def take_steps(trial: Trial, images: Images) -> None:
    """Take the steps; where one fails, show what was done."""
    try:
        make_base(trial, images)
        build(trial, images)
        with container(trial.record, images) as host:
            look_at(trial, images, host)
            train(trial, host)
            stop(trial, images, host)
    except BaseException:
        print(hosts.table(trial.rows), file=sys.stderr, flush=True)
        raise


def run(folder: Path, store: Path, keep: bool, volumes: list[str]) -> int:
    """Start a cluster without workers, take the steps, end all, and print the table."""
    check()
    began = time.monotonic()
    trial = Trial(hosts.up(folder, 0, 1))
    store.mkdir(parents=True, exist_ok=True)
    (store / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{store}/graph"\nrunroot = "{store}/run"\n'
    )
    with ending(trial, began):
        images = Images(store, volumes)
        try:
            take_steps(trial, images)
        finally:
            images.call("podman", "rm", "--all", "--force")
            if not keep:
                images.call("podman", "rmi", "--all", "--force")
            subprocess.run(["umount", f"{store}/graph/overlay"], capture_output=True)  # where the driver mounted it
            if not keep:
                shutil.rmtree(store)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(f"{hosts.FOLDER}-image"), help="of its cluster (%(default)s)")
    given = "what the build is to see of this machine, such as pip's configuration; can be given several times"
    kept = "keep the images in DIR, by which the next build is short; else nothing is left"
    parser.add_argument("--store", type=Path, metavar="DIR", help=kept)
    parser.add_argument("--volume", action="append", default=[], metavar="PLACE:PLACE:ro", help=given)
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hosts.stop)
    folder = args.folder.absolute()
    store = (args.store or Path(f"{folder}-store")).absolute()
    return run(folder, store, args.store is not None, args.volume)


if __name__ == "__main__":
    sys.exit(run_command(main))
