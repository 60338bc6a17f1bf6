"""Every form of export answers as the model does, for any number of clips; one that does not is never written."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml

from tests.parity.reference_swin import ReferenceSwin
from tests.support.commands import ROOT
from tests.support.mlflow_store import new_store
from vswin_dist import storage
from vswin_dist.errors import ConfigError, PreflightError, WorkFailed, run_command
from vswin_dist.export import export
from vswin_dist.export.formats import FORMATS, Format
from vswin_dist.export.subject import Clips, Subject, choose_clips
from vswin_dist.model_card import ModelCard
from vswin_dist.models import VideoSwin, build_model
from vswin_dist.models.swin.traceable import Traceable
from vswin_dist.models.weights.portable import load_model
from vswin_dist.tracking import Registry
from vswin_dist.tracking.run import open_run

PYFUNC = ROOT / "tests" / "support" / "no_model.py"
SMALL: dict[str, Any] = {"embed_dim": 12, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 3}
# Shifted and padded on every axis; in the second stage the window is clamped in height and width.
CLIPS = Clips((10, 18, 22), None)
WINDOW = (4, 3, 4)


def random_model(**settings: Any) -> VideoSwin:
    """A model all of whose weights are far from zero, biases, norms and bias tables too."""
    torch.manual_seed(0)
    model = build_model("swin_t", **{**SMALL, **settings}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    return model


def subject(model: VideoSwin, clips: Clips = CLIPS) -> Subject:
    card = ModelCard(dict(model.settings), ["left", "right", "up"], {"frames": 12, "size": 36}, {"recipe": "a|b"})
    return Subject("models:/motions/3", model, card, clips, {"top1": "87.5"})


def reference(model: VideoSwin) -> ReferenceSwin:
    """The plain reference, with roll, partition and mask written out, and the model's weights."""
    made = ReferenceSwin(model.settings).eval()
    made.load_state_dict(model.state_dict(), strict=True)
    return made


@pytest.fixture(scope="module")
def model() -> VideoSwin:
    return random_model(window_size=WINDOW)


@pytest.fixture(scope="module")
def files(model: VideoSwin, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as a program of torch.export, and where ONNX is installed as ONNX, for any number of clips."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for name in ("torch-export", "onnx"):
        if name != "onnx" or onnx_is_there():
            made[name] = folder / f"model{FORMATS[name].suffix}"
            FORMATS[name].write(subject(model), made[name])
    return made


def onnx_is_there() -> bool:
    try:
        FORMATS["onnx"].check_packages("onnx")
    except PreflightError:
        return False
    return True


NEEDS_ONNX = pytest.mark.skipif(not onnx_is_there(), reason="onnx, onnxscript or onnxruntime is not installed")
GRAPHS = ["torch-export", pytest.param("onnx", marks=NEEDS_ONNX)]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_is_traced_computes_what_the_reference_does(model: VideoSwin, batch: int) -> None:
    clips = CLIPS.draw(batch)
    with torch.no_grad():
        torch.testing.assert_close(Traceable(model, CLIPS.shape)(clips), reference(model)(clips), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", GRAPHS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_graph_answers_as_the_reference_for_any_number_of_clips(
    files: dict[str, Path], model: VideoSwin, form: str, batch: int
) -> None:
    classify = FORMATS[form].read(subject(model), files[form])
    clips = CLIPS.draw(batch)
    with torch.no_grad():
        found, expected = classify(clips), reference(model)(clips)
    assert found.shape == (batch, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 0.1 and (batch == 1 or (expected[0] - expected[-1]).abs().max() > 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"window_size": (8, 7, 7), "attention_design": "split"},
        {"window_size": (2, 2, 2), "attention_design": "factorized", "depths": (2,), "num_heads": (2,)},
    ],
)
def test_designs_and_windows_trace(settings: dict[str, Any]) -> None:
    model = random_model(**settings)
    clips = torch.randn(3, 3, *CLIPS.shape)
    program = torch.export.export(
        Traceable(model, CLIPS.shape), (clips[:2],), dynamic_shapes={"clips": {0: torch.export.Dim("batch", min=1)}}
    )
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(clips), model(clips), rtol=0, atol=1e-4)
        assert torch.equal(model(clips), random_model(**settings)(clips)), "tracing left its traces in what is cached"


@pytest.mark.slow
def test_a_fixed_batch_takes_no_other() -> None:
    one = subject(random_model(window_size=(2, 4, 4), depths=(1,), num_heads=(2,)), Clips((4, 16, 16), 2))
    with export.exported(one, "torch-export", 1e-4) as made:
        assert [d.batch for d in made.differences] == [2]
        classify = FORMATS["torch-export"].read(one, made.path)
        assert classify(one.clips.draw(2)).shape == (2, 3)
        with pytest.raises(Exception, match=r"(?i)batch|shape|dimension|size"):
            classify(one.clips.draw(3))


@pytest.mark.slow
@NEEDS_ONNX
def test_an_onnx_file_needs_nothing_but_its_runtime(files: dict[str, Path], model: VideoSwin, tmp_path: Path) -> None:
    """Another process, in which neither this project nor torch can be imported, runs it and finds the card in it."""
    clips = CLIPS.draw(3)
    np.save(tmp_path / "clips.npy", clips.numpy())
    code = """
import numpy, sys, onnxruntime
sys.modules["vswin_dist"] = sys.modules["torch"] = None
session = onnxruntime.InferenceSession(sys.argv[1])
numpy.save("logits.npy", session.run(["logits"], {"clips": numpy.load("clips.npy")})[0])
print(session.get_modelmeta().custom_metadata_map["model.json"])
"""
    words = [sys.executable, "-c", code, str(files["onnx"])]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["classes"] == ["left", "right", "up"]
    with torch.no_grad():
        expected = reference(model)(clips).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_program_holds_the_card(files: dict[str, Path]) -> None:
    extra = {"model.json": ""}
    torch.export.load(files["torch-export"], extra_files=extra)
    assert json.loads(extra["model.json"])["classes"] == ["left", "right", "up"]


@pytest.mark.slow
@NEEDS_ONNX
def test_an_onnx_file_is_valid_and_says_its_shapes(files: dict[str, Path]) -> None:
    import onnx

    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    (clips,), (logits,) = model.graph.input, model.graph.output
    sizes = [d.dim_value or d.dim_param for d in clips.type.tensor_type.shape.dim]
    assert (clips.name, sizes) == ("clips", ["batch", 3, *CLIPS.shape])
    assert (logits.name, [d.dim_value or d.dim_param for d in logits.type.tensor_type.shape.dim]) == ("logits", ["batch", 3])


@pytest.mark.parametrize("form", ["official", "torchvision", "microsoft-2d", "timm-2d"])
def test_weights_for_other_projects(form: str) -> None:
    image = form.endswith("2d")
    settings = (
        {"patch_size": (1, 4, 4), "window_size": (1, 4, 4)} if image else {"window_size": WINDOW, "bias_index": "official"}
    )
    one = subject(random_model(**settings), Clips((1, 32, 32) if image else CLIPS.shape, None))
    with export.exported(one, form, 1e-4) as made:
        assert made.path.suffix == ".pth"
        content = torch.load(made.path, weights_only=True)
    state = content.get("state_dict", content.get("model", content))
    head, kernel, merge = {
        "official": (
            "cls_head.fc_cls.weight",
            "backbone.patch_embed.proj.weight",
            "backbone.layers.0.downsample.norm.weight",
        ),
        "torchvision": ("head.weight", "patch_embed.proj.weight", "features.1.norm.weight"),
        "microsoft-2d": ("head.weight", "patch_embed.proj.weight", "layers.0.downsample.norm.weight"),
        "timm-2d": ("head.fc.weight", "patch_embed.proj.weight", "layers.1.downsample.norm.weight"),
    }[form]
    assert torch.equal(state[head], one.model.head.weight) and merge in state
    assert state[kernel].shape == ((12, 3, 4, 4) if image else (12, 3, 2, 4, 4))
    assert any("index" in name for name in state) == (form != "timm-2d")


def test_weights_that_other_code_would_use_otherwise_are_not_written(tmp_path: Path) -> None:
    """A window clamped in height: the published code takes other rows of the bias table than `offset` does."""
    one = subject(random_model(window_size=(4, 7, 7)), Clips((8, 16, 64), 1))
    for form in ("official", "torchvision"):
        with pytest.raises(WorkFailed, match=r"batch of 1: largest difference .* more than the bound 0\.0001"):
            run(one, form, tmp_path)
    assert list(tmp_path.iterdir()) == []
    run(subject(random_model(window_size=(4, 7, 7), bias_index="official"), one.clips), "official", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]


def run(one: Subject, form: str, folder: Path, tolerance: float = 1e-4) -> None:
    with export.exported(one, form, tolerance) as made:
        export.publish(made, str(folder / f"out{FORMATS[form].suffix}"))


def test_outputs_that_are_no_numbers_are_a_difference(tmp_path: Path) -> None:
    broken = random_model(window_size=WINDOW)
    with torch.no_grad():
        broken.head.bias[1] = float("nan")
    with pytest.raises(WorkFailed, match="largest difference nan"):
        run(subject(broken), "official", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_hugging_face(model: VideoSwin, tmp_path: Path) -> None:
    run(subject(model), "huggingface", tmp_path)
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "left", "1": "right", "2": "up"} and config["label2id"]["up"] == 2
    assert config["num_labels"] == 3 and config["num_frames"] == CLIPS.shape[0]
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    assert np.array_equal(weights["head.weight"], model.head.weight.detach().numpy())
    assert torch.equal(build_model(**config["settings"]).state_dict()["norm.weight"], torch.ones(24))
    front, text = re.match(r"---\n(.*?)---\n(.*)", (folder / "README.md").read_text(), re.DOTALL).groups()  # type: ignore[union-attr]
    assert yaml.safe_load(front)["pipeline_tag"] == "video-classification"
    assert "# motions\n" in text and "| top1 | 87.5 |" in text and "| recipe | a\\|b |" in text and "- left\n" in text
    reloaded, card = load_model(str(folder))
    clips = CLIPS.draw(1)
    with torch.inference_mode():
        assert torch.equal(reloaded(clips), model(clips)) and card.classes == ["left", "right", "up"]


def test_what_cannot_be_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="would go nowhere: give --out URL, or --register"):
        export.check_request("official", "models:/a/1", None, False)
    with pytest.raises(ConfigError, match=r"beside a registered model: 's3://a/b' is none"):
        export.check_request("official", "s3://a/b", None, True)
    form = Format("x", "", FORMATS["onnx"].write, FORMATS["onnx"].read, ("json", "no_such_package"))
    with pytest.raises(PreflightError, match=r"no_such_package is not installed: pip install 'vswin_dist\[export\]'"):
        form.check_packages("x")
    with pytest.raises(ConfigError, match="layout timm2d holds image models"):
        run(subject(random_model(window_size=WINDOW)), "timm-2d", Path("never"))


@pytest.mark.parametrize("place", ["models", "models/", "new/", "s3://bucket", "s3://bucket/a/"])
def test_a_file_is_not_put_at_a_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    out = storage.join(str(tmp_path), place)
    with pytest.raises(
        ConfigError, match=f"--out {out} names a folder, .*: name it, as in --out {out.rstrip('/')}/model.pth"
    ):
        export.check_request("official", "models:/a/1", out, False)
    export.check_request("huggingface", "models:/a/1", str(tmp_path / "models"), False)
    assert [path.name for path in tmp_path.rglob("*")] == ["models"]


@pytest.mark.parametrize("form", ["official", "huggingface"])
def test_a_place_that_takes_no_files_is_refused_before_anything_is_loaded(form: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match=f"cannot write to {tmp_path}/file"):
        export.check_request(form, "models:/a/1", f"{tmp_path}/file/a", False)
    export.check_request(form, "models:/a/1", f"{tmp_path}/a", False)


def test_an_untrained_model_needs_a_shape() -> None:
    with pytest.raises(ConfigError, match="give --clip FRAMES HEIGHT WIDTH"):
        choose_clips(ModelCard({}, [], {}), None, None)
    assert choose_clips(ModelCard({}, [], {"frames": 32, "size": 224}), None, 4) == Clips((32, 224, 224), 4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real sqlite store."""
    return new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture(scope="module")
def job() -> Any:
    """The job's file, run as a module."""
    return runpy.run_path(str(ROOT / "jobs/export.py"))


def test_the_job_offers_every_form(job: Any) -> None:
    assert job["FORMS"] == tuple(FORMATS)


def submit(job: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    return run_command(job["main"])


def test_the_job_asks_the_endpoint_that_it_was_given(
    job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    for name in ("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:7")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    asked = ("nowhere", "--to", "official", "--out", "s3://bucket/a.pth", "--s3-endpoint", "http://127.0.0.1:9")
    assert submit(job, monkeypatch, *asked) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.slow
def test_the_job_writes_to_a_url_and_beside_the_model(
    job: Any, folder: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model registered at a URL with the run that made it, exported twice: to a URL, and among the run's artifacts."""
    import mlflow

    place = f"memory://export/{tmp_path.name}"
    for path in Path(folder).iterdir():
        storage.put_file(path, f"{place}/{path.name}")
    run_id = open_run(store, "exp", "train").id
    tags = {"top1": 0.75}
    Registry(store).register("motions", place, tags=tags, pyfunc=PYFUNC, alias="champion", run_id=run_id)
    asked = ("models:/motions@champion", "--to", "huggingface", "--tracking-uri", store)
    out = f"{place}/hub"
    assert submit(job, monkeypatch, *asked, "--out", out, "--register") == 0
    said = capsys.readouterr().out
    assert "models:/motions/1 swin_nano, clips float32 [B, 3, 4, 32, 32]" in said
    assert re.search(r"checked  batch of 1: largest difference 0\.00e\+00.*\nchecked  batch of 3: .*\nwrote  " + out, said)
    assert storage.list_names(out) == ["README.md", "config.json", "model.json", "model.safetensors"]
    kept = f"runs:/{run_id}/exports/motions-1/huggingface"
    assert f"registered  {kept}" in said
    assert Registry(store).find("models:/motions/1").tags["export.huggingface"] == kept
    fetched = mlflow.artifacts.download_artifacts(
        artifact_uri=f"{kept}/README.md", dst_path=str(tmp_path), tracking_uri=store
    )
    assert "| top1 | 0.75 |" in Path(fetched).read_text()
    assert submit(job, monkeypatch, *asked, "--out", f"{place}/more", "--tolerance", "-1") == 1
    assert "more than the bound -1" in capsys.readouterr().err and not storage.exists(f"{place}/more")


def test_a_version_without_a_run_gets_one(folder: str, store: str, tmp_path: Path) -> None:
    import mlflow

    place = f"memory://export/{tmp_path.name}"
    for path in Path(folder).iterdir():
        storage.put_file(path, f"{place}/{path.name}")
    registry = Registry(store)
    registry.register("alone", place, tags={}, pyfunc=PYFUNC)
    kept = registry.keep_beside(registry.find("models:/alone/1"), "onnx", [Path(folder, "model.json")])
    client = mlflow.MlflowClient(tracking_uri=store)
    run = client.get_run(kept.split("/")[1])
    assert run.info.status == "FINISHED" and run.info.run_name == "onnx of alone/1"
    assert [f.path for f in client.list_artifacts(run.info.run_id, "exports/alone-1/onnx")] == [
        "exports/alone-1/onnx/model.json"
    ]
