"""Predictions for many videos on all nodes of a cluster: the only module that imports Ray Data."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vswin_dist import cluster, storage
from vswin_dist.cluster import Resources
from vswin_dist.errors import RanksFailed, WorkFailed, after_start, before_start
from vswin_dist.serving.batch import Identity, Store, Video, find_videos, parts, predict_part
from vswin_dist.serving.predict import find_model, load_predictor
from vswin_dist.tracking import Registry

import ray  # isort: skip # after `cluster`, which gives Ray a home folder
import ray.data  # isort: skip

RETRY = "Once that is mended, the same command goes on with what is left."
EVERY_S = 10.0  # a line of progress
LISTED = 20  # of the bad videos, on the screen


@dataclass(frozen=True)
class Asked:
    """What is predicted by which model, and how."""

    model: str  # models:/NAME@alias, models:/NAME/3, or a folder or URL
    videos: list[str]  # see `batch.find_videos`
    out: str  # URL of a folder
    clips: int
    crops: int
    top: int
    features: bool
    batch: int  # views in one forward pass
    part: int  # videos of a file
    workers: int  # threads of each process that decode
    ranks: int | None  # processes; None: as many as the cluster has room for
    gpu: bool
    fresh: bool  # forget what is there
    tracking_uri: str | None
    s3_endpoint: str | None


@dataclass(frozen=True)
class Work:
    """What each process does, as plain values that Ray can ship."""

    model: str  # models:/NAME/VERSION, or a folder or URL
    tracking_uri: str
    store: Store
    asked: Asked


class PartWorker:
    """A process with the model: it writes the rows of a part, and says how many there are."""

    def __init__(self, work: Work) -> None:
        storage.use_s3_endpoint(work.asked.s3_endpoint)
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.work, identity = work, work.store.identity
        self.predictor = load_predictor(
            work.model,
            uri=work.tracking_uri,
            clips=identity.clips,
            crops=identity.crops,
            batch=work.asked.batch,
            device="cuda" if work.asked.gpu else "cpu",
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Predict the one part of `batch`."""
        videos = [Video(*values) for values in json.loads(str(batch["videos"][0]))]
        identity = self.work.store.identity
        group = max(1, self.work.asked.batch // (identity.clips * identity.crops))
        rows = predict_part(self.predictor, videos, identity, self.work.asked.workers, group)
        self.work.store.add(rows)
        return {"videos": np.array([len(rows)]), "bad": np.array([sum(row.error is not None for row in rows)])}


def predict_into(asked: Asked) -> None:
    """Predict what is not in the folder `asked.out` yet, and list the bad videos.

    Raises:
        CheckpointError: there is no such model. DataError: there are no videos, or the folder holds other predictions.
        PreflightError: the cluster is too small, or what is asked for cannot be reached.
        WorkFailed: a process failed, as where storage does; what is written stays.
    """
    with before_start():
        model, uri = find_model(asked.model, asked.tracking_uri)
        identity = Identity.of(Registry(uri).folder(model), asked.clips, asked.crops, asked.top, asked.features)
        store = Store(storage.absolute(asked.out), identity)
        storage.check_writable(store.url)
        videos, notes = find_videos(asked.videos)
        if asked.fresh:
            store.clear()
        done = store.done()
    left = parts(videos, done, asked.part)
    todo = sum(map(len, left))
    print("\n".join([*notes, f"{len(videos):,} videos, of which {len(videos) - todo:,} were predicted before"]), flush=True)
    if left:
        _predict_on_cluster(Work(model, uri, store, asked), left)
    with after_start(RETRY):
        found = store.done()
    if lost := sum(video.key not in found for video in videos):
        raise WorkFailed(f"{lost:,} of {len(videos):,} videos are not in {store.url}: name a place that all nodes reach")
    bad = [(video.key, error) for video in videos if (error := found[video.key].error) is not None]
    for key, reason in bad[:LISTED]:
        print(f"bad: {key}: {reason}")
    print(
        f"predictions  {store.url}: {len(videos) - len(bad):,} videos, and {len(bad):,} bad ones with the reason", flush=True
    )


def _predict_on_cluster(work: Work, left: list[list[Video]]) -> None:
    asked = work.asked
    kind = "GPU" if asked.gpu else "CPU"
    with cluster.joined():
        cluster.check_resources(Resources((asked.ranks or 1,), asked.gpu, 1, 0), "--ranks")
        processes = asked.ranks or int(ray.cluster_resources()[kind])
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        items = [{"videos": json.dumps(part)} for part in left]
        found = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            PartWorker,
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(processes, len(left))),
            num_cpus=1,
            num_gpus=int(asked.gpu),
        )
        with after_start(RETRY):
            try:
                _follow(found, sum(map(len, left)))
            except ray.exceptions.RayError as error:
                cause = str(error).strip().splitlines() or [type(error).__name__]
                raise RanksFailed(f"a process failed: {cause[-1]} (full trace above)") from error


def _follow(found: Any, videos: int) -> None:
    """Print how far it is, until all is done."""
    done = bad = 0
    began = shown = time.monotonic()
    for row in found.iter_rows():
        done, bad = done + int(row["videos"]), bad + int(row["bad"])
        now = time.monotonic()
        if now - shown >= EVERY_S or done == videos:
            shown, rate = now, done / max(now - began, 1e-9)
            left = tqdm.format_interval((videos - done) / rate)
            print(f"{done:,} of {videos:,} videos, {bad:,} bad, {rate:.1f} videos/s, {left} left", flush=True)
