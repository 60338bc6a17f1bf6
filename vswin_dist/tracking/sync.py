"""Send what a tracking store has not taken, from the spools of runs: `python -m vswin_dist.tracking sync ROOT`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import vswin_dist
from vswin_dist import lease, storage
from vswin_dist.errors import VswinError
from vswin_dist.tracking import backend, metrics
from vswin_dist.tracking.mlflow_run import MlflowRun
from vswin_dist.tracking.registry import Registry
from vswin_dist.tracking.run import RunReference
from vswin_dist.tracking.spool import FOLDER, WORDS, read_entry

DEPTH = 3  # folders from the data root to the checkpoints of a run: runs, RUN, NUMBER
RUN = "run.json"  # the file in the folder of a run
CHECKPOINTS = ("step-", "began-")  # how names begin beside a spool


def send_kept(reference: RunReference, is_over: bool) -> list[str]:
    """Send all that waits in the spool of the run `reference`, whose lease the caller holds; returns it in words.

    Args:
        is_over: no submission of the run is going on: the end state that waits is its own. Else it is dropped.

    Raises:
        TrackingError: the store is away or refuses; the rest stays. StorageError: the spool's storage is away.
    """
    run = MlflowRun(reference)
    spool, sent = run.spool, list[str]()
    assert spool is not None
    for name, body in spool.entries("start"):
        run.send_start(body)
        spool.remove(name)
        sent.append(WORDS["start"])
    if spool.names("metrics"):
        with backend.reachable(reference.uri):
            sent.append(f"{metrics.send_spooled(reference.uri, reference.run_id, spool)} metric values")
    for name, body in spool.entries("artifact"):
        run.send_artifact(body["path"], body["text"])
        spool.remove(name)
        sent.append(str(body["path"]))
    for name, body in spool.entries("register"):
        pyfunc = Path(vswin_dist.__file__).parent / body.pop("pyfunc")
        model = Registry(reference.uri, reference.fence).register_once(**body, pyfunc=pyfunc, run_id=reference.run_id)
        spool.remove(name)
        sent.append(f"registered {model}")
    for name, body in spool.entries("end"):
        if is_over:
            with backend.reachable(reference.uri):
                run.send_end(**body)
            sent.append(f"the end state {body['status']}")
        spool.remove(name)
    return sent


def find_spools(root: str, depth: int = DEPTH) -> Iterator[str]:
    """Find the spools at or below `root` that hold something: a data root, a folder of runs, or one of them."""
    names = storage.list_names(root)
    if FOLDER in names or any(name.startswith(CHECKPOINTS) for name in names):
        spool = storage.join(root, FOLDER)
        if any(name.endswith(".json") for name in storage.list_names(spool)):
            yield spool
        return
    if "runs" in names and not storage.exists(storage.join(root, "runs", RUN)):  # a data root
        names = ["runs"]
    if RUN in names:
        names = [name for name in names if name not in (RUN, "ray", lease.FOLDER)]
    if depth:
        for name in names:
            yield from find_spools(storage.join(root, name), depth - 1)


def sync(root: str, uri: str | None = None) -> bool:
    """Send what waits below `root`, and print it; returns whether all of it was sent.

    Args:
        uri: of the store, where it is another than the runs name or needs a password.
    """
    found, complete = 0, True
    for url in find_spools(storage.absolute(root)):
        found += 1
        folder = url.removesuffix(f"/{FOLDER}")
        try:
            print(f"{folder}: sent {', '.join(_send(url, uri)) or 'nothing'}", flush=True)
        except VswinError as error:
            complete = False
            print(f"{folder}: {error}", flush=True)
    if not found:
        print(f"nothing waits to be sent below {root}")
    return complete


def _send(url: str, uri: str | None) -> list[str]:
    run = url.removesuffix(f"/{FOLDER}").rpartition("/")[0]
    remedy = "it sends this itself, when it ends at the latest"
    with lease.held(storage.join(run, lease.FOLDER), f"the training run at {run}", remedy) as fence:
        names = [name for name in storage.list_names(url) if name.endswith(".json")]
        if not names:  # its driver has just sent it
            return []
        entry = read_entry(storage.join(url, names[0]))
        return send_kept(RunReference(store(entry.uri, uri), entry.run_id, url, fence), is_over=True)


def store(known: str, given: str | None) -> str:
    """Return the URI of the store: as given, else from the environment where that names the same one, with a password."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given or (from_environment if backend.safe_uri(from_environment) == known else known)
