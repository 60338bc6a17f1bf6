"""Storage that fails under a preparation: what is waited for, what a video is rejected for, what stops the work."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep import cli, tasks
from data_prep.encode import Outcome
from data_prep.executor import Done
from data_prep.settings import Encoding, PrepSettings
from data_prep.sources.base import Item
from data_prep.sources.folder import FolderSource
from tests.unit.data_prep.inprocess import InProcess, prepare
from tests.unit.data_prep.videos import make_folders, make_video
from vswin_dist import storage
from vswin_dist.errors import DataError, StorageError, WorkFailed

COPY = Encoding(profile="copy")


class Failing(MemoryFileSystem):
    """A remote file system of which every call fails with `error`, `times` times."""

    protocol = "failing"
    cachable = False
    error: Callable[[], Exception] = RuntimeError
    times = 0
    lists = True  # whether listings are spared

    def _fail(self) -> None:
        if Failing.times > 0:
            Failing.times -= 1
            raise Failing.error()

    def size(self, path: str) -> int:
        self._fail()
        return int(super().size(path))

    def cat_file(self, path: str, *arguments: Any, **more: Any) -> bytes:
        self._fail()
        return bytes(super().cat_file(path, *arguments, **more))

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:
        self._fail()
        super().pipe_file(path, value, **more)

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        if not Failing.lists:
            self._fail()
        return super().ls(path, detail, **more)

    def exists(self, path: str, **more: Any) -> bool:
        self._fail()
        return bool(super().exists(path, **more))


class NoCredentialsError(Exception):
    """As botocore names it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(storage, "AWAY_S", 0.0)  # as after the waits, which are none here
    monkeypatch.setattr(tasks, "WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.times, Failing.lists = 0, True


def failing(error: Callable[[], Exception], times: int = 10**6) -> None:
    Failing.error, Failing.times = error, times


@pytest.fixture
def stored(tmp_path: Path) -> tasks.SampleTask:
    storage.put_bytes("failing://in/a.mp4", make_video(tmp_path / "a.mp4", frames=3).read_bytes())
    return tasks.SampleTask(0, Item("a.mp4", "c", "failing://in/a.mp4"))


def test_what_passes_is_waited_for(stored: tasks.SampleTask, tmp_path: Path) -> None:
    failing(lambda: OSError("reset"), times=storage.ATTEMPTS * 2 + 1)
    assert tasks.process_sample(COPY, str(tmp_path / "staging"), stored).kept
    assert Failing.times == 0


def test_what_does_not_pass_stops_the_work_and_says_how_to_resume(stored: tasks.SampleTask, tmp_path: Path) -> None:
    failing(lambda: OSError("reset"))
    with pytest.raises(WorkFailed, match=r"keeps failing: .*reset.*Run the same command again to resume\.") as stopped:
        tasks.process_sample(COPY, str(tmp_path / "staging"), stored)
    assert not isinstance(stopped.value, StorageError)
    assert Failing.times == 10**6 - 3 * storage.ATTEMPTS, "twice waited for"


def test_a_video_without_access_is_unreadable(stored: tasks.SampleTask, tmp_path: Path) -> None:
    failing(lambda: PermissionError("Forbidden"))  # without a number, as s3fs has it
    outcome = tasks.process_sample(COPY, str(tmp_path / "staging"), stored)
    assert outcome.verdict == "unreadable" and "no access to failing://in/a.mp4: Forbidden" in outcome.detail
    assert Failing.times == 10**6 - 1, "asked once"


def test_a_video_that_vanished_is_missing_and_looked_for_again(stored: tasks.SampleTask, tmp_path: Path) -> None:
    storage.put_bytes("failing://in/b.mp4", b"another")
    storage.remove("failing://in/a.mp4")
    assert tasks.process_sample(COPY, str(tmp_path / "staging"), stored).verdict == "missing_video"
    assert not (tmp_path / "staging").exists(), "what may change is not staged"


def test_a_folder_that_refuses_too_rejects_no_video(stored: tasks.SampleTask, tmp_path: Path) -> None:
    failing(lambda: PermissionError("Forbidden"))
    Failing.lists = False
    with pytest.raises(WorkFailed, match=r"cannot be reached any more: no access to .*Run the same command again to resume"):
        tasks.process_sample(COPY, str(tmp_path / "staging"), stored)
    assert not (tmp_path / "staging").exists()


def test_a_source_that_goes_away_stops_the_work_and_rejects_nothing(tmp_path: Path) -> None:
    """A mount that drops leaves an empty folder."""
    folders = make_folders(tmp_path / "in", classes=1, each=5, frames=3)
    settings = PrepSettings(Encoding(short_side=32), shard_count=2)

    class Unmounted(InProcess):
        def wait(self) -> Done:
            if len(self.ran) == 1:
                (folders / "class 0").rename(tmp_path / "away")
                (folders / "class 0").mkdir()
            return super().wait()

    with pytest.raises(WorkFailed, match=r"cannot be reached any more: .*does not exist.*it holds nothing.*Run the same"):
        prepare(FolderSource(str(folders)), tmp_path / "out", settings, executor=Unmounted())
    (folders / "class 0").rmdir()
    (tmp_path / "away").rename(folders / "class 0")
    assert prepare(FolderSource(str(folders)), tmp_path / "out", settings).counts["kept"] == 5


def test_without_credentials_no_video_is_rejected(stored: tasks.SampleTask, tmp_path: Path) -> None:
    failing(NoCredentialsError)
    with pytest.raises(StorageError, match="no credentials for failing"):
        tasks.process_sample(COPY, str(tmp_path / "staging"), stored)
    assert Failing.times == 10**6 - 1


def test_an_unknown_scheme_rejects_no_video(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nosuch"):
        tasks.process_sample(COPY, str(tmp_path), tasks.SampleTask(0, Item("a", "c", "nosuch://a")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_not_waited_for(number: int, tmp_path: Path) -> None:
    task = tasks.SampleTask(0, Item("a.mp4", "c", ""), make_video(tmp_path / "a.mp4", frames=3).read_bytes())
    failing(lambda: OSError(number, "full up"))
    with pytest.raises(WorkFailed, match=r"cannot write below failing://staging: .*full up.*Make room and run the same"):
        tasks.process_sample(COPY, "failing://staging", task)
    assert Failing.times == 10**6 - storage.ATTEMPTS


def test_a_staging_folder_without_access_is_no_verdict_on_the_video(tmp_path: Path) -> None:
    task = tasks.SampleTask(0, Item("a.mp4", "c", ""), make_video(tmp_path / "a.mp4", frames=3).read_bytes())
    failing(lambda: PermissionError("Forbidden"))
    with pytest.raises(StorageError, match="no access to failing://staging"):
        tasks.process_sample(COPY, "failing://staging", task)


def test_a_storage_error_crosses_processes_whole() -> None:
    failing(lambda: OSError(errno.ENOSPC, "full up"))
    with pytest.raises(StorageError) as caught:
        storage.size("failing://x")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.retriable, again.errno) == (str(caught.value), False, errno.ENOSPC)


@pytest.mark.slow
def test_exit_codes_before_and_after_something_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_folders(tmp_path / "in", classes=1, each=2, frames=3)
    command = ["shard", "folder", "--videos", str(folders), "--workers", "1"]
    failing(lambda: PermissionError("Forbidden"))
    assert cli.main([*command, "--out", "failing://out"]) == 2  # the output is looked at first
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--classes", "failing://names.txt"]) == 2
    for word in (["verify"], ["stats"], ["retry"], ["preview"], ["merge", str(tmp_path / "both"), "failing://b"]):
        assert cli.main([*word, "failing://a"]) == 2, word
    assert not (tmp_path / "out").exists()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 7 and all(line.startswith("error: no access to failing://") for line in told)

    def fill(*_: object) -> Outcome:
        raise StorageError("no access to the work folder", False)

    Failing.times = 0
    monkeypatch.setattr("data_prep.pipeline.journal.read_record", fill)  # of the shard that was just written
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 1
    assert (tmp_path / "out" / ".data-prep" / "plan.json").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0, "it resumes"
