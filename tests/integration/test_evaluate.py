"""``jobs/evaluate.py`` and ``jobs/predict.py`` as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.line import Line
from vswin_dist.config import load_settings
from vswin_dist.evaluation import report
from vswin_dist.evaluation.evaluate import Views
from vswin_dist.manifest import read_manifest
from vswin_dist.models import build_model
from vswin_dist.serving.export import preprocessing_of, write_model
from vswin_dist.tracking import register_model


@pytest.fixture
def model(line: Line) -> str:
    """A registered model of random weights that fits the shards."""
    val = f"{line.shards}/val"
    data = load_settings("demo", ["run.name=x", f"data.train={val}", "data.sampling=dense"]).data
    classes = read_manifest(val).classes
    folder = write_model(str(line.home / "written"), build_model("swin_nano", num_classes=len(classes)), classes=classes,
                         preprocessing=preprocessing_of(data), lineage={})
    return f"models:/m/{register_model(line.uri, 'm', folder, tags={})}"


def test_ranks_score_as_one_process_does_and_leave_no_state(line: Line, model: str, tmp_path: Path) -> None:
    task = ("--model", model, "--data", f"{line.shards}/val", "--clips", "2", "--crops", "1", "--workers", "0")
    alone = line.run("evaluate", *task).splitlines()[0]
    assert "expected 12 / scored 12 / missing 0" in alone
    place = tmp_path / "ray-state"
    assert alone in line.run("evaluate", *task, "--ranks", "2", "--storage-root", str(place)).splitlines()
    assert list(place.iterdir()) == []
    refused = line.run("evaluate", *task, "--ranks", "999", "--storage-root", str(place), code=2)
    assert "error: --ranks=999 needs 999 CPUs" in refused and "Lower --ranks, or add nodes." in refused


def test_ranks_are_told_the_version_and_the_store_and_no_folder_of_this_machine(line: Line, model: str) -> None:
    found = report.find_model("models:/m/1", line.uri, None)
    request = found.request("s3://bucket/val", Views(1, 1, 1), 0, None)
    assert (request.model, request.tracking_uri) == ("models:/m/1", line.uri)


def test_a_store_that_is_away_is_noticed_before_the_scoring(line: Line, model: str) -> None:
    line.env = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    output = line.run("evaluate", "--model", str(line.home / "written"), "--data", f"{line.shards}/val", "--tracking-uri",
                      "http://127.0.0.1:9", code=2)
    assert "error: cannot use MLflow at http://127.0.0.1:9" in output and "top-1" not in output


@pytest.mark.parametrize(("job", "option"), [
    ("evaluate", "--ranks=0"), ("evaluate", "--workers=-1"), ("predict", "--clips=0")])
def test_numbers_that_cannot_be_are_refused_in_a_line(line: Line, job: str, option: str) -> None:
    rest = ("--data", "nowhere") if job == "evaluate" else ("video.mp4",)
    output = line.run(job, "--model", "nowhere", option, *rest, code=2)
    assert output == f"error: {option}: must be {0 if 'workers' in option else 1} or more\n"


def test_a_gpu_that_is_not_there_is_named(line: Line) -> None:
    line.env = {"CUDA_VISIBLE_DEVICES": ""}
    output = line.run("predict", "--model", "nowhere", "--gpu", "video.mp4", code=2)
    assert output.startswith("error: --gpu: torch sees no GPU on this machine.") and output.count("\n") == 1
