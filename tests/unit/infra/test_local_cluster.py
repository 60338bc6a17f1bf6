"""Hosts of a cluster on this machine: real namespaces with a real network, and real servers beside them; no Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import psutil
import pytest
import ray
from botocore.exceptions import ClientError

from infra.local import hosts, network, services
from infra.local.cluster import free_ports, run_together
from infra.local.record import FILE, Host, Record, marked, read, started, wait_until
from tests.support.commands import ROOT
from vswin_dist.errors import DataError, PreflightError

ENV = {"PATH": os.environ["PATH"]}
ECHO = """
import socket, threading
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("", 8265))
tcp = socket.create_server(("", 8265))
def accept():
    while True: tcp.accept()[0].close()
threading.Thread(target=accept, daemon=True).start()
while True:
    data, sender = udp.recvfrom(2000); udp.sendto(data, sender)
"""
ASK = """
import contextlib, json, socket, sys, time
sent, times, udp = {}, [], socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
with contextlib.suppress(OSError):
    for number in range(int(sys.argv[2])):
        sent[number] = time.monotonic()
        udp.sendto(str(number).encode() + b" " * 100, (sys.argv[1], 8265))
    end = time.monotonic() + float(sys.argv[3])
    while len(times) < len(sent):
        udp.settimeout(max(end - time.monotonic(), 0.001))
        answer = int(udp.recv(2000).split()[0])
        times.append(time.monotonic() - sent[answer])
print(json.dumps(times))
"""
needs_namespaces = pytest.mark.skipif(network.why_not() is not None, reason=f"no namespaces: {network.why_not()}")


def test_commands_run_at_the_same_time_and_are_shown_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = "while ! test -e second; do sleep 0.01; done; echo first"
    second = "touch second; echo second; exit 3"
    done = run_together([("sh", "-c", first), ("sh", "-c", second)], tmp_path, ENV)
    assert done == [(0, "first\n"), (3, "second\n")]
    assert capsys.readouterr().out == "first\nsecond\n"


def test_commands_end_with_the_call(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_together([("sh", "-c", "echo $$ > id; sleep 60"), ("no-such-command",)], tmp_path, ENV)
    assert not [p for p in psutil.Process().children(recursive=True) if "sleep" in p.name()]


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter, as PostgreSQL's."""
    with tempfile.TemporaryDirectory(prefix="vswin-test-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "cluster"


@contextmanager
def cluster(folder: Path, plain: bool = False) -> Iterator[Record]:
    """A cluster of nothing; whatever is added is ended with the block, and nothing is left."""
    record = hosts.make(folder, plain)
    try:
        yield record
    finally:
        hosts.down(folder)
        assert not folder.exists() and not list(marked(folder)) and not devices(record)


def devices(record: Record) -> list[str]:
    """The network devices of a cluster."""
    shown = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout if record.number is not None else ""
    return [line for line in shown.splitlines() if f": {network.bridge(record)}" in line]


def add(record: Record, name: str, *program: str, **files: str) -> Host:
    host = hosts.add_host(record, name, 1)
    hosts.start_host(record, host, list(program), ENV, files)
    return host


def output(record: Record, host: Host, *words: str) -> str:
    done = subprocess.run(network.entered(record, host, *words), capture_output=True, text=True, env=ENV)
    return done.stdout + done.stderr


def asked(record: Record, host: Host, count: int = 1, timeout_s: float = 5.0) -> list[float]:
    """Seconds of the answers that `host` gets from the first one; lost ones are left out."""
    words = (sys.executable, "-c", ASK, record.head.address, str(count), str(timeout_s))
    return list(json.loads(output(record, host, *words)))


@pytest.fixture(scope="module")
def pair() -> Iterator[Record]:
    """A host that echoes, and another."""
    if reason := network.why_not():
        pytest.skip(f"no namespaces: {reason}")
    with open_folder() as folder, cluster(folder) as record:
        add(record, "head", sys.executable, "-c", ECHO, token="of the head")
        worker = add(record, "worker1", "sleep", "1000", token="of the worker")
        assert wait_until(lambda: bool(asked(record, worker)), 60)
        yield record


def test_a_host_has_a_name_an_address_and_a_disk_of_its_own(pair: Record) -> None:
    for host, token in zip(pair.hosts.values(), ("of the head", "of the worker"), strict=True):
        assert output(pair, host, "hostname").strip() == host.name
        assert f"inet {host.address}/24" in output(pair, host, "ip", "address", "show", "dev", "eth0")
        assert output(pair, host, "cat", f"{hosts.disk(pair, host)}/token") == token
        assert "Read-only file system" in output(pair, host, "touch", "/var/tmp/x", str(ROOT / "x"))
        assert output(pair, host, "ls", str(pair.folder)) == "", "secrets, and what the services keep, are hidden"
        assert "infra.local.host" in output(pair, host, "cat", "/proc/1/cmdline"), "its processes are its own"
        assert output(pair, host, "cat", "/etc/resolv.conf") == ""
        assert output(pair, host, "getent", "hosts", "10.77.255.255") == "", "an unknown address is so at once"
    assert not list(Path(f"/run/vswin{pair.number}").iterdir()), "the disks are the hosts' alone"


@pytest.mark.slow
def test_what_a_host_runs_is_started_again_without_what_the_earlier_one_left(pair: Record) -> None:
    worker = add(pair, "worker2", "sh", "-c", "setsid sleep 1001 & exec sleep 0.2")
    try:
        assert wait_until(lambda: pair.log_end("worker2").count("it ended with 0") >= 2, 60)
        assert output(pair, worker, "ps", "-A", "-o", "args=").count("sleep 1001") <= 1
        assert pair.log_end("head").count("starting") == 1
    finally:
        hosts.crash(pair, worker)
        del pair.hosts["worker2"]


@pytest.mark.slow
def test_a_link_is_cut_slowed_worsened_and_healed(pair: Record) -> None:
    worker = pair.hosts["worker1"]
    network.set_link(pair, worker, is_up=False)
    assert asked(pair, worker, 1, 0.5) == [] and hosts.state(pair, worker) == "up, cut off"
    network.set_link(pair, worker, is_up=True)
    assert wait_until(lambda: bool(asked(pair, worker)), 60)

    before = worker
    network.worsen(pair, worker, 100, 0.3)
    worker = pair.hosts["worker1"]
    assert hosts.state(pair, worker) == "up, +100 ms, loses 30%"
    assert wait_until(lambda: bool(asked(pair, worker, 20, 1.0)), 60)
    answers = asked(pair, worker, 80, 3.0)
    assert 0 < len(answers) < 75 and min(answers) >= 0.1, "half of them come through both ways"
    assert "bad0" in output(pair, worker, "ip", "route"), "by the relay alone"
    network.set_link(pair, worker, is_up=False)
    assert asked(pair, worker, 1, 0.5) == []
    worker = network.mend(pair, before)  # as the record has it, whatever one knew
    assert wait_until(lambda: bool(asked(pair, worker)), 60)
    assert len(asked(pair, worker, 20)) == 20 and hosts.state(pair, worker) == "up"

    network.set_rate(pair, worker, 0.5)
    worker = pair.hosts["worker1"]
    assert hosts.state(pair, worker) == "up, 0.5 Mbit/s" and "tbf" in output(
        pair, worker, "tc", "qdisc", "show", "dev", "eth0"
    )
    with pytest.raises(PreflightError, match="heal it first"):
        network.worsen(pair, worker, 100, 0)
    worker = network.mend(pair, worker)
    assert "tbf" not in output(pair, worker, "tc", "qdisc", "show", "dev", "eth0")


def test_a_host_that_crashed_comes_back_with_its_address(pair: Record) -> None:
    worker = pair.hosts["worker1"]
    inside = network.first_process(pair, "worker1")
    assert inside and asked(pair, worker)
    hosts.crash(pair, worker)
    assert started(inside) is None and hosts.state(pair, worker) == "down"
    with pytest.raises(PreflightError, match="worker1 is down"):
        network.set_link(pair, worker, is_up=False)
    assert "worker1  " in hosts.status(pair) and "down" in hosts.status(pair)
    hosts.start_host(pair, worker, ["sleep", "1000"], ENV, {})
    assert wait_until(lambda: bool(asked(pair, worker)), 20)


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("last", ["bridge", "process"])
def test_down_ends_all_after_the_launcher_was_killed(last: str) -> None:
    """Just after the last thing that was started, which the record may not name yet."""
    program = f"""
import os, signal, subprocess
from pathlib import Path
from infra.local import hosts
from infra.local.record import Record
record = hosts.make(Path(os.sys.argv[1]))
if {last!r} == "process":
    host = hosts.add_host(record, "head", 1)
    hosts.start_host(record, host, ["sleep", "1000"], {ENV!r}, {{}})
    Record.save = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    record.launch("worker1", ["sleep", "1001"], {ENV!r})
os.kill(os.getpid(), signal.SIGKILL)
"""
    with open_folder() as folder:
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == -signal.SIGKILL
        record, pids = read(folder), list(marked(folder))
        assert devices(record) and len(pids) >= (3 if last == "process" else 0)
        command = [sys.executable, "-m", "infra.local.hosts", "--folder", str(folder), "down"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0 and "nothing is left" in ended.stdout, ended.stderr
        assert not folder.exists() and not devices(record) and [p for p in pids if started(p)] == []


def test_plain_processes_say_so_and_have_no_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cluster(tmp_path / "cluster", plain=True) as record:
        assert "notice: hosts are plain processes" in capsys.readouterr().out
        head = add(record, "head", "sh", "-c", "sleep 1000 & exec sleep 1000", token="its own")
        assert wait_until(lambda: "starting" in record.log_end("head"), 30)
        token = hosts.disk(record, head) / "token"
        assert token.read_text() == "its own" and stat.S_IMODE(token.stat().st_mode) == 0o600
        with pytest.raises(PreflightError, match="no link can be cut"):
            network.set_link(record, head, is_up=False)
        assert hosts.state(record, head) == "up"
        pids = list(marked(record.folder))
        hosts.crash(record, head)
        assert hosts.state(record, head) == "down" and not token.exists()
        assert wait_until(lambda: not [p for p in pids if started(p)], 10)


def test_another_process_that_got_the_id_is_let_be(tmp_path: Path) -> None:
    record = Record(tmp_path)
    other = subprocess.Popen(["sleep", "1000"])
    try:
        record.processes["s3"] = (other.pid, (started(other.pid) or 0) - 1)
        assert not record.runs("s3")
        record.end("s3")
        assert other.poll() is None and "s3" not in read(tmp_path).processes
    finally:
        other.kill()
        other.wait()
    assert started(other.pid) is None


def test_there_is_one_cluster_in_a_folder_and_hosts_have_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no cluster in"):
        read(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(PreflightError, match="there is a cluster in"):
        hosts.up(tmp_path, 1, 1)
    with pytest.raises(DataError, match="no host 'worker9'; there are head"):
        rendered(tmp_path).host("worker9")


@pytest.mark.parametrize("words", ["up --nodes=0", "worsen worker1 --loss=101", "slow worker1 --mbit=0"])
def test_numbers_that_cannot_be_are_refused(words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "infra.local.hosts", *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "must be from" in done.stderr


# --- what is given to Ray, S3, PostgreSQL and MLflow --------------------------------------------------------------


def rendered(folder: Path) -> Record:
    """A record of a head and a worker in namespaces; nothing runs."""
    record = Record(folder, number=7)
    for name, cpus in (("head", 0), ("worker1", 2)):
        hosts.add_host(record, name, cpus)
    record.services = {"s3": "http://10.77.7.254:9000", "mlflow": "http://10.77.7.254:5000", "postgres": "127.0.0.1:5432"}
    return record


def test_ray_takes_its_arguments_and_settings(tmp_path: Path) -> None:
    from ray.scripts.scripts import start

    record = rendered(tmp_path)
    found = {}
    for host in record.hosts.values():
        program, _, *arguments = hosts.ray_command(record, host)
        assert Path(program).name == "ray"
        found[host.name] = start.make_context("start", arguments).params
    head, worker = found["head"], found["worker1"]
    assert head["head"] and head["block"] and worker["block"] and not worker["head"]
    assert (head["node_ip_address"], str(head["port"]), head["num_cpus"]) == ("10.77.7.1", "6379", 0)
    assert (worker["node_ip_address"], worker["address"], worker["num_cpus"]) == ("10.77.7.2", "10.77.7.1:6379", 2)
    assert head["dashboard_host"] == "10.77.7.1", "on the private side alone"
    library = (Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server").read_bytes()
    for name in hosts.FAULT_TIMES:
        assert name.removeprefix("RAY_").encode() in library, f"Ray does not know {name}"


def test_a_host_is_told_all_and_a_client_little(tmp_path: Path) -> None:
    record = rendered(tmp_path)
    made = services.make_all_secrets(record, record.services["postgres"])
    env = hosts.host_environment(record, record.hosts["worker1"], made)
    assert env["AWS_ENDPOINT_URL_S3"] == "http://10.77.7.254:9000" and env["RAY_AUTH_MODE"] == "token"
    own = str(hosts.disk(record, record.hosts["worker1"]))
    assert all(env[name].startswith(own) for name in ("HOME", "TMPDIR", "VSWIN_HOME", "VSWIN_CACHE", "RAY_AUTH_TOKEN_PATH"))
    hidden = {made[name] for name in made if "password" in name or "key" in name or "secret" in name or name == "ray_token"}
    shown = set(env.values()) & hidden
    assert shown == {made["s3_key"], made["s3_secret"], made["mlflow_password"]}, "its own keys, and no server's"
    hosts.write_client_file(record)
    files = [*(tmp_path / "secrets").iterdir(), hosts.client_file(record)]
    assert len(files) == 4 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    client = hosts.client_file(record).read_text()
    assert [secret for secret in hidden if secret in client] == [made["mlflow_password"]]
    assert "RAY_API_SERVER_ADDRESS=http://10.77.7.1:8265" in client
    assert not [secret for secret in hidden if secret in (tmp_path / FILE).read_text()]


def test_free_ports_are_none_of_the_systems_nor_of_rays_workers_nor_taken_at_any_address() -> None:
    """Ray listens on them seconds later, when anybody's connection could have been given a port of the system's."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert not [port for port in ports if low <= port <= high or 10_002 <= port <= 19_999]
    with socket.create_server(("127.0.0.2", ports[0])):
        assert free_ports(1, ports[:2]) == [ports[1]]


@pytest.mark.slow
def test_s3_and_postgresql_ask_for_their_secrets_and_show_none() -> None:
    import psycopg

    try:
        services.check()
    except PreflightError as error:
        pytest.skip(str(error))
    with open_folder() as folder, cluster(folder, plain=True) as record:
        ports = services.free_ports(2)
        record.services = {"s3": f"http://127.0.0.1:{ports[0]}", "postgres": f"127.0.0.1:{ports[1]}"}
        made = services.make_all_secrets(record, record.services["postgres"])
        services.start_s3(record, made)
        services.start_postgres(record, made)
        assert services.states(record) == {"s3": "answers", "postgres": "answers"}

        def buckets(secret: str) -> list[str]:
            keys = {"aws_access_key_id": made["s3_key"], "aws_secret_access_key": secret, "region_name": "us-east-1"}
            client = boto3.client("s3", endpoint_url=record.services["s3"], **keys)
            return [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]

        assert buckets(made["s3_secret"]) == ["mlflow", "vswin"]
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            buckets("another")
        for name in ("mlflow", "mlflow_auth"):
            with psycopg.connect(made["mlflow_database"].removesuffix("mlflow") + name) as connection:
                connection.execute("create table t (i int)")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(made["mlflow_database"].replace(made["mlflow_database_password"], "another"))
        assert services.ask(record.services["s3"])[0] in (400, 403)

        lines = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked(folder))
        logs = "".join(path.read_text() for path in (folder / "log").iterdir())
        assert b"serve" in lines and b"postgres" in lines and "ready to accept connections" in logs
        secret = [made[name] for name in made if name not in ("mlflow_admin", "mlflow_user")]
        assert [text for text in secret if text.encode() in lines or text in logs] == []
        record.processes.pop("s3")
        hosts.down(folder)
        assert not list(marked(folder)), "a server that the record does not name is found by its mark"
        hosts.make(folder, plain=True)


def test_mlflow_is_given_its_secrets_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, started_with = rendered(tmp_path), []
    made = services.make_all_secrets(record, record.services["postgres"])
    monkeypatch.setattr(Record, "launch", lambda self, name, command, env, user=None: started_with.append((command, env)))
    services.start_mlflow(record, made)
    [(command, env)] = started_with
    assert "--app-name=basic-auth" in command and "--host=10.77.7.254" in command
    assert not [name for name, secret in made.items() if name != "mlflow_user" and secret in " ".join(command)]
    assert env["MLFLOW_BACKEND_STORE_URI"] == made["mlflow_database"]
    text = (tmp_path / "secrets/auth.ini").read_text()
    assert "default_permission = READ" in text and made["mlflow_admin_password"] in text


def test_a_folder_that_postgresql_cannot_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed/postgres").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    with pytest.raises(PreflightError, match="has no x for others"):
        services.check_reachable(tmp_path / "closed/postgres", "nobody")


def test_times_for_faults_fit_each_other() -> None:
    """A silence of 10 s is survived; a host that is away longer is dead well before Ray's own 62 s."""
    period, timeout = (int(hosts.FAULT_TIMES[f"RAY_health_check_{name}_ms"]) / 1000 for name in ("period", "timeout"))
    silent = (period + timeout) * int(hosts.FAULT_TIMES["RAY_health_check_failure_threshold"])
    assert silent - (period + timeout) > 10 and silent <= 30
