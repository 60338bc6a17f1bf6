"""The only module that imports MLflow, at first use: the rest of the package speaks to it through here.

A store is named by its tracking URI alone; MLflow's global state (`set_tracking_uri`, the active run) is never
touched, so that several stores can be used in one process and a user's own MLflow code beside this is undisturbed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vswin_dist import local_files
from vswin_dist.errors import ConfigError, TrackingError
from vswin_dist.tracking.names import Names, of_files

SQLITE = "sqlite:///"
# A server that is away is noticed within seconds, not MLflow's minutes; a variable set by the user wins.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training node sends nothing to third parties
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a bar for each small file, in a job's log
}
TRANSFER_TIMEOUT_S = 1800  # a proxying server answers an upload only when it has stored the whole file
# Errors that no other attempt mends.
FINAL_CODES = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "CUSTOMER_UNAUTHORIZED",
    "BAD_REQUEST",
    "NOT_FOUND",
}
REFUSES_FILES = ("too many 500 error responses", "Connection aborted")  # the second where it did not even read the file
DENIED_CODES = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
# What says that an experiment is one of trainings, and not of language models. The pages of 3.17 go by a choice of the
# reader's first, which the note tells of.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
NOTE_TAG, NOTE = "mlflow.note.content", "Of vswin_dist. *Model training*, at the top left, shows its runs and models."
PARENT_TAG = "mlflow.parentRunId"  # by which MLflow shows a run below another
MAX_DESCRIPTION = 5000  # characters of the column in MLflow's databases
_transfers = threading.Lock()


@functools.cache
def mlflow() -> Any:
    """Return the mlflow package, imported at first use."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow as package
    import mlflow.artifacts
    import mlflow.pyfunc

    return package


def system_monitors() -> list[Any]:
    """Return MLflow's monitors of this machine, as far as what they need is there: psutil, and NVML for a GPU."""
    mlflow()
    try:
        from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor
    except ImportError:
        return []
    found = [cpu_monitor.CPUMonitor(), disk_monitor.DiskMonitor(), network_monitor.NetworkMonitor()]
    with contextlib.suppress(Exception):  # its own words for a missing library or device
        found.append(gpu_monitor.GPUMonitor())
    return found


def is_database(uri: str) -> bool:
    """Return True for a database that is used directly, without a server."""
    return uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def artifact_folder(uri: str) -> Path | None:
    """Where a store used without a server keeps its files; None for a server, which knows its own place.

    Beside a sqlite database; in the data root for another one. MLflow's default would be the current folder.
    """
    if uri.startswith(SQLITE):
        return Path(uri.removeprefix(SQLITE).split("?")[0]).absolute().parent / "artifacts"
    return local_files.home() / "mlflow" / "artifacts" if is_database(uri) else None


@functools.cache
def client(uri: str) -> Any:
    """Return an MlflowClient of the store at `uri`; a sqlite database and its folder are made if absent."""
    package = mlflow()
    if folder := artifact_folder(uri):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if is_database(uri):
        import sqlalchemy  # MLflow's own; it tries an unusable database for minutes, so one try is made first

        engine = sqlalchemy.create_engine(uri)
        engine.connect().close()
        engine.dispose()
    return package.MlflowClient(tracking_uri=uri, registry_uri=uri)


def error_code(error: BaseException) -> str:
    """MLflow's code of `error`, `""` where it has none."""
    return str(getattr(error, "error_code", ""))


def is_final(error: BaseException) -> bool:
    """Return True where the same request would be refused again."""
    return error_code(error) in FINAL_CODES


def is_denied(error: BaseException) -> bool:
    """Return True where the account has no right to what was asked for."""
    return error_code(error) in DENIED_CODES


def reason(error: BaseException) -> str:
    """Why a request failed, in a few words where it is a common case: HTTP libraries say it in a paragraph."""
    text = str(error)
    for sign, words in {
        "Connection refused": "connection refused",
        "Name or service not known": "unknown host",
        "timed out": "no answer in time",
        "database is locked": "the database is locked",
        "Permission denied'": "permission denied",
        "too many 500 error responses": "its server answers HTTP 500",
        "Connection aborted": "its server broke the connection off",
    }.items():
        if sign in text:
            return words
    if origin := getattr(error, "orig", None):  # SQLAlchemy adds its statement to the driver's message
        text = str(origin)
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def reachable(uri: str) -> Iterator[None]:
    """Turn a failure to speak with the store into an error for users.

    Raises:
        TrackingError: the store is away, cannot be used or refuses.
    """
    try:
        yield
    except Exception as error:
        if is_denied(error):
            raise TrackingError(
                f"MLflow at {safe_uri(uri)} refuses this to the account of MLFLOW_TRACKING_USERNAME: {reason(error)}. "
                "Ask its administrator for the right, or set another account with its MLFLOW_TRACKING_PASSWORD.",
                retriable=False,
            ) from error
        if is_final(error):
            raise TrackingError(f"MLflow at {safe_uri(uri)} refuses: {reason(error)}", retriable=False) from error
        module = type(error).__module__.partition(".")[0]
        away = module in ("mlflow", "sqlalchemy", "requests", "urllib3")
        if not away and not isinstance(error, ImportError):  # a database's driver that is not installed
            raise
        raise TrackingError(
            f"cannot use MLflow at {safe_uri(uri)}: {reason(error)}. Check that the server "
            "runs and that tracking.uri or MLFLOW_TRACKING_URI names it."
        ) from error


@contextlib.contextmanager
def stores_files(uri: str) -> Iterator[None]:
    """As `reachable`, for files, which have a store of their own: its failure is not taken for the server's.

    Raises:
        TrackingError: it does not take them, or as `reachable`.
    """
    with reachable(uri):
        try:
            yield
        except Exception as error:
            own = type(error).__module__.partition(".")[0] in ("boto3", "botocore", "s3transfer")
            disk = isinstance(error, OSError) and type(error).__module__ == "builtins"  # of requests are OSErrors, too
            if not own and not disk and not any(sign in str(error) for sign in REFUSES_FILES):
                raise
            raise TrackingError(
                f"MLflow at {safe_uri(uri)} does not take files: {reason(error)}. Check that what it keeps its artifacts "
                "in is there, has room and may be written."
            ) from error


def safe_uri(uri: str) -> str:
    """`uri` without user, password and query."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.split('?')[0]}"


@contextlib.contextmanager
def long_requests() -> Iterator[None]:
    """Give uploads and downloads of whole models the time that they take, unless the user set a timeout.

    MLflow reads the timeout from the environment at each request, so it is changed for the whole process meanwhile.
    """
    name, usual = "MLFLOW_HTTP_REQUEST_TIMEOUT", DEFAULTS["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    mlflow()
    with _transfers:
        mine = os.environ.get(name) == usual
        if mine:
            os.environ[name] = str(TRANSFER_TIMEOUT_S)
        try:
            yield
        finally:
            if mine:
                os.environ[name] = usual


def check_names(uri: str, names: Names) -> None:
    """Refuse names that cannot be used in a store of this kind, without asking it.

    Raises:
        ConfigError: MLflow refuses one, or the experiment is the Default of a store without a server.
    """
    names.check()
    if artifact_folder(uri) and names.experiment == "Default":
        raise ConfigError(
            "the experiment 'Default' of a store without a server keeps its files in the current folder: "
            "choose another name in tracking.experiment"
        )


def experiment_id(uri: str, name: str) -> str:
    """Return the id of experiment `name`, made if absent; see `artifact_folder` for where its files go.

    One that does not say of what kind it is, or for which MLflow has guessed it, is marked as one of trainings.

    Raises:
        ConfigError: as `find_experiment`.
    """
    found = find_experiment(uri, name)
    if found is None:
        folder = artifact_folder(uri)
        place = str(folder) if folder else None
        try:
            return str(client(uri).create_experiment(name, artifact_location=place, tags={KIND_TAG: KIND, NOTE_TAG: NOTE}))
        except Exception as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            found = find_experiment(uri, name)  # another process was faster
    known = client(uri).get_experiment(found).tags.get(KIND_TAG, "")
    if not known or "inferred" in known:
        with contextlib.suppress(Exception):  # who may log runs and write no tags sees the other view
            client(uri).set_experiment_tag(found, KIND_TAG, KIND)
    return str(found)


def check_right(uri: str, experiment: str) -> None:
    """Refuse an account that may read the experiment of this id and log nothing in it: what it says is said again.

    Raises:
        MlflowException: one that `is_denied`.
    """
    kind = client(uri).get_experiment(experiment).tags.get(KIND_TAG, KIND)
    try:
        client(uri).set_experiment_tag(experiment, KIND_TAG, kind)
    except Exception as error:
        if is_denied(error):
            raise


def find_experiment(uri: str, name: str) -> str | None:
    """Return the id of experiment `name`, None where there is none yet.

    Raises:
        ConfigError: the experiment was deleted, or as `check_names`.
    """
    check_names(uri, Names(experiment=name))
    found = client(uri).get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"the MLflow experiment {name!r} was deleted: restore it with `mlflow experiments restore "
            f"-x {found.experiment_id}`, or choose another name in tracking.experiment"
        )
    return str(found.experiment_id)


def check_model(uri: str, name: str) -> None:
    """Refuse the name of a registered model that the store would refuse; it may be absent.

    Raises:
        ConfigError: it is taken by a prompt, or as `check_names`.
    """
    check_names(uri, Names(model=name))
    try:
        client(uri).get_registered_model(name)
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        if client(uri).get_prompt(name):
            raise ConfigError(
                f"the model name {name!r} is that of a prompt in MLflow at {safe_uri(uri)}: "
                "choose another in tracking.register_as or --register"
            ) from error


def model_versions(uri: str, name: str) -> list[Any]:
    """Return the versions of the registered model `name`, none where there is no such model."""
    quote = '"' if "'" in name else "'"
    return list(client(uri).search_model_versions(f"name = {quote}{name}{quote}"))


def search_runs(uri: str, experiment: str, tags: Mapping[str, str], finished: bool = True) -> list[Any]:
    """Return the runs of `experiment` that have `tags`, the newest first; none where it is absent.

    Args:
        finished: those alone that ended well.
    """
    found = client(uri).get_experiment_by_name(experiment)
    if found is None:
        return []
    quoted = {k: f'"{v}"' if "'" in v else f"'{v}'" for k, v in tags.items()}
    conditions = ["attributes.status = 'FINISHED'"] * finished
    wanted = " and ".join([*conditions, *(f"tags.`{k}` = {v}" for k, v in quoted.items())])
    return list(client(uri).search_runs([found.experiment_id], wanted, order_by=["attributes.start_time DESC"]))


def history(uri: str, run_id: str, key: str) -> list[Any]:
    """Return all values of a metric, in the order of their steps."""
    return sorted(client(uri).get_metric_history(run_id, key), key=lambda m: (m.step, m.timestamp))


def metric(key: str, value: float, time_ms: int, step: int) -> Any:
    """Return a metric entity; sent twice with one time it stays one row of the store."""
    return mlflow().entities.Metric(key, value, time_ms, step)


def log_dataset(uri: str, run_id: str, name: str, digest: str, url: str, context: str, profile: Mapping[str, Any]) -> None:
    """Name a dataset as an input of the run; `context` is `training` or `validation`."""
    entities = mlflow().entities
    scheme = url.partition("://")[0] if "://" in url else "local"
    data = entities.Dataset(
        name=name, digest=digest, source_type=scheme, source=json.dumps({"uri": url}), profile=json.dumps(dict(profile))
    )
    tag = entities.InputTag(key="mlflow.data.context", value=context)
    client(uri).log_inputs(run_id, datasets=[entities.DatasetInput(dataset=data, tags=[tag])])


def measure(uri: str, run_id: str, model_id: str, step: int, names: Iterable[str], dataset: tuple[str, str] | None) -> None:
    """Say of metrics that `run_id` has at `step` which logged model and which dataset (name, digest) they are of.

    They keep their times, by which the store knows that the run has them already.
    """
    name, digest = dataset or (None, None)
    found = [m for key in names for m in history(uri, run_id, key) if m.step == step]
    entity = mlflow().entities.Metric
    client(uri).log_batch(
        run_id,
        metrics=[
            entity(m.key, m.value, m.timestamp, step, model_id=model_id, dataset_name=name, dataset_digest=digest)
            for m in found
        ],
    )


def log_model_input(uri: str, run_id: str, model_id: str) -> None:
    """Name a logged model as an input of the run."""
    client(uri).log_inputs(run_id, models=[mlflow().entities.LoggedModelInput(model_id)])


def set_values(uri: str, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Write params and tags; MLflow's client cuts them into requests of the size that it allows."""
    entities = mlflow().entities
    client(uri).log_batch(
        run_id,
        params=[entities.Param(k, v) for k, v in params.items()],
        tags=[entities.RunTag(k, v) for k, v in tags.items()],
    )


@dataclass(frozen=True)
class PyfuncFiles:
    """What a models-from-code pyfunc model is made of."""

    code: Path  # the file that MLflow runs to get the model
    package: Path  # which it imports, shipped with it
    artifacts: Mapping[str, str]  # name -> local file, copied into the model's `artifacts` folder
    requirements: Sequence[str]
    config: Mapping[str, str]  # what the code is told when it is loaded, unless who loads it says otherwise


def log_pyfunc(uri: str, files: PyfuncFiles, *, experiment: str, name: str, run_id: str | None, workdir: Path) -> Any:
    """Store a pyfunc model: a DataFrame with a column `video` of paths, URLs or base64 gives the top five classes.

    Returns:
        MLflow's logged model, with `model_id` and `artifact_location`.
    """
    import pandas

    pyfunc, types = mlflow().pyfunc, mlflow().types
    text, number = types.DataType.string, types.DataType.double
    array, column = types.schema.Array, types.ColSpec
    signature = mlflow().models.ModelSignature(
        inputs=types.Schema([column(text, "video")]),
        outputs=types.Schema(
            [
                column(text, "video"),
                column(text, "class"),
                column(number, "probability"),
                column(array(text), "top5_classes"),
                column(array(number), "top5_probabilities"),
                column(text, "error", required=False),
            ]
        ),
    )
    store = client(uri)
    model = store.create_logged_model(
        experiment, name=of_files(name), source_run_id=run_id, model_type="video-classification"
    )
    target = workdir / "model"
    try:
        description = mlflow().models.Model(
            artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id, model_uuid=model.model_id
        )
        example = pandas.DataFrame({"video": ["/path/of/a/video.mp4"]})  # the form; MLflow does not run it
        pyfunc.save_model(
            path=str(target),
            python_model=str(files.code),
            artifacts=dict(files.artifacts),
            model_config=dict(files.config),
            signature=signature,
            input_example=example,
            code_paths=[str(files.package)],
            pip_requirements=list(files.requirements),
            mlflow_model=description,
        )
        with long_requests(), stores_files(uri):
            store.log_model_artifacts(model.model_id, str(target))
        store.finalize_logged_model(model.model_id, "READY")
    except BaseException:
        with contextlib.suppress(Exception):
            store.finalize_logged_model(model.model_id, "FAILED")
        raise
    if run_id:
        store.log_outputs(run_id, [mlflow().entities.LoggedModelOutput(model.model_id, step=0)])
    return model


def download(uri: str, artifact_uri: str, folder: Path) -> Path:
    """Fetch one file of a proxying server's store into `folder`."""
    with long_requests():
        return Path(mlflow().artifacts.download_artifacts(artifact_uri=artifact_uri, dst_path=str(folder), tracking_uri=uri))


def artifact_exists(uri: str, artifact_uri: str) -> bool:
    """Return True where the store of `uri` holds the file `artifact_uri`."""
    folder, _, name = artifact_uri.rpartition("/")
    found = mlflow().artifacts.list_artifacts(artifact_uri=folder, tracking_uri=uri)
    return any(f.path.rpartition("/")[2] == name for f in found)
