"""How clips are taken from the videos: decided once, from the training set's manifest, and kept with the model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.line import SMALL, Line
from vswin_dist.config import load_settings
from vswin_dist.errors import CheckpointError
from vswin_dist.manifest import read_manifest, write_manifest
from vswin_dist.model_card import preprocessing_of, read_card
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import write_model
from vswin_dist.training.preflight import preflight


@pytest.fixture
def uniform(line: Line, tmp_path: Path) -> str:
    """The training set, with a manifest that asks for uniform sampling."""
    shutil.copytree(line.shards / "train", tmp_path / "uniform")
    url = str(tmp_path / "uniform")
    write_manifest(replace(read_manifest(url), sampling="uniform"), url)
    return url


def settings(line: Line, train: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("VSWIN_HOME", str(line.home))
    return ["run.name=rule", *line.sets(), *SMALL, f"data.train={train}", f"data.sampling={rule}"]


def test_the_manifest_decides(
    line: Line, uniform: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = load_settings("demo", settings(line, uniform, "null", monkeypatch))
    prepared = preflight(asked)
    assert prepared.settings == replace(asked, data=replace(asked.data, sampling="uniform"))
    assert "uniform sampling" in prepared.summary() and capsys.readouterr().err == ""
    model = build_model("swin_nano", num_classes=6)
    folder = write_model(
        str(tmp_path / "model"),
        model,
        classes=list("abcdef"),
        preprocessing=preprocessing_of(prepared.settings.data),
        lineage={},
    )
    assert read_card(folder).data_settings().sampling == "uniform"


def test_contradicting_it_warns_and_goes_on(
    line: Line, uniform: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = preflight(load_settings("demo", settings(line, uniform, "dense", monkeypatch)))
    assert prepared.settings.data.sampling == "dense"
    warning = capsys.readouterr().err
    assert warning.startswith("warning: data.sampling=dense, and the manifest of") and "1 to 2.5 points" in warning


def test_a_card_without_the_rule_is_not_guessed(tmp_path: Path) -> None:
    s = load_settings("demo", ["data.train=/shards", "data.sampling=null"]).data
    with pytest.raises(AssertionError, match="was not resolved"):
        preprocessing_of(s)
    folder = write_model(
        str(tmp_path / "model"),
        build_model("swin_nano", num_classes=2),
        classes=["a", "b"],
        preprocessing=preprocessing_of(replace(s, sampling="dense")) | {"sampling": None},
        lineage={},
    )
    with pytest.raises(CheckpointError, match=r"does not say how clips are cut \(sampling\)"):
        read_card(folder).data_settings()
