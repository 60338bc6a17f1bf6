"""Hosts as namespaces of this machine, each with an address on a bridge, and the ways in which their links go bad.

A host is the process tree below one `unshare`: with it go its processes, its files and its link. Needs root, and the
packages iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from infra.local.record import Host, Record, wait_until
from vswin_dist.errors import PreflightError, WorkFailed

UNSHARE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
GATEWAY = 254  # the bridge's own number in the network, where the services listen
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}


def why_not() -> str | None:
    """Say why hosts cannot have namespaces here; None where they can."""
    if os.geteuid():
        return "this user is not root"
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            return f"there is no {program} (apt-get install {package})"
    tried = subprocess.run([*UNSHARE, "ip", "link", "add", "vswin", "type", "bridge"], capture_output=True, text=True)
    return f"this system does not permit it: {tried.stderr.strip()}" if tried.returncode else None


def command(*words: str) -> str:
    """Run a command; returns what it prints.

    Raises:
        WorkFailed: it failed; says with what.
    """
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise WorkFailed(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def address(number: int, host: int) -> str:
    """Return the address of a host in the network of a number."""
    return f"10.77.{number}.{host}"


def bridge(record: Record) -> str:
    """Return the name of the cluster's bridge."""
    return f"vsw{record.number}"


def link(record: Record, host: Host) -> str:
    """Return the name of the host's link at the bridge: of its cable, or of the relay that stands for it."""
    return f"vsw{record.number}{'t' if record.runs(f'relay-{host.name}') else 'h'}{host.number}"


def mac(record: Record, host: Host) -> str:
    """Return the host's hardware address, which stays when it is made anew: neighbours remember it."""
    return f"02:00:0a:4d:{record.number:02x}:{host.number:02x}"


def add_bridge(record: Record) -> None:
    """Make a bridge of a number that is free on this machine.

    Raises:
        WorkFailed: there is none.
    """
    taken = command("ip", "-o", "address")
    for number in range(255):
        if f" 10.77.{number}." in taken:
            continue
        if subprocess.run(["ip", "link", "add", f"vsw{number}", "type", "bridge"], capture_output=True).returncode == 0:
            record.number = number
            record.save()
            command("ip", "address", "add", f"{address(number, GATEWAY)}/24", "dev", bridge(record))
            command("ip", "link", "set", bridge(record), "up")
            return
    raise WorkFailed("all networks 10.77.0.0/24 to 10.77.254.0/24 are taken on this machine")


def remove_bridge(record: Record) -> None:
    """Remove the bridge, and whatever is left of its links."""
    if record.number is None:
        return
    for line in command("ip", "-o", "link", "show").splitlines():
        name = line.split()[1].rstrip(":").partition("@")[0]
        if name == bridge(record) or name.startswith((f"{bridge(record)}h", f"{bridge(record)}t")):
            subprocess.run(["ip", "link", "delete", name], capture_output=True)  # one end may be gone with the other


def first_process(record: Record, name: str) -> int | None:
    """Return the id of a host's first process, by which its namespaces are entered; None where the host is down."""
    if not record.runs(name):
        return None
    pid = record.processes[name][0]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def start(record: Record, host: Host, program: list[str], env: dict[str, str]) -> None:
    """Start a host whose first process is `program`, and plug its link in."""
    record.launch(host.name, [*UNSHARE, *program], env)
    record.wait_for(host.name, lambda: first_process(record, host.name) is not None, 30)
    cable, pid = f"vsw{record.number}h{host.number}", str(first_process(record, host.name))
    inside = ("peer", "name", "eth0", "address", mac(record, host), "netns", pid)
    command("ip", "link", "add", cable, "type", "veth", *inside)
    command("ip", "link", "set", cable, "master", bridge(record), "up")


def entered(record: Record, host: Host, *words: str, only_network: bool = False) -> list[str]:
    """Return the command that runs `words` in a host that is up.

    Raises:
        PreflightError: it is down, or has no namespaces.
    """
    if record.number is None:
        raise PreflightError("plain processes have no network of their own: no link can be cut or worsened")
    pid = first_process(record, host.name)
    if pid is None:
        raise PreflightError(f"the host {host.name} is down: start it first")
    kinds = ["--net"] if only_network else ["--net", "--mount", "--uts", "--ipc", "--pid"]
    return ["nsenter", "--target", str(pid), *kinds, "--", *words]


def set_link(record: Record, host: Host, is_up: bool) -> None:
    """Cut the host's link, or mend it."""
    entered(record, host)
    command("ip", "link", "set", link(record, host), "up" if is_up else "down")


def is_cut(record: Record, host: Host) -> bool:
    """Return True where the host is up and its link is cut."""
    shown = subprocess.run(["ip", "-o", "link", "show", link(record, host)], capture_output=True, text=True).stdout
    return record.runs(host.name) and ",UP" not in shown.partition(">")[0]


def set_rate(record: Record, host: Host, mbit: float | None) -> None:
    """Let both directions of the host's cable carry `mbit` megabits a second; None: all that it can."""
    cable = f"vsw{record.number}h{host.number}"
    for enter, device in (([], cable), (entered(record, host, only_network=True), "eth0")):
        if mbit is None:
            subprocess.run([*enter, "tc", "qdisc", "delete", "dev", device, "root"], capture_output=True)
        else:
            bucket = ("tbf", "rate", f"{mbit:g}mbit", "burst", "64kb", "latency", "200ms")
            command(*enter, "tc", "qdisc", "replace", "dev", device, "root", *bucket)
    record.set_host(host, rate_mbit=mbit)


def worsen(record: Record, host: Host, round_trip_ms: float, loss: float) -> None:
    """Put a relay in place of the host's cable that holds frames back and loses a fraction `loss` of them, both ways."""
    host = record.hosts[host.name]
    if host.round_trip_ms is not None:
        mend(record, host)
    if host.rate_mbit is not None:
        raise PreflightError(f"the link of {host.name} is slowed, and cannot be worsened, too: heal it first")
    pid = entered(record, host, only_network=True)[2]
    outside, name = f"vsw{record.number}t{host.number}", f"relay-{host.name}"
    words = (pid, bridge(record), outside, host.address, mac(record, host), address(record.number or 0, GATEWAY))
    relay = [sys.executable, "-m", "infra.local.relay", *words, f"{round_trip_ms / 2000}", str(loss)]
    record.set_host(host, round_trip_ms=round_trip_ms, loss=loss)
    record.launch(name, relay, {"PATH": os.environ["PATH"]})
    record.wait_for(name, lambda: "relaying" in record.log_end(name, 100), 30)


def mend(record: Record, host: Host) -> Host:
    """Take away what was done to the host's link, as the record has it by now; returns the host as it is then."""
    host = record.hosts[host.name]
    record.end(f"relay-{host.name}", signal.SIGKILL)
    (record.folder / "log" / f"relay-{host.name}.log").unlink(missing_ok=True)
    if first_process(record, host.name) is not None:
        set_rate(record, host, None)
        if host.round_trip_ms is not None:
            enter = entered(record, host, only_network=True)
            for words in plugged_in(host.address, address(record.number or 0, GATEWAY), "eth0"):
                command(*enter, *words)
        set_link(record, host, is_up=True)
    return record.set_host(host, rate_mbit=None, round_trip_ms=None, loss=None)


def plugged_in(own: str, gateway: str, device: str) -> list[list[str]]:
    """Return the commands that give a device of a host its address and its way to the others."""
    return [
        ["ip", "address", "replace", f"{own}/24", "dev", device],
        ["ip", "link", "set", device, "up"],
        ["ip", "route", "replace", "default", "via", gateway],
    ]


def wait_for_device(device: str, timeout_s: float) -> None:
    """Wait until a network device is there.

    Raises:
        WorkFailed: it is not.
    """
    if not wait_until(lambda: Path(f"/proc/sys/net/ipv4/conf/{device}").exists(), timeout_s):
        raise WorkFailed(f"{device} did not appear within {timeout_s:g} s")
