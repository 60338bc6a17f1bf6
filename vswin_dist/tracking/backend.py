"""The only module that imports MLflow, at first use: the rest of the package speaks to it through here.

A store is named by its tracking URI alone; MLflow's global state (``set_tracking_uri``, the active run) is never
touched, so that several stores can be used in one process and a user's own MLflow code beside this is undisturbed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vswin_dist import storage
from vswin_dist.errors import ConfigError, PreflightError

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
FINAL_CODES = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED",
               "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "BAD_REQUEST", "NOT_FOUND"}
_transfers = threading.Lock()


@functools.cache
def mlflow() -> Any:
    """The mlflow package, imported at first use."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow as package
    import mlflow.artifacts
    import mlflow.pyfunc
    return package


def is_database(uri: str) -> bool:
    """True for a database that is used directly, without a server."""
    return uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def artifact_folder(uri: str) -> Path | None:
    """Where a store used without a server keeps its files; None for a server, which knows its own place.

    Beside a sqlite database; in the data root for another one. MLflow's default would be the current folder.
    """
    if uri.startswith(SQLITE):
        return Path(uri.removeprefix(SQLITE).split("?")[0]).absolute().parent / "artifacts"
    return storage.home() / "mlflow" / "artifacts" if is_database(uri) else None


@functools.cache
def client(uri: str) -> Any:
    """An MlflowClient of the store at `uri`; a sqlite database and its folder are made if absent."""
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
    """MLflow's code of `error`, ``""`` where it has none."""
    return str(getattr(error, "error_code", ""))


def is_final(error: BaseException) -> bool:
    """True where the same request would be refused again."""
    return error_code(error) in FINAL_CODES


def reason(error: BaseException) -> str:
    """Why a request failed, in a few words where it is a common case: HTTP libraries say it in a paragraph."""
    text = str(error)
    for sign, words in {"Connection refused": "connection refused", "Name or service not known": "unknown host",
                        "timed out": "no answer in time", "database is locked": "the database is locked"}.items():
        if sign in text:
            return words
    if origin := getattr(error, "orig", None):  # SQLAlchemy adds its statement to the driver's message
        text = str(origin)
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def reachable(uri: str) -> Iterator[None]:
    """Turn a failure to speak with the store into an error for users.

    Raises:
        PreflightError: the store cannot be reached or used; MLflow's own refusals pass through.
    """
    try:
        yield
    except Exception as error:
        module = type(error).__module__.partition(".")[0]
        away = module in ("mlflow", "sqlalchemy", "requests", "urllib3") and not is_final(error)
        if not away and not isinstance(error, ImportError):  # a database's driver that is not installed
            raise
        raise PreflightError(f"cannot use MLflow at {safe_uri(uri)}: {reason(error)}. Check that the server "
                             "runs and that tracking.uri or MLFLOW_TRACKING_URI names it.") from error


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


def experiment_id(uri: str, name: str) -> str:
    """The id of experiment `name`, made if absent; see `artifact_folder` for where its files go.

    Raises:
        ConfigError: the experiment was deleted, or is the Default of a store without a server.
    """
    folder = artifact_folder(uri)
    if folder and name == "Default":
        raise ConfigError("the experiment 'Default' of a store without a server keeps its files in the current folder: "
                          "choose another name in tracking.experiment")
    location = str(folder) if folder else None
    found = client(uri).get_experiment_by_name(name)
    if found is None:
        try:
            return str(client(uri).create_experiment(name, artifact_location=location))
        except Exception as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client(uri).get_experiment_by_name(name)  # another process was faster
    if found.lifecycle_stage == "deleted":
        raise ConfigError(f"the MLflow experiment {name!r} was deleted: restore it with `mlflow experiments restore "
                          f"-x {found.experiment_id}`, or choose another name in tracking.experiment")
    return str(found.experiment_id)


def metric(key: str, value: float, time_ms: int, step: int) -> Any:
    """A metric entity; sent twice with one time it stays one row of the store."""
    return mlflow().entities.Metric(key, value, time_ms, step)


def log_dataset(uri: str, run_id: str, name: str, digest: str, url: str, context: str,
                profile: Mapping[str, Any]) -> None:
    """Name a dataset as an input of the run; `context` is ``training`` or ``validation``."""
    entities = mlflow().entities
    scheme = url.partition("://")[0] if "://" in url else "local"
    data = entities.Dataset(name=name, digest=digest, source_type=scheme, source=json.dumps({"uri": url}),
                            profile=json.dumps(dict(profile)))
    tag = entities.InputTag(key="mlflow.data.context", value=context)
    client(uri).log_inputs(run_id, datasets=[entities.DatasetInput(dataset=data, tags=[tag])])


def set_values(uri: str, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Write params and tags; MLflow's client cuts them into requests of the size that it allows."""
    entities = mlflow().entities
    client(uri).log_batch(run_id, params=[entities.Param(k, v) for k, v in params.items()],
                          tags=[entities.RunTag(k, v) for k, v in tags.items()])


def log_pyfunc(uri: str, *, experiment: str, name: str, run_id: str | None, code: Path, package: Path,
               artifacts: Mapping[str, str], requirements: Sequence[str], workdir: Path) -> Any:
    """Store a models-from-code pyfunc model: a DataFrame with a column `video` of paths gives the top five classes.

    Args:
        code: the file that MLflow runs to get the model. package: the package that it imports, shipped with it.
        artifacts: name -> local file, copied into the model's ``artifacts`` folder.

    Returns:
        MLflow's logged model, with `model_id` and `artifact_location`.
    """
    import pandas

    pyfunc, types = mlflow().pyfunc, mlflow().types
    text, number = types.DataType.string, types.DataType.double
    array, column = types.schema.Array, types.ColSpec
    signature = mlflow().models.ModelSignature(
        inputs=types.Schema([column(text, "video")]),
        outputs=types.Schema([column(text, "video"), column(text, "class"), column(number, "probability"),
                              column(array(text), "top5_classes"), column(array(number), "top5_probabilities")]))
    store = client(uri)
    model = store.create_logged_model(experiment, name=name, source_run_id=run_id, model_type="video-classification")
    target = workdir / "model"
    try:
        description = mlflow().models.Model(artifact_path=model.artifact_location, run_id=run_id,
                                            model_id=model.model_id, model_uuid=model.model_id)
        example = pandas.DataFrame({"video": ["/path/of/a/video.mp4"]})  # the form; MLflow does not run it
        pyfunc.save_model(path=str(target), python_model=str(code), artifacts=dict(artifacts), signature=signature,
                          input_example=example, code_paths=[str(package)], pip_requirements=list(requirements),
                          mlflow_model=description)
        with long_requests():
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
        return Path(mlflow().artifacts.download_artifacts(
            artifact_uri=artifact_uri, dst_path=str(folder), tracking_uri=uri))


def artifact_exists(uri: str, artifact_uri: str) -> bool:
    """True where the store of `uri` holds the file `artifact_uri`."""
    folder, _, name = artifact_uri.rpartition("/")
    found = mlflow().artifacts.list_artifacts(artifact_uri=folder, tracking_uri=uri)
    return any(f.path.rpartition("/")[2] == name for f in found)
