"""An executor that runs tasks in the test's own process, in another order and only so long, where asked to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.executor import Done
from data_prep.pipeline import shard_dataset
from data_prep.settings import Encoding, Settings
from vswin_dist.errors import WorkFailed
from vswin_dist.manifest import Manifest


class InProcess:
    """Runs tasks here, the newest first where `backwards`: another order of completion than of submission."""

    def __init__(self, backwards: bool = False, stop_after: int = 10**9) -> None:
        self.tasks: deque[tuple[Any, Callable[[Any], Any], Any]] = deque()
        self.backwards = backwards
        self.left = stop_after
        self.ran: list[Any] = []

    @property
    def room(self) -> int:
        return 4 - len(self.tasks)

    def submit(self, ticket: Any, function: Callable[[Any], Any], argument: Any) -> None:
        self.tasks.append((ticket, function, argument))

    def wait(self) -> Done:
        ticket, function, argument = self.tasks.pop() if self.backwards else self.tasks.popleft()
        if isinstance(ticket, tuple):  # a video or a shard; the report's pictures come with every run
            if self.left == 0:
                raise WorkFailed("stopped by the test")
            self.left -= 1
            self.ran.append(ticket)
        return Done(ticket, function(argument))

    def close(self) -> None:
        self.tasks.clear()


FAST = Settings(Encoding(short_side=32), shard_count=3)
COPY = Settings(Encoding(profile="copy"), shard_count=3)


def prepare(source: Any, out: Path, settings: Settings = FAST, **more: Any) -> Manifest:
    more.setdefault("executor", InProcess())
    return shard_dataset(source, str(out), settings, show_progress=False, **more)


def tars(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.tar"))}
