"""What is measured on a cluster of this machine: disturbed hosts, equal losses, and secrets that stand nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from infra.local import hosts, services
from infra.local.fault_demo import Fault, disturbed
from infra.local.record import Host, Record, wait_until
from infra.local.secret_search import SecretSearch
from infra.local.tracking_demo import user_environment
from infra.local.trials import Disturbance, Trial, compare, ranks_on
from vswin_dist.errors import WorkFailed

LISTEN = "import socket\nserver = socket.create_server(('127.0.0.1', {port}))\nwhile True: server.accept()[0].close()"
RANK = ["bash", "-c", 'exec -a "ray::RayTrainWorker" sleep 1000']


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    """Plain hosts: a head, and two that run what is named as a rank."""
    made = hosts.make(tmp_path / "cluster", plain=True)
    try:
        for name in ("head", "worker1", "worker2"):
            host = hosts.add_host(made, name, 1)
            listen = [sys.executable, "-c", LISTEN.format(port=host.ports["dashboard"])]
            hosts.start_host(made, host, listen if name == "head" else RANK, {"PATH": "/usr/bin:/bin"}, {})
        yield made
    finally:
        hosts.down(tmp_path / "cluster")


def test_a_host_with_a_rank_is_disturbed_once_and_progress_is_waited_for(record: Record) -> None:
    assert wait_until(lambda: [ranks_on(record, host) for host in record.hosts.values()] == [0, 1, 1], 60)
    done: list[Host] = []
    fault = Disturbance(record, lambda _, host: done.append(host))
    for line in ("nothing of note", "(RayTrainWorker pid=7) step 5/30  loss 1.8", "step 9/30"):
        fault(line)
        assert not done
    with pytest.raises(WorkFailed, match="were to be disturbed"):
        fault.check()
    fault("step 10/30  loss 1.7")
    fault("resumed from s3://vswin/runs/x/0001/step-00000005")
    fault("step 10/30  loss 1.7")
    assert [host.name for host in done] == ["worker2"] and fault.stood_still_s is None
    fault("step 15/30")
    assert len(done) == 1 and fault.stood_still_s is not None and fault.placed == {"worker1": 1, "worker2": 1}
    fault.check()


class Lost(Trial):
    """A trial whose first job is lost with the host that the fault is of."""

    tries = 0

    def submit(self, *job: str, meanwhile: Callable[[str], None] = lambda line: None) -> str:
        self.tries += 1
        meanwhile("step 10/30" if self.tries == 1 else "step 15/30")
        if self.tries == 1:
            raise WorkFailed("the head does not answer")
        return " ".join(job)


def test_the_command_is_given_again_where_the_head_is_lost_and_only_there(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wait_until(lambda: ranks_on(record, record.hosts["worker2"]) == 1, 60)
    waited: list[set[str]] = []
    monkeypatch.setattr(hosts, "wait_for_hosts", lambda _, names: waited.append(names))
    done: list[str] = []
    fault = Fault("the head is lost", lambda _, host: done.append(host.name), on_head=True)
    disturbance, output = disturbed(trial := Lost(record), fault, "again")
    assert done == ["head"] and trial.tries == 2 and waited == [{"head", "worker1", "worker2"}]
    assert "run.name=again" in output and disturbance.stood_still_s is not None
    with pytest.raises(WorkFailed, match="does not answer"):
        disturbed(Lost(record), replace(fault, on_head=False), "again")


def test_losses_are_the_same_or_it_is_said() -> None:
    assert compare({1: 1.5, 2: 1.25}, {1: 1.5, 2: 1.25 + 2**-18}) == 2**-18
    with pytest.raises(WorkFailed, match="differ by"):
        compare({1: 1.5}, {1: 1.5001})
    with pytest.raises(WorkFailed, match="one training has 2 steps, the other 1"):
        compare({1: 1.5, 2: 1.25}, {1: 1.5})


def test_a_secret_that_stands_somewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log/worker.log").write_text("a line\nkey=a-marked-secret\n")
    (tmp_path / "blob").write_bytes(b"\0\xff another+one \0")
    (tmp_path / "token").write_text("a-marked-secret")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/key").write_text("a-marked-secret")
    (tmp_path / "clean").write_text("a-marked- secret")
    search = SecretSearch(["a-marked-secret", "another+one"])
    search.below(tmp_path, "token", "kept/")
    assert search.places == 3 and sorted(search.wrong) == [f"{tmp_path}/blob", f"{tmp_path}/log/worker.log"]
    search.text("an answer", "{'key': 'another+one'}")
    search.text("a clean answer", "{'key': '***'}")
    assert search.places == 5 and search.wrong[-1] == "an answer"
    with subprocess.Popen([sys.executable, "-c", "input()", "a-marked-secret"], stdin=subprocess.PIPE) as process:
        search.command_lines()
        process.communicate(b"\n")
    assert f"the command line of process {process.pid}" in search.wrong
    with pytest.raises(WorkFailed, match="secrets stand in"):
        search.check()


def test_a_user_is_given_no_secret_but_an_account_and_keys(tmp_path: Path) -> None:
    record = Record(tmp_path, services={"s3": "http://127.0.0.1:9", "mlflow": "http://127.0.0.1:10"})
    made = services.make_all_secrets(record, "127.0.0.1:11")
    given = user_environment(record)
    may = {"s3_key", "s3_secret", "mlflow_user", "mlflow_password"}
    assert all(made[name] in given.values() for name in may)
    held = "\n".join(given.values())
    assert [name for name, secret in made.items() if name not in may | {"mlflow_admin"} and secret in held] == []
