"""`jobs/evaluate.py` and `jobs/predict.py` as a user runs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from tests.support.line import Line
from vswin_dist.config import load_settings
from vswin_dist.errors import ConfigError, DataError
from vswin_dist.evaluation import report
from vswin_dist.evaluation.compare import check_comparable
from vswin_dist.evaluation.evaluate import Views
from vswin_dist.evaluation.options import Asked
from vswin_dist.evaluation.subjects import find_subject
from vswin_dist.manifest import read_manifest
from vswin_dist.model_card import preprocessing_of, read_card
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import write_model
from vswin_dist.serving import PYFUNC_CODE
from vswin_dist.tracking import Registry


@pytest.fixture
def model(line: Line) -> str:
    """A registered model of random weights that fits the shards."""
    val = f"{line.shards}/val"
    data = load_settings("demo", ["run.name=x", f"data.train={val}", "data.sampling=dense", "data.test_views=[1, 3]"]).data
    classes = read_manifest(val).classes
    folder = write_model(
        str(line.home / "written"),
        build_model("swin_nano", num_classes=len(classes)),
        classes=classes,
        preprocessing=preprocessing_of(data),
        lineage={},
    )
    return Registry(line.uri).register("m", folder, tags={}, pyfunc=PYFUNC_CODE)


def test_ranks_score_as_one_process_does_and_leave_no_state_of_ray(cluster_line: Line, model: str, tmp_path: Path) -> None:
    task = ("--model", model, "--data", f"{cluster_line.shards}/val", "--clips=2", "--crops=1", "--workers=0", "--no-report")
    alone = cluster_line.run("evaluate", *task).splitlines()
    scores = next(text for text in alone if "expected 12 / scored 12 / missing 0" in text)
    place = tmp_path / "ray-state"
    ranks = cluster_line.run("evaluate", *task, "--ranks", "2", "--storage-root", str(place)).splitlines()
    assert scores in ranks and any("scoring 12 of 12 videos, 2 views of each, on 2 ranks" in text for text in ranks)
    assert [p.name for p in place.iterdir()] == ["evaluations"]
    files = [next(text for text in said if text.startswith("predictions ")).split()[1] for said in (alone, ranks)]
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()


def test_a_run_has_the_scores_their_intervals_and_every_prediction(line: Line, model: str) -> None:
    """Of 1 x 3 views, which the model's card says; asked for again, they are logged without being scored again."""
    task = ("--model", model, "--data", f"{line.shards}/val", "--workers", "0", "--batch", "12")
    said = [line.run("evaluate", *task), line.run("evaluate", *task, "--top", "2", "--no-report")]
    page = next(Path(text.split()[1]) for text in said[0].splitlines() if text.startswith("report "))
    assert page.read_text().count("<img") >= 12 and "on motions val" in page.read_text()
    assert "scoring 12 of 12 videos, 3 views of each" in said[0] and "all 12 videos were scored before" in said[1]
    client = MlflowClient(line.uri)
    experiment = client.get_experiment_by_name("vswin-evaluations")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    assert {r.info.run_name for r in runs} == {"m/1 on motions val, 1 x 3 views"}
    logged = client.get_logged_model(str(Registry(line.uri).find(model).model_id))
    linked = {(m.run_id, m.dataset_name, m.dataset_digest): m.value for m in logged.metrics if m.key == "test/top1"}
    digest = read_manifest(f"{line.shards}/val").fingerprint
    assert linked == {(r.info.run_id, "motions", digest): r.data.metrics["test/top1"] for r in runs}
    inputs = [client.get_run(r.info.run_id).inputs.model_inputs for r in runs]
    assert [[m.model_id for m in each] for each in inputs] == [[logged.model_id]] * 2
    for run, classes in zip(runs, (6, 2), strict=True):
        found = run.data.metrics
        assert found["test/top1_low"] <= found["test/top1"] <= found["test/top1_high"] and 0 <= found["test/ece"] <= 100
        names = {f.path for f in client.list_artifacts(run.info.run_id)}
        assert {"classes.csv", "confusion.csv", "calibration.json", "predictions.parquet"} <= names
        assert {"report.html", "pictures"} <= names if classes == 6 else "report.html" not in names
        table = pq.read_table(client.download_artifacts(run.info.run_id, "predictions.parquet")).to_pydict()
        assert [len(p) for p in table["probabilities"]] == [classes] * 12
        hits = [a == b for a, b in zip(table["class"], table["predicted"], strict=True)]
        assert found["test/top1"] == pytest.approx(100 * sum(hits) / 12)
        confusion = Path(client.download_artifacts(run.info.run_id, "confusion.csv")).read_text().splitlines()
        assert sum(int(text.split(",")[1 + i]) for i, text in enumerate(confusion[1:])) == sum(hits)


def test_two_models_are_compared(line: Line, model: str, tmp_path: Path) -> None:
    """The registered one with another, then with what was scored of it; and a set of other videos is refused."""
    folder, card = Registry(line.uri).folder(model), read_card(Registry(line.uri).folder(model))
    other = write_model(
        str(tmp_path / "other"),
        build_model("swin_nano", num_classes=len(card.classes)),
        classes=card.classes,
        preprocessing=card.preprocessing,
        lineage={},
    )
    task = ("--data", f"{line.shards}/val", "--workers", "0", "--batch", "12")
    said = line.run("compare", model, other, *task, "--out", str(tmp_path / "page"))
    assert f"A  {model}, 1 x 3 views" in said and f"B  {other}, 1 x 3 views" in said and "motions val: 12 videos" in said
    assert said.count("scoring 12 of 12 videos") == 2
    assert {p.name for p in (tmp_path / "page").iterdir()} == {"compare.html", "scores.csv", "classes.csv", "videos.csv"}
    client = MlflowClient(line.uri)
    experiment = client.get_experiment_by_name("vswin-evaluations")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.tags["model_a"] == model and run.data.tags["model_b"] == other
    [row] = [text.split(",") for text in (tmp_path / "page" / "scores.csv").read_text().splitlines() if "top-1" in text]
    assert run.data.metrics["compare/top1_difference"] == pytest.approx(float(row[3])) == float(row[2]) - float(row[1])
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {"compare.html", "videos.csv"}

    files = [str(p) for p in (line.home / "evaluations").glob("*/predictions.parquet")]
    again = line.run("compare", *files, "--tracking-uri", "none", "--out", str(tmp_path / "again"))
    assert "12 videos" in again and "scoring" not in again
    asked = Asked(f"{line.shards}/train", None, None, 12, 0, 1, False, None, "none", None)
    scored, unscored = find_subject(files[0], asked), find_subject(folder, asked)
    with pytest.raises(DataError, match=r"other videos\. Score both on one set, or give --any-data"):  # before any is scored
        check_comparable(scored.identity, unscored.identity, any_data=False)
    with pytest.raises(ConfigError, match="name the shards to score it on in --data"):
        find_subject(folder, replace(asked, data=None))


def test_ranks_are_told_the_version_and_the_store_and_no_folder_of_this_machine(line: Line, model: str) -> None:
    found = report.find_model("models:/m/1", line.uri, None)
    request = found.request("s3://bucket/val", Views(1, 1, 1), 0, None)
    assert (request.model, request.tracking_uri) == ("models:/m/1", line.uri)


def test_a_store_that_is_away_is_noticed_before_the_scoring(line: Line, model: str) -> None:
    line.env = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    output = line.run(
        "evaluate",
        "--model",
        str(line.home / "written"),
        "--data",
        f"{line.shards}/val",
        "--tracking-uri",
        "http://127.0.0.1:9",
        code=2,
    )
    assert "error: cannot use MLflow at http://127.0.0.1:9" in output and "top-1" not in output


@pytest.mark.parametrize(
    ("job", "option"), [("evaluate", "--ranks=0"), ("evaluate", "--workers=-1"), ("predict", "--clips=0")]
)
def test_numbers_that_cannot_be_are_refused_in_a_line(line: Line, job: str, option: str) -> None:
    rest = ("--data", "nowhere") if job == "evaluate" else ("video.mp4",)
    output = line.run(job, "--model", "nowhere", option, *rest, code=2)
    assert output == f"error: {option}: must be {0 if 'workers' in option else 1} or more\n"


def test_a_gpu_that_is_not_there_is_named(line: Line) -> None:
    line.env = {"CUDA_VISIBLE_DEVICES": ""}
    output = line.run("predict", "--model", "nowhere", "--gpu", "video.mp4", code=2)
    assert output.startswith("error: --gpu: torch sees no GPU on this machine.") and output.count("\n") == 1
