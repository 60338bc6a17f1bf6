"""A registered model on the sqlite default and behind a real MLflow server: its files, and MLflow's own loading."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas
import pytest
import torch

from tests.support.mlflow_server import mlflow_server
from tests.support.ports import free_port
from tests.support.s3_server import S3Server
from tests.support.waiting import wait_until
from vswin_dist import storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import CheckpointError
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import write_model
from vswin_dist.serving import PYFUNC_CODE
from vswin_dist.serving.predict import load_predictor
from vswin_dist.tracking import Measured, Registry, backend, open_run, tracking_uri

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
    return write_model(
        str(tmp_path_factory.mktemp("model")),
        build_model("swin_nano", num_classes=6),
        classes=[f"class {i}" for i in range(6)],
        preprocessing=preprocessing_of(data),
        lineage={},
    )


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
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *videos],
        capture_output=True,
        text=True,
        env={**environment, "MLFLOW_TRACKING_URI": uri},
    )
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
def test_mlflow_itself_loads_the_champion(
    kind: str,
    home: Path,
    model_folder: str,
    videos: list[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = tracking_uri(None) if kind == "sqlite" else request.getfixturevalue("server")
    opened, registry = open_run(uri, "exp", "train"), Registry(uri)
    run_id = opened.id
    opened.log(7, {"val/top1": 0.75})
    assert opened.flush() and opened.close() == 0
    tags = {"dataset_fingerprint": "f" * 32, "inflated_from": "models:/swin/1", "top1": 0.75}
    how: dict[str, Any] = {"alias": "champion", "run_id": run_id, "measured": Measured(7, ["val/top1"], "k400", "f" * 32)}
    assert registry.register("nano", model_folder, tags=tags, pyfunc=PYFUNC_CODE, **how) == "models:/nano/1"

    folder, version = registry.resolve("models:/nano@champion")
    assert version.tags == {**{k: str(v) for k, v in tags.items()}, "training_run": run_id}
    assert Path(folder, "model.safetensors").read_bytes() == Path(model_folder, "model.safetensors").read_bytes()
    assert Path(folder).is_relative_to(home)  # in the store, or fetched into the data root
    fetched = Path(folder, "model.safetensors").stat().st_ino
    assert Path(registry.resolve("models:/nano/1")[0], "model.safetensors").stat().st_ino == fetched

    outputs = backend.client(uri).get_run(run_id).outputs.model_outputs
    logged = backend.client(uri).get_logged_model(outputs[0].model_id)
    assert str(logged.status) == "READY" and logged.tags["top1"] == "0.75" and logged.model_id == version.model_id
    [metric] = logged.metrics
    assert (metric.key, metric.value, metric.step, metric.run_id) == ("val/top1", 0.75, 7, run_id)
    assert (metric.dataset_name, metric.dataset_digest) == ("k400", "f" * 32)

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
    registry, tags = Registry(uri), {"inflated_from": "swin.pth"}
    made = registry.register("inflated", model_folder, tags=tags, pyfunc=PYFUNC_CODE, alias="champion")
    assert made == "models:/inflated/1"
    folder, version = registry.resolve("models:/inflated@champion")
    assert (version.run_id, version.tags) == (None, {"inflated_from": "swin.pth"})
    assert Path(folder, "model.json").read_bytes() == Path(model_folder, "model.json").read_bytes()


def invoke(port: int, videos: list[object]) -> list[dict]:
    """What `mlflow models serve` answers."""
    body = json.dumps({"dataframe_records": [{"video": video} for video in videos]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["predictions"]


@contextlib.contextmanager
def mlflow_models_serve(model: str, uri: str, log: Path) -> Iterator[int]:
    """The port at which MLflow serves `model`."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"MLFLOW_TRACKING_URI": uri, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.faults
def test_weights_stay_in_object_storage_and_a_bad_video_is_an_error_for_that_one_alone(
    server: str,
    home: Path,
    model_folder: str,
    videos: list[str],
    object_store: S3Server,
    object_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    url, video = f"{object_prefix}/model", f"{object_prefix}/1.mp4"
    for name in ("model.safetensors", "model.json"):
        storage.put_file(Path(model_folder, name), f"{url}/{name}")
    storage.put_file(videos[1], video)
    Registry(server).register("far", url, tags={}, pyfunc=PYFUNC_CODE)
    folder, version = Registry(server).resolve("models:/far@champion")
    assert folder == url == version.tags["weights_at"]
    logged = backend.client(server).get_model_version("far", "1").source
    fetched = backend.mlflow().artifacts.download_artifacts(artifact_uri=logged, dst_path=str(tmp_path), tracking_uri=server)
    assert not [path for place in (home, Path(fetched)) for path in place.rglob("*.safetensors")], "the weights were copied"

    content = base64.b64encode(Path(videos[1]).read_bytes()).decode()
    asked = [videos[0], video, f"data:video/mp4;base64,{content}", "absent.mp4"]
    bad = f"data:video/mp4;base64,{base64.b64encode(b'no video').decode()}"
    with mlflow_models_serve("models:/far/1", server, tmp_path / "serve.log") as port:
        wait_until(lambda: answers(port), timeout_s=120)
        rows = invoke(port, [*asked, bad, None])
    ours = list(load_predictor(url).predict([videos[0], videos[1], videos[1]]))
    for row, mine in zip(rows, ours, strict=False):
        assert row["class"] == mine.top[0][0] and row["error"] is None
        assert row["top5_classes"] == [name for name, _ in mine.top]
        assert row["top5_probabilities"] == pytest.approx([p for _, p in mine.top], abs=1e-6)
    assert [row["video"] for row in rows] == [*asked[:2], None, "absent.mp4", None, None]
    for row, why in zip(rows[3:], ("no video at absent.mp4", "the video: cannot be decoded", "no video: "), strict=True):
        assert row["error"].startswith(why) and row["class"] is None and row["top5_classes"] == []


def test_a_model_of_another_project_is_refused(server: str, home: Path, tmp_path: Path) -> None:
    client = backend.client(server)
    client.create_registered_model("other")
    run_id = open_run(server, "exp", "other").id
    (tmp_path / "x.txt").write_text("x")
    client.log_artifact(run_id, str(tmp_path / "x.txt"), "model")
    client.create_model_version("other", f"runs:/{run_id}/model", run_id=run_id)
    with pytest.raises(CheckpointError, match=r"models:/other/1 holds no model\.json.*not a model of this project"):
        Registry(server).resolve("models:/other/1")
