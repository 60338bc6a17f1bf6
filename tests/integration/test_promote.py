"""`jobs/promote.py` as a user runs it, on models that it scores itself, with a tracking server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from tests.support.line import Line
from tests.support.mlflow_server import mlflow_server
from vswin_dist.config import load_settings
from vswin_dist.manifest import read_manifest
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import write_model
from vswin_dist.serving import PYFUNC_CODE
from vswin_dist.tracking import Registry


def register(uri: str, folder: Path, val: str, seed: int) -> str:
    """Register random weights as a training registers its best."""
    data = load_settings("demo", ["run.name=x", f"data.train={val}", "data.sampling=dense", "data.test_views=[1, 3]"]).data
    classes = read_manifest(val).classes
    torch.manual_seed(seed)
    network = build_model("swin_nano", num_classes=len(classes))
    written = write_model(str(folder), network, classes=classes, preprocessing=preprocessing_of(data), lineage={})
    return Registry(uri).register("m", written, tags={"training_run": "r"}, pyfunc=PYFUNC_CODE, alias="candidate")


@pytest.mark.faults
def test_a_candidate_is_scored_beside_the_champion_and_replaces_it_or_not(line: Line, tmp_path: Path) -> None:
    val = f"{line.shards}/val"
    with mlflow_server(tmp_path / "mlflow") as server:
        uri = ("--tracking-uri", server.uri)
        refused = line.run("promote", "nothing", *uri, code=2)
        assert refused.startswith("error: models:/nothing@candidate does not exist")
        first, second = (register(server.uri, tmp_path / str(seed), val, seed) for seed in (0, 1))
        registry, client = Registry(server.uri), MlflowClient(server.uri)
        task = ("promote", "m", "--data", val, "--workers", "0", "--batch", "12", *uri)

        said = line.run(*task, "--margin", "100")
        assert f"A  {first}, 1 x 3 views" in said and f"B  {second}, 1 x 3 views" in said
        assert f"{first} stays the champion: top-1 " in said and "not above the margin of 100 points" in said
        assert registry.aliases("m") == {"champion": 1, "candidate": 2}

        said = line.run(*task, "--margin", "-101")
        assert said.count("all 12 videos were scored before") == 2, "what is scored is not scored again"
        assert f"{second} is the champion now, {first} was it before: top-1 " in said
        assert registry.aliases("m") == {"champion": 2, "candidate": 2}
        new, old = registry.find(second).tags, registry.find(first).tags
        assert new["promoted_over"] == first and old["replaced_by"] == second and new["promoted_because"] in said

        experiment = client.get_experiment_by_name("vswin-evaluations")
        runs = client.search_runs([experiment.experiment_id], "tags.kind = 'promotion'", order_by=["start_time"])
        assert ["stays the champion" in r.data.tags["decision"] for r in runs] == [True, False]
        assert runs[1].info.run_id == new["promotion_run"] == old["promotion_run"]
        assert {f.path for f in client.list_artifacts(runs[1].info.run_id)} >= {"compare.html", "videos.csv"}
