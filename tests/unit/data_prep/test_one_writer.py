"""One run of data_prep at a time writes into a remote output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep import journal
from data_prep.executor import Done
from data_prep.sources.folder import FolderSource
from tests.unit.data_prep.inprocess import COPY, InProcess, prepare
from tests.unit.data_prep.videos import make_folders
from vswin_dist import lease, storage
from vswin_dist.errors import FencedOut, PreflightError


@pytest.fixture
def out(tmp_path: Path) -> Any:
    return f"memory://{tmp_path.name}/out"


def test_a_second_run_is_refused_while_the_first_writes(tmp_path: Path, out: Any) -> None:
    source = FolderSource(str(make_folders(tmp_path / "in", 2, 1, 2)))
    with journal.only_writer(out):
        with pytest.raises(PreflightError, match=rf"the output {out} is held by pid \d+ on .* since .*: let it finish"):
            prepare(source, out, COPY)
        assert not [name for name in storage.list_names(out) if not name.startswith(".")]
    assert prepare(source, out, COPY).read == 2


class TakenOver(InProcess):
    """Another run takes the output from this one while it packs."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out = out

    def wait(self) -> Done:
        if self.tasks[0].ticket == ("shard", 0):
            _, claim = lease._claim(storage.join(journal.folder(self.out), lease.FOLDER), "it", "wait", take_over=True)
            lease._mine.discard(claim.id)
        return super().wait()


@pytest.mark.slow
def test_a_run_that_was_taken_over_writes_no_manifest(tmp_path: Path, out: Any) -> None:
    source = FolderSource(str(make_folders(tmp_path / "in", 2, 1, 2)))
    with pytest.raises(FencedOut, match="was taken over by pid"):
        prepare(source, out, COPY, executor=TakenOver(out))
    assert "manifest.json" not in storage.list_names(out)
    assert prepare(source, out, COPY).read == 2
