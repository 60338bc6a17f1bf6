"""MLflow's own pages, clicked through in Chromium, over runs and models that are logged as trainings and evaluations do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.chromium import Tab, browser, chromium
from tests.support.mlflow_server import mlflow_server
from vswin_dist import charts, model_card, storage
from vswin_dist.evaluation import report
from vswin_dist.evaluation.analysis import analyse
from vswin_dist.evaluation.evaluate import Views
from vswin_dist.evaluation.launch import Evaluation
from vswin_dist.evaluation.metrics import score
from vswin_dist.evaluation.predictions import Found, Identity, Predictions
from vswin_dist.manifest import Manifest, Sample, Shard, write_manifest
from vswin_dist.tracking import DatasetRecord, Measured, Registry, open_run

N, CLASSES = 40, ["left", "right"]
SAMPLES = [Sample(f"v{i}", i % 2, 0, i, 1, 0, "mp4", 9, 1.0, 9.0, 8, 8, "") for i in range(N)]
SET = Manifest("motions", "val", CLASSES, {}, [Shard("0.tar", 1, "", N)], SAMPLES, [], N)
PYFUNC = Path(__file__).parents[1] / "support" / "no_model.py"
CARD = "A Video Swin Transformer for classifying videos.\n\n## Limits\n\nIt gives every video one of its 2 classes."

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium here (apt-get install chromium)")


def train(uri: str, name: str, epochs: int, top1: float) -> None:
    """Log what a training logs, and register a model of its own."""
    run = open_run(uri, "vswin", name)
    run.start(
        settings={"recipe": "demo", "training.epochs": epochs, "data.frames": 16, "optim.lr": 0.001},
        defaults={"data.frames": 16},
        recipe="run.name: x\n",
        source="abc",
        world_size=2,
        datasets=[DatasetRecord("motions", SET.fingerprint, "s3://vswin/val", "validation")],
        tags={"kind": "training"},
    )
    for step in range(3):
        run.log(step, {"val/top1": top1 * (step + 1) / 3, "train/loss": 2.0 - step})
    run.artifact("pictures/curves.svg", charts.lines({"val/top1": [(0.0, 1.0), (2.0, top1)]}, "step", "top-1"))
    assert run.close() == 0
    url = f"memory://pages/{name}"
    storage.put_bytes(f"{url}/{model_card.WEIGHTS}", b"weights")
    storage.put_bytes(f"{url}/{model_card.CARD}", json.dumps({"settings": {}}).encode())
    measured = Measured(2, ["val/top1"], "motions", SET.fingerprint)
    how = {"tags": {"recipe": "demo"}, "pyfunc": PYFUNC, "alias": "candidate", "description": CARD, "measured": measured}
    Registry(uri).register("motions", url, run_id=run.id, **how)
    run.end("FINISHED")


def evaluate(uri: str, version: int, right: int, shards: str) -> None:
    """Log an evaluation in which the first `right` videos were recognised."""
    labels = np.arange(N) % 2
    truth = np.where(np.arange(N) < right, labels, 1 - labels)
    found = Found(np.arange(N), labels, np.where(np.arange(2) == truth[:, None], 0.75, 0.25), [])
    identity = Identity("w", "c", SET.fingerprint, "motions val", CLASSES, 4, 3, 8, False, "cpu", "2")
    predictions = Predictions(identity, found, [f"v{i}" for i in range(N)], [])
    evaluation = Evaluation(score(found.probabilities, labels, []), predictions, "/nowhere/predictions.parquet")
    model = report.find_model(f"models:/motions/{version}", uri, None)
    analysis = analyse(found.probabilities, labels, CLASSES)
    report.log(model, shards, Views(4, 3, 8), evaluation, analysis, ranks=1, top=None)


async def look(tab: Tab, uri: str) -> None:
    """Go where people go, by clicks."""
    await tab.open(f"{uri}/#/experiments")
    await tab.click("vswin", "a")
    await tab.shows("Model training, at the top left, shows its runs and models")
    await tab.click("Model training")
    await tab.shows("Runs", "short", "long", "motions", "v1", "v2")
    assert not await tab.value("document.body.innerText.includes('Sessions')"), "the view is that of language models"
    rows = "[...document.querySelectorAll('[role=row]')]"
    for name in ("short", "long"):
        box = f"{rows}.find(r => r.innerText.includes('{name}'))?.querySelector('input[type=checkbox]')"
        await tab.until(f"{box} && ({box}.click(), true)")
    await tab.click("Compare", "button")
    await tab.shows("Comparing 2 Runs from 1 Experiment", "training.epochs", "optim.lr")
    assert not await tab.value("document.body.innerText.includes('data.frames')"), "a setting that both leave as it is"
    await tab.open(f"{uri}/#/experiments/1/models")
    await tab.shows("val/top1", "test/top1", "80", "motions")
    await tab.open(f"{uri}/#/models/motions/versions/2")
    await tab.shows("Version 2", "candidate", "Limits", "Evaluations", "80.00 (", "4 x 3", "recipe")
    await tab.click("long", "a")
    await tab.click("Artifacts")
    await tab.click("pictures", "div")
    await tab.click("curves.svg", "div")
    await tab.until("[...document.querySelectorAll('img')].some(i => i.src.startsWith('blob:') && i.naturalWidth > 100)")


def test_people_find_runs_their_difference_models_cards_and_pictures(tmp_path: Path) -> None:
    shards = str(tmp_path / "shards")
    write_manifest(SET, shards)

    async def click_through(uri: str) -> None:
        async with browser(tmp_path / "chromium", (3400, 1200)) as tab:
            try:
                await look(tab, uri)
            finally:
                await tab.picture(tmp_path / "page.png")

    with mlflow_server(tmp_path / "mlflow") as server:
        for name, epochs, top1, right in (("short", 2, 40.0, 20), ("long", 8, 60.0, 32)):
            train(server.uri, name, epochs, top1)
            evaluate(server.uri, {"short": 1, "long": 2}[name], right, shards)
        asyncio.run(click_through(server.uri))
