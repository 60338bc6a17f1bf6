"""Commands where HOME names no folder, as in some containers: below /proc none can be made, by root neither.

The path of TMPDIR is too long for a socket, as batch systems make it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_prep.cli import main as data_prep
from tests.support.line import Line
from vswin_dist.model_card import CARD, WEIGHTS
from vswin_dist.training import checkpoint

NOWHERE = "/proc/no-home"


@pytest.fixture
def homeless(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    """`line`, whose jobs are told neither a home folder nor a data root."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # as a user has it: Ray writes a token into the home folder
    temporary = tmp_path / "tmp" / ("of-a-job-" * 8)
    temporary.mkdir(parents=True)
    line.anew = True
    line.env |= {"HOME": NOWHERE, "VSWIN_HOME": "", "TMPDIR": str(temporary), "MLFLOW_TRACKING_URI": ""}
    return line


# Nothing is learned at this rate: the first evaluation stays the best.
EARLY_END = ("training.epochs=9", "evaluation.every_epochs=1", "evaluation.patience=1", "optim.lr=1e-12")
AVERAGED = ("training.ema_decay=0.9", "evaluation.ema=true")


@pytest.mark.faults
def test_a_training_without_mlflow_ends_early_and_leaves_an_average_that_is_used(homeless: Line, tmp_path: Path) -> None:
    (tmp_path / "without" / "mlflow").mkdir(parents=True)
    (tmp_path / "without" / "mlflow" / "__init__.py").write_text("raise ImportError('MLflow is not installed')")
    paths = homeless.environment.get("PYTHONPATH", "")
    homeless.env["PYTHONPATH"] = f"{tmp_path / 'without'}:{paths}"
    settings = ("tracking.uri=none", "training.workers=1", "data.workers=1", *EARLY_END, *AVERAGED)
    output = homeless.train("plain", *settings)
    assert "step 6: evaluations in a row that were not above" in output and "step 9" not in output
    root = Path(homeless.env["TMPDIR"]) / f"vswin-{os.getuid()}" / "vswin"
    assert (root.parent / ".ray").is_dir() and (root / "runs").is_dir() and not (root / "mlflow").exists()
    refused = homeless.train("other", "tracking.uri=none", "model.init=models:/plain@champion", code=2)
    assert "error: models:/plain@champion: tracking.uri=none has no registry of models." in refused
    refused = homeless.train("plain", *settings, code=2)
    assert "is finished" in refused and "evaluation.patience=2 or more goes on" in refused

    lines = dict(text.split(maxsplit=1) for text in output.splitlines() if text.startswith(("model ", "checkpoint ")))
    model, saved = Path(lines["model"]), Path(lines["checkpoint"])
    assert model == saved.parent / f"ema-{saved.name}" and (model / CARD).read_text() == (saved / CARD).read_text()
    averages, found = checkpoint.load_moments(str(saved)), load_file(model / WEIGHTS)
    assert found.keys() == load_file(saved / WEIGHTS).keys()
    assert all(t.equal(averages[f"ema.{name}"]) for name, t in found.items())

    score = ("--model", str(model), "--data", f"{homeless.shards}/val", "--clips", "1", "--crops", "1", "--workers", "0")
    assert "expected 12 / scored 12 / missing 0" in homeless.run("evaluate", *score, "--tracking-uri", "none")
    homeless.env["PYTHONPATH"] = paths
    video = next((homeless.shards / "videos" / "val").rglob("*.mp4"))
    assert str(video) in homeless.run("predict", "--model", str(model), str(video))
    assert "scored 12" in homeless.run("evaluate", *score) and (root / "mlflow").is_dir()


def test_videos_are_prepared(
    homeless: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in homeless.env.items():
        monkeypatch.setenv(name, value)
    videos = homeless.shards / "videos" / "val"
    source = ("csv", "--index", str(videos / "index.csv"), "--videos", str(videos), "--path-column", "path")
    assert (
        data_prep(["shard", *source, "--label-column", "label", "--short-side", "48", "--out", str(tmp_path / "out")]) == 0
    )
    assert data_prep(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("job", ["train", "inflate", "evaluate", "compare", "ablate", "predict", "prepare", "benchmark"])
def test_every_job_shows_its_help(homeless: Line, job: str) -> None:
    shown = homeless.run(job, "--help")
    assert shown.startswith("usage: ") and "--help" in shown
