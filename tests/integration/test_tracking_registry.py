"""A registered model on the sqlite default and behind a real MLflow server: its files, and MLflow's own loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pandas
import pytest
import torch

from tests.integration.mlflow_server import mlflow_server
from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import CheckpointError
from vswin_dist.models import build_model
from vswin_dist.serving.export import preprocessing_of, write_model
from vswin_dist.serving.predict import load_predictor
from vswin_dist.tracking import backend, open_run, register_model, resolve_model, tracking_uri

# As a stranger to this project would use the model, in a folder without its code.
STRANGER = """
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/nano@champion")
found = model.predict(pandas.DataFrame({"video": sys.argv[1:]}))
print(json.dumps({"rows": found.to_dict("records"), "code": sys.modules["vswin_dist"].__file__}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as started:
        yield started.uri


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    data = DataSettings(train="x", sampling="dense", frames=4, stride=1, size=32, short_side=32)
    return write_model(str(tmp_path_factory.mktemp("model")), build_model("swin_nano", num_classes=6),
                       classes=[f"class {i}" for i in range(6)], preprocessing=preprocessing_of(data), lineage={})


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    made = []
    for number in range(2):
        path = tmp_path_factory.mktemp("videos") / f"{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for i in range(8):
                picture = np.full((32, 48, 3), 20 + 25 * i if number else 220 - 25 * i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        made.append(str(path))
    return made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSWIN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def ask_a_stranger(uri: str, videos: list[str]) -> list[dict]:
    """Predictions in a process that imports nothing of this project; the model brings its code."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", STRANGER, *videos], capture_output=True, text=True,
                          env={**environment, "MLFLOW_TRACKING_URI": uri})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "/code/vswin_dist/" in answer["code"]
    return answer["rows"]


def ask_here(uri: str, videos: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Predictions by MLflow in this process."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow puts the model's code in front
    model = backend.mlflow().pyfunc.load_model("models:/nano@champion")
    return model.predict(pandas.DataFrame({"video": videos})).to_dict("records")


@pytest.mark.parametrize("kind", ["sqlite", "server"])
def test_mlflow_itself_loads_the_champion(kind: str, home: Path, model_folder: str, videos: list[str],
                                          request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = tracking_uri(None) if kind == "sqlite" else request.getfixturevalue("server")
    run_id = open_run(uri, "exp", "train")
    tags = {"dataset_fingerprint": "f" * 32, "inflated_from": "models:/swin/1", "top1": 0.75}
    assert register_model(uri, "nano", model_folder, alias="champion", tags=tags, run_id=run_id) == 1

    folder, version = resolve_model(uri, "models:/nano@champion")
    assert version.tags == {**{k: str(v) for k, v in tags.items()}, "training_run": run_id}
    assert Path(folder, "model.safetensors").read_bytes() == Path(model_folder, "model.safetensors").read_bytes()
    assert Path(folder).is_relative_to(home)  # in the store, or fetched into the data root
    fetched = Path(folder, "model.safetensors").stat().st_ino
    assert Path(resolve_model(uri, "models:/nano/1")[0], "model.safetensors").stat().st_ino == fetched

    outputs = backend.client(uri).get_run(run_id).outputs.model_outputs
    logged = backend.client(uri).get_logged_model(outputs[0].model_id)
    assert str(logged.status) == "READY" and logged.tags["top1"] == "0.75"

    ours = list(load_predictor("models:/nano@champion", uri=uri).predict(videos))
    rows = ask_a_stranger(uri, videos) if kind == "server" else ask_here(uri, videos, monkeypatch)
    for row, mine in zip(rows, ours, strict=True):
        assert row["video"] == mine.video
        assert row["class"] == row["top5_classes"][0] == mine.top[0][0]
        assert row["top5_classes"] == [name for name, _ in mine.top] and len(mine.top) == 5
        assert row["top5_probabilities"] == pytest.approx([p for _, p in mine.top], abs=1e-6)
        assert row["probability"] == row["top5_probabilities"][0]
    assert ours[0].top != ours[1].top
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("kind", ["sqlite", "server"])
def test_a_model_without_a_run(kind: str, home: Path, model_folder: str, request: pytest.FixtureRequest) -> None:
    """As an inflated checkpoint is registered."""
    uri = tracking_uri(None) if kind == "sqlite" else request.getfixturevalue("server")
    assert register_model(uri, "inflated", model_folder, alias="champion", tags={"inflated_from": "swin.pth"}) == 1
    folder, version = resolve_model(uri, "models:/inflated@champion")
    assert (version.run_id, version.tags) == (None, {"inflated_from": "swin.pth"})
    assert Path(folder, "model.json").read_bytes() == Path(model_folder, "model.json").read_bytes()


def test_a_model_of_another_project_is_refused(server: str, home: Path, tmp_path: Path) -> None:
    client = backend.client(server)
    client.create_registered_model("other")
    run_id = open_run(server, "exp", "other")
    (tmp_path / "x.txt").write_text("x")
    client.log_artifact(run_id, str(tmp_path / "x.txt"), "model")
    client.create_model_version("other", f"runs:/{run_id}/model", run_id=run_id)
    with pytest.raises(CheckpointError, match=r"models:/other/1 holds no model\.json.*no model of this project"):
        resolve_model(server, "models:/other/1")
