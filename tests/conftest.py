"""What all tests share."""

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

from tests.support.line import REPOSITORY, Line, make_shards, short_folder, short_folders

CACHES = {".pytest_cache", ".cache", ".config", ".triton"}  # of pytest, pip, matplotlib and torch's compiler
MARK = "VSWIN_TEST_SESSION"  # inherited by every process that a test starts, however it detaches itself


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
    found = {folder: set(os.listdir(folder)) - CACHES for folder in (REPOSITORY, Path.home())}
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
        end = time.monotonic() + 60
        while (left := [p for p in marked_processes(mark) if not is_own_helper(p)]) and time.monotonic() < end:
            time.sleep(0.2)
        written = {str(folder): new for folder, names in places().items() if (new := names - before[folder])}
    assert not left, f"tests left processes: {left}"
    assert not written, f"tests wrote outside their temporary folders: {written}"
    assert not (kept := [folder for folder in short_folders if folder.exists()]), f"tests left temporary folders: {kept}"


@pytest.fixture(scope="session")
def motion_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards ``train`` (52 videos) and ``val`` (12) of rendered motions."""
    return make_shards(tmp_path_factory.mktemp("motions"))


@pytest.fixture
def line(tmp_path: Path, motion_shards: Path) -> Iterator[Line]:
    """A data root of this test's own, with the shards of rendered motions."""
    with short_folder() as ray_folder:
        yield Line(tmp_path, motion_shards, ray_folder)
