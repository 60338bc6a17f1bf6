"""Names that MLflow refuses are refused before the start, and no others, on sqlite and by a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.line import SMALL, Line
from tests.support.mlflow_server import mlflow_server
from tests.support.mlflow_store import new_store
from vswin_dist.config import load_settings, to_flat
from vswin_dist.errors import BadInput, VswinError
from vswin_dist.evaluation import report
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import build_model, export_state
from vswin_dist.models.weights.portable import write_model
from vswin_dist.serving import PYFUNC_CODE
from vswin_dist.tracking import Names, Registry, backend, check_store, open_run
from vswin_dist.training import paper, run_record
from vswin_dist.training.preflight import preflight
from vswin_dist.training.run_record import RunRecord

USUAL = (
    "k400_swin-t",
    "1.10",
    "a b",
    "it's",
    'a"b',
    "50%",
    "a%2Fb",
    "Länge",
    "a@b",
    "a#b?c&d=e",
    "a\\b",
    "a..b",
    "null",
    "-",
)
REFUSED = ("", " ", "a/b", "a:b", "/", ".", "..", "..a", "a/../b", "models:/a@b")
ALIASES = ("champion", "-", "ü", "1", "v3", "V12", "latest", "Latest", "a.b", "a b", "", "a" * 255, "a" * 256, "v3a")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as started:
        yield started.uri


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("sqlite") / "mlflow.db")


@pytest.fixture(params=["database", "server"])
def store(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def is_taken(ask: Callable[[], object]) -> bool:
    """Whether MLflow takes what `ask` asks it for."""
    try:
        ask()
    except Exception as error:
        assert backend.error_code(error) == "INVALID_PARAMETER_VALUE", error
        return False
    return True


def is_checked(store: str, names: Names) -> bool:
    try:
        check_store(store, names)
    except VswinError as error:
        assert isinstance(error, BadInput) and "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("name", [*USUAL, *REFUSED])
def test_a_model_name_is_refused_where_mlflow_refuses_it(store: str, name: str) -> None:
    checked = is_checked(store, Names(model=name))
    assert is_taken(lambda: backend.client(store).create_registered_model(name)) == checked == (name in USUAL)
    assert is_checked(store, Names(model=name)) == checked  # a second version of it


@pytest.mark.parametrize("name", ["a/b", "e" * 500, "", "e" * 501])
def test_an_experiment_is_refused_where_mlflow_refuses_it(store: str, name: str) -> None:
    checked = is_checked(store, Names(experiment=name))
    assert name not in {e.name for e in backend.client(store).search_experiments()}  # nothing is made
    assert is_taken(lambda: backend.client(store).create_experiment(name, "memory://")) == checked == (0 < len(name) <= 500)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_refused_where_mlflow_refuses_it(store: str, alias: str) -> None:
    client = backend.client(store)
    if not client.search_registered_models("name = 'aliased'"):
        client.create_registered_model("aliased")
        client.create_model_version("aliased", "s3://bucket/model")
    checked = is_checked(store, Names(model="aliased", alias=alias))
    assert is_taken(lambda: client.set_registered_model_alias("aliased", alias, "1")) == checked


@pytest.mark.parametrize("name", ["it's 1.10", 'a"b a%2Fb a@b'])
def test_what_is_not_refused_can_be_registered_and_found(store: str, name: str, tmp_path: Path) -> None:
    """From a local folder, as after the last epoch; MLflow allows the files fewer names than the model."""
    data = load_settings("demo", ["data.train=x", "data.sampling=dense"]).data
    model = build_model("swin_nano", num_classes=2)
    folder = write_model(str(tmp_path), model, classes=["a", "b"], preprocessing=preprocessing_of(data), lineage={})
    run_id = open_run(store, "registering", name).id
    registry = Registry(store)
    made = registry.register(name, folder, tags={}, pyfunc=PYFUNC_CODE, alias="champion", run_id=run_id)
    assert registry.find(f"models:/{name}@champion") == registry.find(made) and registry.find(made).name == name
    with pytest.raises(BadInput, match="has the aliases champion"):
        registry.find(f"models:/{name}@nothing")


def test_a_name_that_a_prompt_has_is_refused(store: str) -> None:
    backend.client(store).register_prompt(name="prompt", template="x")
    with pytest.raises(BadInput, match="'prompt' is that of a prompt in MLflow"):
        check_store(store, Names(model="prompt"))


def delete_experiment(store: str, name: str) -> str:
    """Delete experiment `name`, made if absent; its id."""
    made = backend.client(store).get_experiment_by_name(name)
    identity = made.experiment_id if made else backend.experiment_id(store, name)
    if made is None or made.lifecycle_stage != "deleted":
        backend.client(store).delete_experiment(identity)
    return str(identity)


def test_the_preflight_asks(line: Line, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWIN_HOME", str(line.home))
    sets = ["run.name=bad", *line.sets(), *SMALL, f"tracking.uri={store}"]
    gone = delete_experiment(store, "gone")
    before = {e.name for e in backend.client(store).search_experiments()}
    for setting, message in {
        "tracking.register_as=a/b": "refuses the model name 'a/b'",
        "tracking.register_as= ": "refuses the model name ' '",
        "tracking.experiment=gone": f"'gone' was deleted: restore it with `mlflow experiments restore -x {gone}`",
    }.items():
        with pytest.raises(BadInput, match=message):
            preflight(load_settings("demo", [*sets, setting]))
    settings = load_settings("demo", [*sets, "tracking.experiment=new"])
    preflight(settings)
    assert {e.name for e in backend.client(store).search_experiments()} == before  # nothing is made

    begun = open_run(store, "begun", "bad").id
    record = RunRecord(begun, preflight(settings).train.fingerprint, to_flat(preflight(settings).settings), number=1)
    run_record.write(str(line.home / "runs" / "bad"), record)
    assert preflight(replace(settings, tracking=replace(settings.tracking, experiment="gone"))).resumes == record
    experiment = delete_experiment(store, "begun")
    with pytest.raises(BadInput, match=f"{begun} was deleted.*`mlflow experiments restore -x {experiment}`"):
        preflight(settings)
    backend.client(store).restore_experiment(experiment)
    preflight(settings)


def test_the_comparison_and_the_scores_have_an_experiment(line: Line, store: str) -> None:
    trials = paper.plan(6, ["none"], "x", [*line.sets(), *SMALL, f"tracking.uri={store}", "tracking.experiment=gone"])
    delete_experiment(store, "gone")
    with pytest.raises(BadInput, match="'gone' was deleted"):
        paper.check_tracking(trials)
    experiment = delete_experiment(store, report.EXPERIMENT)
    with pytest.raises(BadInput, match=f"'{report.EXPERIMENT}' was deleted"):
        report.check_tracking(store)
    backend.client(store).restore_experiment(experiment)
    report.check_tracking(store)


def test_the_jobs_refuse_names_in_a_line_and_write_nothing(line: Line, tmp_path: Path) -> None:
    import torch

    line.without_store()
    flat = build_model("swin_nano", num_classes=2, patch_size=(1, 4, 4), window_size=(1, 4, 4))
    torch.save(export_state(flat, "microsoft2d"), tmp_path / "flat.pth")
    inflate = ("inflate", "--recipe", "demo", "--weights", str(tmp_path / "flat.pth"))
    table = ("ablate", "--table", "6", *line.sets(), *SMALL, "training.use_gpu=false")
    train = ("train", "--recipe", "demo", "--dry-run", *line.sets(), *SMALL)
    for job, message in {
        (*inflate, "--register", "a/b"): "MLflow refuses the model name 'a/b'",
        (*inflate, "--register", "a", "--alias", ""): "MLflow refuses the alias ''",
        (*train, "tracking.register_as=a:b"): "MLflow refuses the model name 'a:b'",
        (*table, "tracking.experiment=Default"): "the experiment 'Default' of a store without a server",
    }.items():
        output = line.run(*job, code=2)
        assert output.startswith(f"error: {message}") and output.count("\n") == 1, output
    assert not (line.home / "mlflow").exists()
