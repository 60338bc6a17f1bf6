"""What a training leaves in the registry: from a real checkpoint, into a real store, without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vswin_dist
from tests.support import checkpoints
from tests.support.mlflow_store import new_store
from vswin_dist import lease, serving
from vswin_dist.config import load_settings, to_flat
from vswin_dist.data.plan import make_plan
from vswin_dist.errors import FencedOut
from vswin_dist.lease import Fence
from vswin_dist.manifest import Manifest, Sample, Shard
from vswin_dist.model_card import ModelCard
from vswin_dist.tracking import Registry, Run, RunReference, attach, backend, open_run, send_kept
from vswin_dist.training.checkpoint import Position
from vswin_dist.training.registration import register_best
from vswin_dist.training.spec import TrainingSpec
from vswin_dist.training.start import log_start
from vswin_dist.training.trainer import WorkerConfig

CLASSES = ["left", "right"]
SAMPLES = [Sample(f"v{i}", i % 2, 0, i, 1, 0, "mp4", 9, 1.0, 9.0, 8, 8, "") for i in range(32)]
TRAIN = Manifest("motions", "train", CLASSES, {}, [Shard("0.tar", 1, "", 32)], SAMPLES, [], 32)
VAL = replace(TRAIN, split="val", samples=SAMPLES[:6], shards=[Shard("0.tar", 1, "", 6)], read=6)
SCORES = {"val/top1": 62.5, "val/top5": 100.0, "val/mean_class_accuracy": 61.25}
EVALUATIONS = {3: SCORES, 6: {"val/top1": 50.0}}  # by step


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real store."""
    return new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    """The right of this driver to the run."""
    number, claim = lease._claim(str(tmp_path / "lease"), "the run", "wait", take_over=True)
    yield Fence(str(tmp_path / "lease"), number, claim.id)
    lease._mine.discard(claim.id)


def trained(uri: str, folder: Path, fence: Fence, *, store: str | None = None) -> tuple[TrainingSpec, WorkerConfig, Run]:
    """A training of two checkpoints that has ended; `store` is where its driver believes the store to be."""
    settings = load_settings("demo", [f"run.name={folder.name}", "data.train=s3://K:S@bucket/train", "data.val=x"])
    for step, metrics in EVALUATIONS.items():
        position = Position(step, 1, 16, "run", TRAIN.fingerprint, {}, [], {}, metrics)
        card = ModelCard({"name": "swin_nano", "num_classes": 2}, CLASSES, {}, {})
        checkpoints.save(str(folder / "0001"), position, {"w": torch.ones(2)}, {"exp_avg.w": torch.ones(2)}, card)
    reference = open_run(uri, "exp", folder.name).reference
    reference = replace(reference, uri=store or uri, spool=str(folder / "0001" / "spool"), fence=fence)
    spec = TrainingSpec(
        *(settings, store or uri, str(folder), None, 1, TRAIN, VAL),
        *(make_plan(TRAIN, settings.data, 0, 16), {2: 1}, 12345, [], ""),
    )
    lineage = {"dataset_fingerprint": TRAIN.fingerprint, "source_commit": "abc", "training_run": reference.run_id}
    return spec, WorkerConfig(settings, str(folder / "0001"), reference, lineage), attach(reference)


@pytest.mark.slow
def test_the_best_is_candidate_with_a_description_and_the_first_is_champion(
    uri: str, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/train.py", "--recipe", "demo", "data.train=s3://K:S@bucket/train", "a=b c"])
    spec, config, tracking = trained(uri, tmp_path, fence)
    model = register_best(spec, config, tracking, serving.PYFUNC_CODE)["model"]
    found = Registry(uri).find(model)
    assert found.aliases == ("candidate", "champion") and found.tags["step"] == "3"
    for words in (
        f"| data | motions train: 32 videos of 2 classes, `{TRAIN.fingerprint}` |",
        f"| validated on | motions val: 6 videos of 2 classes, `{VAL.fingerprint}` |",
        "| recipe | demo |",
        "| network | swin_nano, 12,345 parameters |",
        "| clips | 16 frames of 32 x 32, dense, stride 1 |",
        "| started from | random weights |",
        f"| training run | {tracking.id} |",
        "top-1 62.50, top-5 100.00, mean class 61.25 in the training's own validation, at 1 x 1 views.",
        "## Limits\n\nIt gives every video one of its 2 classes",
        "```sh\npython jobs/train.py --recipe demo data.train=s3://bucket/train 'a=b c'\n```",
    ):
        assert words in found.description, found.description
    again = register_best(replace(spec, val=None), config, tracking, serving.PYFUNC_CODE)["model"]
    assert Registry(uri).aliases(tmp_path.name) == {"candidate": 2, "champion": 1} and again.endswith("/2")
    assert "| validated on | nothing |" in Registry(uri).find(again).description


def test_what_a_store_that_is_away_does_not_take_is_registered_later_as_it_would_have_been(
    uri: str, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec, config, tracking = trained(uri, tmp_path, fence, store="http://127.0.0.1:9")
    place = register_best(spec, config, tracking, serving.PYFUNC_CODE)["model"]
    assert Path(place).name == "step-00000003" and tracking.spool
    assert tracking.spool.waiting() == "the registration of the model"
    assert Path(vswin_dist.__file__).parent.as_posix() not in "".join(p.read_text() for p in tmp_path.rglob("spool/*.json"))
    assert send_kept(replace(config.run, uri=uri), is_over=True) == [f"registered models:/{tmp_path.name}/1"]
    found = Registry(uri).find(f"models:/{tmp_path.name}@champion")
    assert found.aliases == ("candidate", "champion") and "| recipe | demo |" in found.description


def scored(uri: str, run_id: str) -> None:
    """Log what the ranks log of two evaluations."""
    logged = attach(RunReference(uri, run_id))
    for step, scores in EVALUATIONS.items():
        logged.log(step, scores)
    assert logged.flush() and logged.close() == 0


@pytest.mark.slow
def test_the_page_of_models_ranks_what_was_registered_now_or_later_by_its_scores(
    uri: str, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a store that is slow has not got the scores yet when the model is registered."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client, runs = backend.client(uri), []
    for number, (store, slow) in enumerate(((None, False), ("http://127.0.0.1:9", False), (None, True))):
        (tmp_path / str(number)).mkdir()
        spec, config, tracking = trained(uri, tmp_path / str(number), fence, store=store)
        if slow and tracking.spool:
            rows = [(name, value, 1000 + step, step) for step, of in EVALUATIONS.items() for name, value in of.items()]
            tracking.spool.put("metrics", {"rows": rows})
        else:
            scored(uri, tracking.id)
        register_best(spec, config, tracking, serving.PYFUNC_CODE)
        runs.append(tracking.id)
        send_kept(replace(config.run, uri=uri), is_over=True)
    experiment = client.get_experiment_by_name("exp").experiment_id
    by_score = [{"field_name": "metrics.val/top1", "ascending": False}]
    models = [m for m in client.search_logged_models([experiment], order_by=by_score) if m.source_run_id in runs]
    assert len(models) == 3
    for model in models:
        found = {m.key: (m.value, m.step, m.run_id, m.dataset_name, m.dataset_digest) for m in model.metrics}
        assert found == {k: (v, 3, model.source_run_id, "motions", VAL.fingerprint) for k, v in SCORES.items()}
        history = client.get_metric_history(model.source_run_id, "val/top1")
        assert [(m.step, m.value) for m in history] == [(3, 62.5), (6, 50.0)], "a point of the curve was doubled"


def test_what_sets_a_run_apart_is_a_param_and_all_settings_are_a_recipe(uri: str, fence: Fence, tmp_path: Path) -> None:
    spec, config, tracking = trained(uri, tmp_path, fence)
    s = replace(spec.settings, tracking=replace(spec.settings.tracking, parent="abc"))
    log_start(tracking, "text", replace(spec, settings=s), config.lineage | {"source_commit": "c"})
    run = backend.client(uri).get_run(tracking.id)
    assert run.data.tags["mlflow.parentRunId"] == "abc" and run.data.params["recipe"] == "demo"
    assert run.data.params["model.name"] == "swin_nano" and run.data.params["data.train"] == "s3://bucket/train"
    assert {"optim.betas", "data.sampling"} & run.data.params.keys() == {"data.sampling"}
    assert (
        run.data.params["optim.lr"] == str(s.optim.lr) and run.data.params["run.seed"] == "0"
    )  # also where nobody set them
    assert len(run.data.params) < len(to_flat(s)) / 2
    path = tmp_path / "settings.yaml"
    path.write_text(Path(run.info.artifact_uri, "settings.yaml").read_text().replace("s3://bucket", "s3://K:S@bucket"))
    assert to_flat(load_settings(str(path))) == to_flat(s)


def test_a_driver_that_lost_its_run_registers_nothing(uri: str, fence: Fence, tmp_path: Path) -> None:
    spec, config, tracking = trained(uri, tmp_path, fence)
    _, claim = lease._claim(str(tmp_path / "lease"), "the run", "wait", take_over=True)
    lease._mine.discard(claim.id)
    with pytest.raises(FencedOut, match="taken over"):
        register_best(spec, config, tracking, serving.PYFUNC_CODE)
    assert not list(tmp_path.rglob("spool/*.json"))

    assert backend.model_versions(uri, tmp_path.name) == []
