"""Errors that another attempt would meet too, reported by a rank to the driver. Ray restarts the ranks after any error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vswin_dist import storage
from vswin_dist.errors import Replaced, StorageError, VswinError, WorkFailed


@dataclass(frozen=True)
class Failure:
    """Why a submission cannot succeed: a file beside the checkpoints in `root`, which ranks and driver both reach."""

    root: str
    submission: str

    @property
    def url(self) -> str:
        """Of the file."""
        return storage.join(self.root, f"failure-{self.submission}.txt")

    def exists(self) -> bool:
        """Return True once a rank has failed for good."""
        return storage.exists(self.url)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record a `VswinError` of the block, on the rank that met it, and raise it; not that others have replaced it."""
        try:
            yield
        except Replaced:
            raise
        except VswinError as error:
            with contextlib.suppress(StorageError):  # where this storage is what fails, the driver meets it too
                storage.put_bytes(self.url, str(error).encode())
            raise

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Raise WorkFailed with what a rank has recorded, whatever else the block of the driver raises or not."""
        try:
            yield
        finally:
            if self.exists():
                message = storage.read_bytes(self.url).decode()
                storage.remove(self.url)
                raise WorkFailed(message)
