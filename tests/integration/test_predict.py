"""`jobs/predict.py` on a cluster: shards, a folder in a bucket and bad videos into Parquet in object storage, twice."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from tests.support.line import Line
from tests.support.s3_server import S3Server
from vswin_dist import storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.manifest import read_manifest
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import write_model
from vswin_dist.serving.predict import load_predictor


def test_many_videos_by_all_processes_of_a_cluster(
    cluster_line: Line, object_store: S3Server, object_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, place = cluster_line, object_prefix
    line.home.mkdir(parents=True, exist_ok=True)
    line.env |= object_store.environment
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    data = DataSettings(train="x", sampling="dense", frames=4, stride=1, size=32, short_side=32)
    classes = [f"class {i}" for i in range(6)]
    network = build_model("swin_nano", num_classes=6)
    folder = write_model(f"{place}/model", network, classes=classes, preprocessing=preprocessing_of(data), lineage={})
    [video, *_] = sorted((line.shards / "videos").rglob("*.mp4"))
    storage.put_file(video, f"{place}/videos/good.mp4")
    storage.put_bytes(f"{place}/videos/bad.mp4", b"no video")

    words = ("--model", folder, "--out", f"{place}/out", "--clips", "1", "--crops", "1", "--part", "3", "--ranks", "2")
    where = (f"{line.shards}/val", f"{place}/videos")
    said = line.run("predict", *words, where[1])
    assert "2 videos, of which 0 were predicted before" in said
    assert f"bad: {place}/videos/bad.mp4: " in said and "1 videos, and 1 bad ones" in said
    said = line.run("predict", *words, *where)
    samples = read_manifest(where[0]).samples
    assert f"{len(samples) + 2} videos, of which 2 were predicted before" in said

    parts = [name for name in storage.list_names(f"{place}/out") if name.startswith("part-")]
    for name in parts:
        storage.get_file(f"{place}/out/{name}", tmp_path / "parts" / name)
    table = pandas.read_parquet(tmp_path / "parts").set_index("key")
    assert len(parts) == 5 and table.index.is_unique
    assert set(table.index) == {*(s.key for s in samples), f"{place}/videos/good.mp4", f"{place}/videos/bad.mp4"}
    assert list(table.index[table["error"].notna()]) == [f"{place}/videos/bad.mp4"]
    [mine] = load_predictor(folder).predict([str(video)])
    good = table.loc[f"{place}/videos/good.mp4"]
    assert list(good["classes"]) == [n for n, _ in mine.top]
    assert list(good["scores"]) == pytest.approx([p for _, p in mine.top], abs=1e-6)
