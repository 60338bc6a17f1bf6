"""A cluster of several hosts on this machine: a Ray head and workers, S3, MLflow on PostgreSQL, and faults at will.

Each host has processes, a network, a name and a disk of its own (namespaces, which root may make), so that none sees a
file of another. Where namespaces are not permitted, hosts are plain processes that can only be crashed. What was
started stands in one file, by which `down` ends all of it, whatever became of the command that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from infra.local import network, services
from infra.local.cluster import RAY, free_ports
from infra.local.record import FILE, MARK, Host, Record, marked, read, started, wait_until
from vswin_dist.errors import ConfigError, PreflightError, WorkFailed, run_command

HERE = "python -m infra.local.hosts"
FOLDER = Path("/var/tmp/vswin-cluster")  # noqa: S108 # survives a restart; open to PostgreSQL's user
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "agent": 52365, "agent_grpc": 52366, "metrics": 8080}
START_TIMEOUT_S = 300.0
OBJECT_STORE_BYTES = 128 << 20
FAULT_TIMES = {  # of Ray, whose own find a host that was cut off after 62 s
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",  # a host that is silent for 20 s is dead; one that is for 10 s is not
    "RAY_gcs_rpc_server_reconnect_timeout_s": "30",  # after which a host without a head starts anew
}


# --- one host -----------------------------------------------------------------------------------------------------


def add_host(record: Record, name: str, cpus: int) -> Host:
    """Record another host, at the next address; nothing is started."""
    number = max((host.number for host in record.hosts.values()), default=0) + 1
    own = "127.0.0.1" if record.number is None else network.address(record.number, number)
    ports = PORTS if record.number is not None else dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    return record.set_host(Host(name, number, own, cpus, ports))


def disk(record: Record, host: Host) -> Path:
    """Return where a host's disk is, as the host sees it."""
    return record.folder / host.name if record.number is None else Path(f"/run/vswin{record.number}")


def ray_command(record: Record, host: Host) -> list[str]:
    """Return the command that starts Ray on a host, and ends when Ray does."""
    head = record.head
    command = [
        RAY,
        "start",
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={host.address}",
        f"--num-cpus={host.cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={disk(record, host)}/ray",
        f"--dashboard-agent-listen-port={host.ports['agent']}",
        f"--dashboard-agent-grpc-port={host.ports['agent_grpc']}",
        f"--metrics-export-port={host.ports['metrics']}",
    ]
    if host != head:
        return [*command, f"--address={head.address}:{head.ports['gcs']}"]
    return [
        *command,
        "--head",
        f"--port={host.ports['gcs']}",
        "--include-dashboard=true",
        f"--dashboard-host={host.address}",
        f"--dashboard-port={host.ports['dashboard']}",
        f"--ray-client-server-port={host.ports['client']}",
    ]


def host_environment(record: Record, host: Host, made: dict[str, str]) -> dict[str, str]:
    """Return the environment of every process of a host, jobs too: keys are here, and not in what a job is given."""
    own = disk(record, host)
    return {
        "PATH": services.programs(),
        "LANG": "C.UTF-8",
        "HOME": f"{own}/home",
        "TMPDIR": f"{own}/tmp",  # noqa: S108
        "RAY_TMPDIR": str(own),
        "VSWIN_HOME": f"{own}/home/vswin",
        "VSWIN_CACHE": f"{own}/cache",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{own}/token",
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "135",  # longer than `training.grace_s`, as in infra/kubernetes
        **FAULT_TIMES,
        **services.s3_environment(record, made),
        "MLFLOW_TRACKING_USERNAME": made["mlflow_user"],
        "MLFLOW_TRACKING_PASSWORD": made["mlflow_password"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        MARK: str(record.folder),
    }


def start_host(
    record: Record,
    host: Host,
    program: list[str],
    env: dict[str, str],
    files: dict[str, str],
    needs: tuple[str, int] | None = None,
) -> None:
    """Start a host that keeps `program` running.

    Args:
        files: name -> content of what is written onto its disk, for itself alone.
        needs: address and port that must answer before the program is started.
    """
    own = disk(record, host)
    plan = {
        "name": host.name,
        "address": host.address,
        "gateway": None if record.number is None else network.address(record.number, network.GATEWAY),
        "hidden": str(record.folder),
        "disk": str(own),
        "files": files,
        "known": {other.name: other.address for other in record.hosts.values()},
        "needs": needs,
        "program": program,
        "env": env,
    }
    path = record.folder / "secrets" / f"{host.name}.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    services.write_secret(path, json.dumps(plan))
    own.mkdir(parents=True, exist_ok=True)
    first = [sys.executable, "-m", "infra.local.host", str(path)]
    if record.number is None:
        record.launch(host.name, first, {"PATH": os.environ["PATH"]})
    else:
        network.start(record, host, first, {"PATH": os.environ["PATH"]})


def start_ray(record: Record, host: Host) -> None:
    """Start a host of Ray, which joins the cluster in some seconds."""
    if record.runs(host.name):
        raise PreflightError(f"the host {host.name} runs")
    record.set_host(host, rate_mbit=None, round_trip_ms=None, loss=None)
    made = services.all_secrets(record)
    env = host_environment(record, host, made)
    head = record.head
    needs = None if host == head else (head.address, head.ports["dashboard"])  # the last that a head opens
    start_host(record, host, ray_command(record, host), env, {"token": made["ray_token"]}, needs)


def crash(record: Record, host: Host) -> None:
    """End a host at once, as if its power were cut: every process, its disk, its link."""
    record.end(f"relay-{host.name}")
    if record.number is None:
        end_family(record.processes.get(host.name, (0, 0))[0])
        shutil.rmtree(disk(record, host), ignore_errors=True)
        record.end(host.name)
        return
    first = network.first_process(record, host.name)
    record.end(host.name)
    if first and not wait_until(lambda: started(first) is None, 30):  # it is the last of the host's that ends
        raise WorkFailed(f"the host {host.name} does not end: process {first}")


def end_family(pid: int) -> None:
    """Kill a process and all below it."""
    import psutil

    if started(pid) is None:
        return
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        process.kill()


# --- the cluster --------------------------------------------------------------------------------------------------


def up(folder: Path, nodes: int, cpus: int, plain: bool = False) -> Record:
    """Start a cluster: services, a head without room for ranks, and `nodes` workers; returns when all have joined.

    Raises:
        PreflightError: there is one, or a program is absent. WorkFailed: something did not come up; nothing is left.
    """
    if (folder / FILE).exists():
        raise PreflightError(f"there is a cluster in {folder}; {HERE} --folder {folder} status, or down, which ends it")
    services.check()
    record = make(folder, plain)
    try:
        add_host(record, "head", 0)
        for number in range(1, nodes + 1):
            add_host(record, f"worker{number}", cpus)
        services.start(record)
        for host in list(record.hosts.values()):  # one after the other: Ray gives up where a start takes 30 s
            start_ray(record, host)
            wait_for_hosts(record, {host.name})
        services.wait(record)
        write_client_file(record)
    except BaseException:
        for name in record.processes:
            print(f"--- {name}.log ends:\n{record.log_end(name, 600)}", file=sys.stderr)
        down(folder)
        raise
    return record


def make(folder: Path, plain: bool = False) -> Record:
    """Make the folder of a cluster without hosts, and its bridge where hosts can have namespaces."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder)
    record.save()
    reason = "as told" if plain else network.why_not()
    if reason:
        print(f"notice: hosts are plain processes of this machine, without networks and disks of their own: {reason}")
    else:
        network.add_bridge(record)
    return record


def wait_for_hosts(record: Record, names: set[str]) -> None:
    """Wait until Ray's head counts the named hosts among its nodes.

    Raises:
        WorkFailed: one has not joined; holds the end of its log.
    """
    if not wait_until(lambda: names <= joined(record) or not record.runs(record.head.name), START_TIMEOUT_S):
        late = sorted(names - joined(record))
        raise WorkFailed(f"{', '.join(late)} did not join; the log of {late[0]} ends:\n{record.log_end(late[0])}")
    if not record.runs(record.head.name):
        raise WorkFailed(f"the head ended; its log ends:\n{record.log_end(record.head.name)}")


def joined(record: Record) -> set[str]:
    """Return the names of the hosts that Ray's head counts as alive; none where it does not answer."""
    url = f"http://{record.head.address}:{record.head.ports['dashboard']}/nodes?view=summary"
    token = services.all_secrets(record)["ray_token"]
    try:
        nodes = json.loads(services.ask(url, token=token)[1])["data"]["summary"]
    except (ValueError, KeyError):
        return set()
    alive = [node["raylet"] for node in nodes if node.get("raylet", {}).get("state") == "ALIVE"]
    if record.number is None:  # all have one address
        ports = {raylet.get("metricsExportPort") for raylet in alive}
        return {host.name for host in record.hosts.values() if host.ports["metrics"] in ports}
    addresses = {raylet.get("nodeManagerAddress") for raylet in alive}
    return {host.name for host in record.hosts.values() if host.address in addresses}


def client_environment(record: Record) -> dict[str, str]:
    """Return what a user of the cluster needs to submit jobs and to look at runs: an address, a token, a tracking URI."""
    made, head = services.all_secrets(record), record.head
    return {
        "RAY_API_SERVER_ADDRESS": f"http://{head.address}:{head.ports['dashboard']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(record.folder / "secrets" / "token"),
        **services.account(record, made),
    }


def write_client_file(record: Record) -> None:
    """Write these for a shell, into a file that its owner alone may read."""
    lines = [f"export {name}={value}\n" for name, value in client_environment(record).items()]
    services.write_secret(client_file(record), "".join(lines))


def client_file(record: Record) -> Path:
    """Return where that file is."""
    return record.folder / "client.env"


def down(folder: Path) -> None:
    """End every process of the cluster in `folder` by its id, and remove its network and the folder, its S3 included."""
    record = read(folder)
    for name in [name for name in record.processes if name in record.hosts or name.startswith("relay-")]:
        if name in record.hosts:
            crash(record, record.hosts[name])
        else:
            record.end(name)
    services.stop(record)
    for pid in marked(folder):  # what was started just before its launcher died, and is not in the record
        end_family(pid)
    if not wait_until(lambda: not list(marked(folder)), 30):
        raise WorkFailed(f"these processes do not end: {sorted(marked(folder))}")
    network.remove_bridge(record)
    if record.number is not None and Path(f"/run/vswin{record.number}").exists():
        Path(f"/run/vswin{record.number}").rmdir()
    shutil.rmtree(folder)


def status(record: Record) -> str:
    """Return a table of the hosts and services."""
    alive = joined(record) if (record.folder / "secrets" / services.SECRETS).exists() and record.hosts else set()
    rows: list[tuple[str, ...]] = [("host", "address", "CPUs for ranks", "state", "Ray")]
    for host in record.hosts.values():
        ray = "joined" if host.name in alive else "not joined"
        rows.append((host.name, host.address, str(host.cpus), state(record, host), ray))
    rows.append(("service", "address", "", "state", ""))
    rows += [(name, record.services[name], "", text, "") for name, text in services.states(record).items()]
    return table(rows)


def state(record: Record, host: Host) -> str:
    """Say in words how a host is."""
    if not record.runs(host.name):
        return "down"
    if record.number is not None and network.is_cut(record, host):
        return "up, cut off"
    if host.round_trip_ms is not None:
        return f"up, +{host.round_trip_ms:g} ms, loses {host.loss:.0%}"
    return f"up, {host.rate_mbit:g} Mbit/s" if host.rate_mbit else "up"


def table(rows: list[tuple[str, ...]]) -> str:
    """Return lines with their cells in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def run_on(record: Record, host: Host, words: list[str]) -> int:
    """Run a command on a host, with its environment; returns its exit code."""
    env = json.loads((record.folder / "secrets" / f"{host.name}.json").read_text())["env"]
    enter = [] if record.number is None else network.entered(record, host)
    return subprocess.run([*enter, *words], env=env, cwd="/").returncode


# --- the command line ---------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser(prog=HERE, description=__doc__)
    root.add_argument("--folder", type=Path, default=FOLDER, help="of the cluster: record, logs, S3, secrets (%(default)s)")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    start = commands.add_parser("up", help="start a cluster")
    start.add_argument("--nodes", type=int, default=3, metavar="N", help="workers beside the head (%(default)s)")
    start.add_argument("--cpus", type=int, default=1, metavar="N", help="that Ray gives to ranks on each (%(default)s)")
    start.add_argument("--plain", action="store_true", help="plain processes, also where namespaces are permitted")
    commands.add_parser("status", help="show its hosts and services")
    commands.add_parser("down", help="end it, and remove all that it holds, its S3 too")
    add = commands.add_parser("add", help="add a worker")
    add.add_argument("--cpus", type=int, default=1, metavar="N", help="that Ray gives to ranks there (%(default)s)")
    on_host = {
        "crash": "end a host at once, with its disk",
        "start": "start a host that is down, as new",
        "cut": "cut the link of a host",
        "slow": "let the link of a host carry less",
        "worsen": "let the link of a host delay and lose frames, both ways",
        "heal": "take away all that was done to the link of a host",
        "run": "run a command on a host: run HOST -- COMMAND",
    }
    made = {name: commands.add_parser(name, help=text) for name, text in on_host.items()}
    for one in made.values():
        one.add_argument("host", metavar="HOST", help="its name, as `status` shows it")
    made["slow"].add_argument("--mbit", type=float, required=True, metavar="N", help="megabits a second")
    made["worsen"].add_argument("--round-trip-ms", type=float, default=0.0, metavar="MS", help="added (%(default)s)")
    made["worsen"].add_argument("--loss", type=float, default=0.0, metavar="PERCENT", help="of the frames (%(default)s)")
    made["run"].add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    return root


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse numbers that cannot be.

    Raises:
        ConfigError: names the option.
    """
    bounds = {"nodes": (1, 250), "cpus": (1, 1024), "mbit": (0.01, 1e5), "round_trip_ms": (0, 60_000), "loss": (0, 100)}
    for name, (least, most) in bounds.items():
        value = getattr(arguments, name, least)
        if not least <= value <= most:
            raise ConfigError(f"--{name.replace('_', '-')}={value:g}: must be from {least:g} to {most:g}")


def act(record: Record, arguments: argparse.Namespace) -> int:
    """Do what a command says with one host; returns the exit code."""
    host = record.host(arguments.host)
    if arguments.command == "crash":
        crash(record, host)
    elif arguments.command == "start":
        start_ray(record, host)
        wait_for_hosts(record, {host.name})
    elif arguments.command == "cut":
        network.set_link(record, host, is_up=False)
    elif arguments.command == "slow":
        network.set_rate(record, host, arguments.mbit)
    elif arguments.command == "worsen":
        network.worsen(record, host, arguments.round_trip_ms, arguments.loss / 100)
    elif arguments.command == "heal":
        network.mend(record, host)
    else:
        return run_on(record, host, [w for i, w in enumerate(arguments.words) if i or w != "--"])
    print(f"{host.name}: {state(record, record.hosts[host.name])}")
    return 0


def main() -> int:
    arguments = parser().parse_args()
    check_arguments(arguments)
    folder = Path(os.path.abspath(arguments.folder))
    if arguments.command == "up":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        began = time.monotonic()
        record = up(folder, arguments.nodes, arguments.cpus, arguments.plain)
        print(f"{status(record)}\n\nup in {time.monotonic() - began:.0f} s. To submit jobs:  . {client_file(record)}")
        return 0
    record = read(folder)
    if arguments.command == "down":
        down(folder)
        print(f"nothing is left of the cluster in {folder}")
    elif arguments.command == "status":
        print(status(record))
    elif arguments.command == "add":
        host = add_host(record, f"worker{len(record.hosts)}", arguments.cpus)
        start_ray(record, host)
        wait_for_hosts(record, {host.name})
        print(f"{host.name}: {state(record, host)}")
    else:
        return act(record, arguments)
    return 0


def stop(number: int, _: FrameType | None) -> Any:
    """Unwind, so that all that was started is ended; a second signal must not cut that short."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(run_command(main))
