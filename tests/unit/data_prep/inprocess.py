"""An executor that runs tasks in the test's own process, in another order and only so long, where asked to."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from data_prep.executor import Done, Executor, Task
from data_prep.pipeline import shard_dataset
from data_prep.settings import Encoding, PrepSettings
from vswin_dist.errors import WorkFailed
from vswin_dist.manifest import Manifest


class InProcess(Executor):
    """Runs tasks here, the newest first where `backwards`: another order of completion than of submission."""

    def __init__(self, backwards: bool = False, stop_after: int = 10**9) -> None:
        self.tasks: deque[Task] = deque()
        self.backwards = backwards
        self.left = stop_after
        self.ran: list[Any] = []

    @property
    def room(self) -> int:
        return 4 - len(self.tasks)

    def submit(self, task: Task) -> None:
        self.tasks.append(task)

    def wait(self) -> Done:
        task = self.tasks.pop() if self.backwards else self.tasks.popleft()
        if isinstance(task.ticket, tuple):  # a video or a shard; the report's pictures come with every run
            if self.left == 0:
                raise WorkFailed("stopped by the test")
            self.left -= 1
            self.ran.append(task.ticket)
        return Done(task.ticket, task.function(task.argument))

    def close(self) -> None:
        self.tasks.clear()


FAST = PrepSettings(Encoding(short_side=32), shard_count=3)
COPY = PrepSettings(Encoding(profile="copy"), shard_count=3)


def prepare(source: Any, out: Path, settings: PrepSettings = FAST, **more: Any) -> Manifest:
    executor = more.pop("executor", InProcess())
    return shard_dataset(source, str(out), settings, executor=lambda: executor, show_progress=False, **more)


def tars(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.tar"))}
