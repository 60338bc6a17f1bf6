"""The loader's benchmark runs on videos and on shards, and says what it found; how fast is nobody's test."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.test_decode import picture, write
from vswin_dist.benchmarks import loader, readers


def folder_of_videos(folder: Path) -> Path:
    """Two videos and their index.csv."""
    for n in range(2):
        (folder / f"v{n}.mp4").write_bytes(write((picture(64, 48, n + 2 * i) for i in range(24)), (64, 48), g="12"))
    (folder / "index.csv").write_text("path,label\nv0.mp4,a\nv1.mp4,a\n")
    return folder


@pytest.mark.slow
def test_it_measures_videos_and_shards(motion_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(folder_of_videos(tmp_path)), str(motion_shards / "train")]
    code = loader.main(
        [
            *sources,
            "--clips",
            "2",
            "--repeats",
            "1",
            "--frames",
            "4",
            "--size",
            "32",
            "--gpus",
            "2",
            "--clips-per-gpu",
            "5",
            "--no-peers",
        ]
    )
    *tables, last = capsys.readouterr().out.strip().splitlines()
    assert code == 0 and any("2 GPUs of 5 clips/s need" in line for line in tables)
    found = json.loads(last)["sources"]
    assert [r["source"] for r in found] == sources
    for result in found:
        assert set(result["readers_s"]) == {*readers.OURS, readers.LIMIT}
        assert set(result["stages_s"]) == set(loader.STAGES) and min(result["readers_s"].values()) > 0


def test_every_reader_cuts_the_same_clip(tmp_path: Path) -> None:
    """Peers where they are installed: a reader that read other frames or another box would be no comparison."""
    clips = loader.clips_of(
        loader.videos(str(folder_of_videos(tmp_path))),
        2,
        loader.DataSettings(train="", frames=8, stride=2, size=32, crop_scale=(0.5, 1.0)),
    )
    found, _ = readers.readers()
    for video, clip in clips:
        ours = found["ours, RGB"](video.fetch(), clip)().numpy()[0].astype(float)  # [3, T, S, S]
        for name in {readers.DECORD, readers.TORCHCODEC, readers.PLAIN} & set(found):
            theirs = np.asarray(found[name](video.fetch(), clip)()).astype(float)
            assert np.abs(theirs - ours).mean() < 4, name


def test_cores_of_a_node() -> None:
    assert loader.cores_needed(8, 20, 0.0135) == 3
    assert loader.cores_needed(1, 100, 0.01) == 1
