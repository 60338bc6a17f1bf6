"""What a node of the cluster has, found in a process of that node, which imports no torch for it: seconds of every start."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from vswin_dist import local_files, storage
from vswin_dist.errors import VswinError

PACKAGES = ("torch", "ray", "deepspeed", "vswin_dist")


@dataclass(frozen=True)
class NodeFacts:
    """What a node has. Bytes, seconds."""

    host: str
    clock: float
    versions: dict[str, str]
    cpus: int
    memory: int  # that is free
    shared_memory: int  # of /dev/shm, free
    cache: int  # free where shards are kept
    scratch: int  # free where temporary files go
    files: int  # that a process may have open
    gpus: tuple[tuple[str, int], ...]  # name, memory
    storage_s: float  # to write, read and remove a small file
    storage_error: str = ""


def look_around(root: str, s3_endpoint: str | None) -> NodeFacts:
    """Find what the node of this process has; leaves nothing behind."""
    storage.use_s3_endpoint(s3_endpoint)
    clock, error = time.time(), ""
    began = time.perf_counter()
    try:
        url = storage.join(root, f"probe-{uuid.uuid4().hex}")
        storage.put_bytes(url, b"probe")
        try:
            if storage.read_bytes(url) != b"probe":
                error = f"{url} does not hold what was just written: is {root} the same place on every node?"
        finally:
            storage.remove(url)
    except (VswinError, OSError) as failed:
        error = str(failed)
    took = time.perf_counter() - began
    return NodeFacts(
        host=platform.node(),
        clock=clock,
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        cpus=os.cpu_count() or 1,
        memory=psutil.virtual_memory().available,
        shared_memory=_free("/dev/shm"),  # noqa: S108
        cache=_free(str(local_files.cache_home())),
        scratch=_free(tempfile.gettempdir()),
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus=tuple(_gpus()),
        storage_s=took,
        storage_error=error,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _free(folder: str) -> int:
    """Free bytes where `folder` is, or would be made; 0 where there is no such place."""
    while folder != os.path.dirname(folder) and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def _gpus() -> Iterable[tuple[str, int]]:
    """Name and bytes of each GPU, as the driver's own program says: a process of Ray that has asked for none sees none."""
    program = shutil.which("nvidia-smi")
    if program:
        asked = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
        for line in answer.stdout.splitlines():
            name, _, size = line.rpartition(",")
            if size.strip().isdigit():
                yield name.strip(), int(size) << 20
