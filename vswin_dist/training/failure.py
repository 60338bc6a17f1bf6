"""Errors that another attempt would meet again, told by a rank to the driver. Ray restarts the ranks after any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vswin_dist import storage
from vswin_dist.errors import VswinError, WorkFailed


@dataclass(frozen=True)
class Failure:
    """Why a submission cannot succeed: a file beside the checkpoints in `root`, which ranks and driver both reach."""

    root: str
    submission: str

    @property
    def url(self) -> str:
        """Of the file."""
        return storage.join(self.root, f"failure-{self.submission}.txt")

    def write(self, error: VswinError) -> None:
        """Called by the rank that met `error`."""
        storage.put_bytes(self.url, str(error).encode())

    def exists(self) -> bool:
        """True once a rank has failed for good."""
        return storage.exists(self.url)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise WorkFailed with what a rank has left, whatever else the block raises or not."""
        try:
            yield
        finally:
            if self.exists():
                message = storage.read_bytes(self.url).decode()
                storage.remove(self.url)
                raise WorkFailed(message)
