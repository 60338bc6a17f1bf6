"""Registered models: two files, their lineage in tags, and a name that people and jobs use.

A model is a folder (or a URL) with ``model.safetensors``, the weights by parameter name, and ``model.json``, what is
needed to build the model and to feed it (written by `vswin_dist.serving.export`). From a local folder the files are
stored as an MLflow pyfunc model that brings its own code, so ``mlflow.pyfunc.load_model("models:/NAME@champion")``
works wherever the packages in its requirements are installed. Files already in object storage are registered where
they are, without a copy; such a version is for this project's jobs alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vswin_dist
from vswin_dist import storage
from vswin_dist.errors import CheckpointError, ConfigError, nearest
from vswin_dist.tracking import backend
from vswin_dist.tracking.provenance import redact

WEIGHTS, CARD = "model.safetensors", "model.json"
MODEL_FILES = (WEIGHTS, CARD)
PYFUNC_FOLDER = "artifacts"  # where MLflow puts the files within a pyfunc model
EXPERIMENT = "vswin-models"  # of models registered without a run
REQUIREMENTS = ("torch", "av", "safetensors", "numpy", "fsspec", "s3fs", "pyyaml", "pandas", "mlflow")
_REFERENCE = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w\-]+)|/(?P<version>\d+))$")
_ALIAS = re.compile(r"^(?![vV]\d+$|latest$)[\w\-]{1,255}$")


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model, as the store has it."""

    name: str
    version: int
    run_id: str | None  # the training (or other run) that made it
    tags: dict[str, str]  # lineage and scores
    aliases: tuple[str, ...]

    @property
    def uri(self) -> str:
        """``models:/NAME/VERSION``, which names the same model for ever."""
        return f"models:/{self.name}/{self.version}"


def register_model(uri: str, name: str, folder_or_url: str, *, alias: str | None = None, tags: Mapping[str, Any],
                   run_id: str | None = None) -> int:
    """Register the model at `folder_or_url` as the next version of `name`, made if absent.

    Args:
        folder_or_url: holds ``model.safetensors`` and ``model.json``. A local folder is copied into the store, a URL
            is registered as it is.
        alias: set to this version, and taken from the one that had it.
        tags: lineage: ``dataset_fingerprint``, ``inflated_from``, ``source_commit``, ``top1`` and so on; those that
            are None are left out. ``training_run`` is added from `run_id`.

    Returns:
        The version's number.

    Raises:
        CheckpointError: a file is absent or ``model.json`` is no JSON. PreflightError: the store cannot be reached.
        ConfigError: MLflow refuses the name or the alias.
    """
    place = storage.absolute(folder_or_url)
    _check_files(place)
    if alias and not _ALIAS.match(alias):
        raise ConfigError(f"MLflow refuses the alias {alias!r}: letters, digits, _ and - are allowed; `latest` and "
                          "forms like `v3` are reserved")
    marks = {k: redact(str(v)) for k, v in tags.items() if v is not None}
    if run_id:
        marks["training_run"] = run_id
    with backend.reachable(uri):
        client = backend.client(uri)
        try:
            client.create_registered_model(name)
        except Exception as error:
            if backend.error_code(error) == "INVALID_PARAMETER_VALUE":
                raise ConfigError(f"MLflow refuses the model name {name!r}: {error}") from error
            if backend.error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        if storage.is_local(place):
            model = _store_files(uri, name, Path(place), run_id)
            # A server checks the source against the model; a database would look the model up in the global store.
            model_id = None if backend.is_database(uri) else model.model_id
            version = client.create_model_version(name, model.artifact_location, run_id=run_id, tags=marks,
                                                  model_id=model_id)
            link = json.dumps([{"name": name, "version": str(version.version)}])
            client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link, **marks})
        else:
            version = client.create_model_version(name, place, run_id=run_id, tags=marks)
        number = int(version.version)
        if alias:
            set_alias(uri, name, alias, number)
    return number


def set_alias(uri: str, name: str, alias: str, version: int) -> None:
    """Let ``models:/NAME@ALIAS`` mean `version`.

    Raises:
        ConfigError: MLflow refuses the alias (``v3`` and ``latest`` are reserved), or the version is absent.
    """
    with backend.reachable(uri):
        try:
            backend.client(uri).set_registered_model_alias(name, alias, str(version))
        except Exception as error:
            if not backend.is_final(error):
                raise
            raise ConfigError(f"cannot set alias {alias!r} on models:/{name}/{version}: {error}") from error


def is_reference(model: str) -> bool:
    """True for ``models:/...``: a registered model rather than a file."""
    return model.startswith("models:/")


def find_version(uri: str, reference: str) -> ModelVersion:
    """The version that ``models:/NAME@ALIAS`` or ``models:/NAME/3`` means now.

    Raises:
        CheckpointError: the name, alias or version does not exist; says what does. ConfigError: not such a reference.
    """
    return _model_version(uri, _lookup(uri, reference))


def resolve_model(uri: str, reference: str) -> tuple[str, ModelVersion]:
    """Where the files of a registered model are, and what the store says of it.

    Returns:
        A local folder or a URL that holds ``model.safetensors`` and ``model.json``. What only MLflow's server can
        reach is downloaded once, into ``models/`` of the data root.

    Raises:
        CheckpointError: no such model, alias or version; or its files are not there, or not those of this project.
    """
    found = _lookup(uri, reference)
    version = _model_version(uri, found)
    with backend.reachable(uri):
        location = str(backend.client(uri).get_model_version_download_uri(version.name, str(version.version)))
        if location.startswith(("mlflow-artifacts:", "http:", "https:", "runs:")):
            return _download(uri, location, version, str(found.creation_timestamp)), version
    for place in (storage.join(location, PYFUNC_FOLDER), location):
        if storage.exists(storage.join(place, CARD)):
            return storage.absolute(place), version
    raise CheckpointError(f"{reference} is version {version.version}, whose files should be at {location}: there is no "
                          f"{CARD}. They were moved, are on another machine, or are of another project.")


def _check_files(place: str) -> None:
    for name in MODEL_FILES:
        if not storage.exists(storage.join(place, name)):
            raise CheckpointError(f"{place} is no model folder: {name} is absent")
    try:
        json.loads(storage.read_bytes(storage.join(place, CARD)))
    except ValueError as error:
        raise CheckpointError(f"{storage.join(place, CARD)} is no JSON: {error}") from error


def _store_files(uri: str, name: str, folder: Path, run_id: str | None) -> Any:
    """Copy the files into the store as a pyfunc model; returns MLflow's logged model."""
    package = Path(vswin_dist.__file__).parent
    if run_id:
        experiment = str(backend.client(uri).get_run(run_id).info.experiment_id)
    else:
        experiment = backend.experiment_id(uri, EXPERIMENT)
    with tempfile.TemporaryDirectory(prefix="vswin-register-") as temporary:
        return backend.log_pyfunc(
            uri, experiment=experiment, name=name, run_id=run_id, package=package, workdir=Path(temporary),
            code=package / "serving" / "pyfunc_model.py",  # run by MLflow, never imported from here
            artifacts={"weights": str(folder / WEIGHTS), "card": str(folder / CARD)}, requirements=_requirements())


def _requirements() -> list[str]:
    """The packages that prediction needs, at the versions installed here (without a build's ``+cpu``)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def _lookup(uri: str, reference: str) -> Any:
    match = _REFERENCE.match(reference)
    if not match:
        raise ConfigError(f"{reference!r} names no registered model: write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match["name"], match["alias"], match["version"]
    with backend.reachable(uri):
        client = backend.client(uri)
        try:
            return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        except Exception as error:
            if not backend.is_final(error):
                raise
            raise CheckpointError(f"{reference} does not exist in {backend.safe_uri(uri)}: "
                                  f"{_what_exists(client, name, alias)}") from error


def _what_exists(client: Any, name: str, alias: str | None) -> str:
    names = sorted(m.name for m in client.search_registered_models(max_results=1000))
    if name not in names:
        known = f"registered are {', '.join(names[:20])}" if names else "no model is registered there"
        return f"{known}.{nearest(name, names)}"
    aliases = {k: int(v) for k, v in client.get_registered_model(name).aliases.items()}
    versions = sorted(int(v.version) for v in client.search_model_versions(f"name = '{name}'"))
    given = ", ".join(f"{k} (version {v})" for k, v in sorted(aliases.items())) or "none"
    held = f"{versions[0]} to {versions[-1]}" if versions else "none"
    return f"{name} has the aliases {given} and the versions {held}.{nearest(alias, aliases) if alias else ''}"


def _model_version(uri: str, found: Any) -> ModelVersion:
    with backend.reachable(uri):
        aliases = backend.client(uri).get_registered_model(found.name).aliases
    mine = tuple(sorted(k for k, v in aliases.items() if int(v) == int(found.version)))
    return ModelVersion(name=str(found.name), version=int(found.version), run_id=found.run_id or None,
                        tags={str(k): str(v) for k, v in found.tags.items()}, aliases=mine)


def _download(uri: str, location: str, version: ModelVersion, created: str) -> str:
    """Fetch the two files through the server, once; a part of a download is never taken for the whole."""
    identity = hashlib.sha256("\n".join((backend.safe_uri(uri), location, created)).encode()).hexdigest()[:16]
    target = storage.home() / "models" / f"{version.name}-{version.version}-{identity}"
    if all((target / name).exists() for name in MODEL_FILES):
        return str(target)
    source = next((p for p in (f"{location}/{PYFUNC_FOLDER}", location)
                   if backend.artifact_exists(uri, f"{p}/{CARD}")), None)
    if source is None:
        raise CheckpointError(f"{version.uri} holds no {CARD} at {location}: it is no model of this project")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as temporary:
        for name in MODEL_FILES:
            fetched = backend.download(uri, f"{source}/{name}", Path(temporary))
            os.replace(fetched, target / name)
    return str(target)
