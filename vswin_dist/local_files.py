"""Files of this machine: where this project keeps its own, and writing one so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


def home() -> Path:
    """Return the data root: `VSWIN_HOME`, else `~/vswin`. Holds what no setting places elsewhere."""
    place = os.environ.get("VSWIN_HOME")
    return expanded(place) if place else user_home() / "vswin"


def user_home() -> Path:
    """Return this user's home folder; `vswin-UID` in the temporary folder where there is none, as in some containers."""
    own = expanded("~")
    return own if own.is_dir() else Path(tempfile.gettempdir()).absolute() / f"vswin-{os.getuid()}"


def expanded(path: str) -> Path:
    """Return `path` made absolute, with `~` replaced where there is a home folder to be named."""
    return Path(os.path.expanduser(path)).absolute()  # Path.expanduser raises where there is none


def cache_home() -> Path:
    """Where a node keeps copies of shards on its own disk: `VSWIN_CACHE`, else this user's `vswin-cache-UID` in the
    temporary folder."""
    own = Path(tempfile.gettempdir()) / f"vswin-cache-{os.getuid()}"
    return expanded(os.environ.get("VSWIN_CACHE") or str(own))


@contextlib.contextmanager
def write_atomically(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside the local file `path`; what the block writes there replaces it, whole and on disk.

    Where the block fails, `path` stays as it was and nothing is left.

    Args:
        durable: the bytes are on the disk before they replace `path`. False where a file that a power cut leaves
            short is found by its reader and made again.
    """
    with _beside(Path(path)) as temporary:
        yield temporary
        if durable:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)


def create(path: str | Path, data: bytes) -> None:
    """Write `data` to the local file `path`, which appears whole, unless something stands there.

    Raises:
        FileExistsError: something does; of several who create it at once one alone succeeds, on NFS too.
    """
    with _beside(Path(path)) as temporary:
        temporary.write_bytes(data)
        os.link(temporary, path)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yield a path in the folder of `target`, which is made; nothing is left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
