"""README's commands, run as they stand there: on rendered videos, with a recipe that a CPU can train.

Through `ray job submit`, S3 with keys, and an MLflow server: from videos to a registered, scored, predicting model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from infra.local import motions, services
from infra.local.cluster import Cluster
from infra.local.secret_search import SecretSearch
from tests.support.line import REPOSITORY, SMALL, Line
from tests.support.mlflow_server import mlflow_server
from tests.support.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from vswin_dist.models import build_model, export_state
from vswin_dist.tracking import Registry

FIVE = ["data-prep shard", "jobs/inflate.py", "ray job submit jobs/train.py", "jobs/evaluate.py", "jobs/predict.py"]
RECIPE = "demo"  # instead of README's, whose model is too large for a CPU
URL = re.compile(r"s3://[\w./-]+")


def commands() -> list[list[str]]:
    """The words of each command in README's blocks marked `sh`, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def kind(words: list[str]) -> str:
    """Which of the five a command is; else the command itself."""
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        return f"ray job submit {kind(words[words.index('--') + 1 :])}"
    if words[0] == "python" and len(words) > 1:
        return words[1]
    return " ".join(words[:2])


def value(words: list[str], option: str) -> str:
    """What a command gives `option`, which is `--name` or the `key=` of a setting."""
    if option.endswith("="):
        return next(w.removeprefix(option) for w in words if w.startswith(option))
    return words[words.index(option) + 1]


class Project:
    """A user's machine: where README's URLs lead to an S3 server, and `ray job submit` to a cluster.

    The keys are in the cluster's environment, not in the job's.
    """

    def __init__(self, line: Line, cluster: Cluster, s3: S3Server, tracking_uri: str) -> None:
        import fsspec

        self.line, self.tracking_uri, self.cluster, self.store = line, tracking_uri, cluster, s3
        self.printed: list[str] = []
        self.s3 = fsspec.filesystem("s3", key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=s3.endpoint)
        self.environment = line.environment | s3.environment | cluster.env
        self.environment |= {"RAY_API_SERVER_ADDRESS": cluster.dashboard, "PYTHONPATH": str(REPOSITORY)}
        self.environment["MLFLOW_TRACKING_URI"] = tracking_uri
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def put(self, path: Path, url: str) -> None:
        """Upload a file or a folder to the place that `url` names."""
        place = url.removeprefix("s3://")
        for file in (p for p in [path, *path.rglob("*")] if p.is_file()):
            self.s3.put_file(str(file), f"{place}/{file.relative_to(path)}" if path.is_dir() else place)

    def run(self, words: list[str]) -> str:
        """Run a command in the repository's folder; its output. Fails where it fails."""
        done = subprocess.run(
            words,
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-6000:]}"
        self.printed.append(done.stdout)
        return done.stdout


@pytest.fixture
def project(line: Line, cluster: Cluster, object_store: S3Server, tmp_path: Path) -> Iterator[Project]:
    with mlflow_server(tmp_path / "mlflow") as server:
        made = Project(line, cluster, object_store, server.uri)
        yield made
        for bucket in {*made.s3.ls("")} - {BUCKET}:  # README's own, which a second try makes anew
            made.s3.rm(bucket, recursive=True)


@pytest.mark.faults
def test_the_five_commands_of_a_project(project: Project, tmp_path: Path) -> None:
    before = searched(project, tmp_path)
    given = [words for words in commands() if words[0] != "make"]
    kinds = [kind(words) for words in given]
    assert [k for i, k in enumerate(kinds) if k != kinds[i - 1]] == FIVE
    *preparing, inflating, training, scoring, predicting = given
    for bucket in {url.split("/")[2] for words in given for word in words for url in URL.findall(word)}:
        project.s3.mkdir(bucket)

    for number, words in enumerate(preparing):  # the sets that training and scoring name are made here
        videos = motions.make_dataset(tmp_path / str(number), 24 if number == 0 else 6, seed=number)
        (videos / "index.csv").unlink()  # README's are folders of classes
        project.put(videos, value(words, "--videos"))
        assert "rejected 0" in project.run(words)

    recipe = value(inflating, "--recipe")
    flat = build_model("swin_nano", num_classes=4, patch_size=(1, 4, 4), window_size=(1, 4, 4))
    torch.save({"model": export_state(flat, "microsoft2d")}, tmp_path / "flat.pth")
    project.put(tmp_path / "flat.pth", value(inflating, "--weights"))
    registered = value(inflating, "--register")
    assert f"registered models:/{registered}/1 (alias champion, inflated)" in project.run(with_recipe(inflating))

    assert value(training, "--recipe") == recipe and value(training, "model.init=") == f"models:/{registered}@champion"
    small = {s.partition("=")[0]: s for s in (*SMALL, "training.max_steps=2", "evaluation.report=true")}
    kept = [w for w in with_recipe(training) if w.partition("=")[0] not in small]
    bucket = value(training, "data.train=").rpartition("/")[0]
    endpoint = project.environment["AWS_ENDPOINT_URL_S3"]
    own = [f"tracking.uri={project.tracking_uri}", f"storage.root={bucket}/runs", f"storage.s3_endpoint={endpoint}"]
    output = project.run([*kept, *small.values(), f"run.name={recipe}", *own])
    assert f"models:/{recipe}/1" in output and SECRET_KEY not in output
    assert not (project.line.home / "runs").exists(), "checkpoints belong on S3"
    check_run(project, recipe, registered)

    assert value(scoring, "--model") == f"models:/{recipe}@champion"
    assert "expected 6 / scored 6 / missing 0" in project.run(scoring)

    [url] = [w for w in predicting if URL.fullmatch(w)]
    project.put(next((tmp_path / "0").glob("*/*.mp4")), url)
    assert project.run(predicting).count("%") == 5
    after = searched(project, tmp_path)
    assert after.places > 500 and "jobs/train.py" in job_list(project)
    assert not set(after.wrong) - set(before.wrong), "no secret stands where none stood"


def searched(project: Project, tmp_path: Path) -> SecretSearch:
    """Look for each secret in all that was written, logged, uploaded or answered, by other tests of the session too."""
    search = SecretSearch([ACCESS_KEY, SECRET_KEY, project.cluster.env["RAY_AUTH_TOKEN"]])
    heads = list(Path(os.environ["RAY_TMPDIR"]).glob("vswin-ray-*"))
    assert any((head / "session_latest").exists() for head in heads)
    for folder in (*heads, tmp_path, project.store.folder):
        search.below(folder)
    search.text("the list of jobs", job_list(project))
    search.text("what the commands printed", "\n".join(project.printed))
    return search


def job_list(project: Project) -> str:
    """What Ray's job server says of all jobs."""
    code, jobs = services.ask(f"{project.cluster.dashboard}/api/jobs/", token=project.cluster.env["RAY_AUTH_TOKEN"])
    assert code == 200
    return jobs.decode()


def check_run(project: Project, name: str, start: str) -> None:
    """The training's run holds what docs/training.md says, and no key."""
    uri = project.tracking_uri
    champion = Registry(uri).find(f"models:/{name}@champion")
    assert champion.aliases == ("candidate", "champion") and champion.tags["dataset_fingerprint"] in champion.description
    assert champion.tags["initialised_from"] == f"models:/{start}/1"
    assert {"dataset_fingerprint", "training_run", "source_commit", "top1"} <= champion.tags.keys()
    run = project.line.run_of(name, uri)
    assert champion.run_id == run.info.run_id and run.info.status == "FINISHED"
    assert run.data.params["model.name"] == "swin_nano" and run.data.tags["source_commit"].startswith("tree-")
    assert sorted(project.line.losses(name, uri)) == [1, 2]
    wanted = {"train/loss", "train/grad_norm", "train/clips_per_second", "train/data_wait_share", "lr/head", "val/top1"}
    assert wanted | {"val/top5"} <= run.data.metrics.keys()
    files = {file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id)}
    assert {"recipe.yaml", "parameter_groups.md", "environment.json", "load_report.txt", "report.html", "pictures"} <= files
    assert len(run.inputs.dataset_inputs) == 2
    assert SECRET_KEY not in json.dumps(run.to_dictionary())


def with_recipe(words: list[str]) -> list[str]:
    """The command with `RECIPE` for its own."""
    at = words.index("--recipe") + 1
    return [*words[:at], RECIPE, *words[at + 1 :]]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_targets_of_make_call_what_there_is() -> None:
    targets = [words[1:] for words in commands() if words[0] == "make"]
    assert targets == [["demo"], ["test"]]
    called = {"demo": "infra.local.demo", "test": "pytest"}
    for [target] in targets:
        shown = subprocess.run(
            ["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout
        [module] = set(re.findall(r"python -m (?!venv\b|compileall\b)([\w.]+)", shown))
        assert module == called[target] and importlib.util.find_spec(module)
