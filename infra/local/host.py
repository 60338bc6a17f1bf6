"""The first process of a host: gives it a name, a disk and an address of its own, and keeps one program running there.

`python -m infra.local.host FILE`. The host can write to its own disk alone, and does not see the cluster's folder.
What ended is started again, on an empty process table, as on a machine that was switched off and on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from infra.local.network import plugged_in, wait_for_device

KERNELS = {"proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "mqueue", "securityfs", "tracefs", "debugfs", "bpf"}
REST_S = 2.0  # before the program is started again


@dataclass(frozen=True)
class Plan:
    """What a host is to be and to run."""

    name: str
    address: str
    gateway: str | None  # None: a plain process of this machine
    hidden: str  # folder of the cluster, which holds the secrets of its services and what they keep
    disk: str  # its own disk; where it has a namespace, a mount point of this machine
    files: dict[str, str]  # name -> content, on its disk
    known: dict[str, str]  # name -> address of all hosts
    needs: tuple[str, int] | None  # address and port that must answer before the program is started
    program: list[str]
    env: dict[str, str]


def mount(*words: str) -> None:
    """Mount something in this host alone."""
    subprocess.run(["mount", *words], check=True)


def make_disk(plan: Plan) -> None:
    """Mount a disk of the host's own, hide the cluster's folder, and let nothing else be written."""
    mount("-t", "tmpfs", "-o", "size=4g,mode=755", "vswin", plan.disk)
    mount("-t", "tmpfs", "-o", "size=2g,mode=1777", "vswin", "/dev/shm")  # noqa: S108
    mount("-t", "tmpfs", "-o", "size=1m,mode=700", "vswin", plan.hidden)
    lines = [f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **plan.known}.items()]
    Path(plan.disk, "hosts").write_text("".join(lines))
    mount("--bind", str(Path(plan.disk, "hosts")), "/etc/hosts")
    if Path("/etc/resolv.conf").exists():  # no server of names is in reach: asking one would take 10 s for each answer
        Path(plan.disk, "resolv.conf").write_text("")
        mount("--bind", str(Path(plan.disk, "resolv.conf")), "/etc/resolv.conf")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, kind = line.split()[4], line.partition(" - ")[2].split()[0]
        if kind not in KERNELS and place not in (plan.disk, "/dev/shm"):  # noqa: S108
            subprocess.run(["mount", "-o", "remount,bind,ro", place], capture_output=True)  # those in other mounts fail


def fill_disk(plan: Plan) -> None:
    """Make the folders that the environment names, and write the host's files."""
    for folder in ("home", "tmp", "cache"):
        Path(plan.disk, folder).mkdir(parents=True, exist_ok=True)
    for name, content in plan.files.items():
        with open(os.open(Path(plan.disk, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(content)


def join_network(plan: Plan) -> None:
    """Take the host's name and address, once its cable is plugged in."""
    socket.sethostname(plan.name)
    wait_for_device("eth0", 60)
    for words in (["ip", "link", "set", "lo", "up"], *plugged_in(plan.address, plan.gateway or "", "eth0")):
        subprocess.run(words, check=True)


def answers(place: tuple[str, int]) -> bool:
    """Return True where something listens at an address and port."""
    try:
        socket.create_connection(place, timeout=2).close()
    except OSError:
        return False
    return True


def keep_running(plan: Plan) -> None:
    """Start the program whenever it does not run, and what it needs answers."""
    while True:
        while plan.needs and not answers(plan.needs):
            time.sleep(1)
        print(f"{time.strftime('%H:%M:%S')} starting {plan.program[0]}", flush=True)
        program = subprocess.Popen(plan.program, env=plan.env, cwd=plan.disk)
        code = wait(program.pid)
        print(f"{time.strftime('%H:%M:%S')} it ended with {code}", flush=True)
        program.returncode = code
        end_all()
        time.sleep(REST_S)


def wait(pid: int) -> int:
    """Wait for a child, and take leave of all others meanwhile: the first process has the orphans; returns its exit code."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


def end_all() -> None:
    """End every other process of the host."""
    if os.getpid() != 1:
        import psutil

        for process in psutil.Process().children(recursive=True):
            process.kill()
        return
    try:
        os.kill(-1, signal.SIGKILL)  # all of this process namespace but the first
        while True:
            os.wait()
    except (ProcessLookupError, ChildProcessError):
        return


def main() -> int:
    values = json.loads(Path(sys.argv[1]).read_text())
    plan = Plan(**{**values, "needs": tuple(values["needs"]) if values["needs"] else None})
    if plan.gateway:
        make_disk(plan)
        join_network(plan)
    fill_disk(plan)
    keep_running(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
