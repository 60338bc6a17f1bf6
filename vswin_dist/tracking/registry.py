"""Registered models: two files, their lineage in tags, and a name that people and jobs use.

A model is a folder (or a URL) with `model.safetensors`, the weights by parameter name, and `model.json`, what is
needed to build the model and to feed it (written by `vswin_dist.models.weights.portable`). From a local folder the files are
stored as an MLflow pyfunc model that brings its own code, so `mlflow.pyfunc.load_model("models:/NAME@champion")`
works wherever the packages in its requirements are installed. Files already in object storage stay where they are: such a
version holds the code alone, and knows in which folder its weights and its card are, to whoever loads it too.

Aliases say what a version is for: `inflated` is the newest that was made of 2D weights, `candidate` the newest that a
training made, and `champion` the one to use: the first of a name, until a candidate has been better
(`vswin_dist/evaluation/promotion.py`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import vswin_dist
from vswin_dist import local_files, storage
from vswin_dist.errors import CheckpointError, ConfigError, nearest
from vswin_dist.lease import UNFENCED, Fence
from vswin_dist.model_card import CARD, MODEL_FILES, WEIGHTS
from vswin_dist.tracking import backend
from vswin_dist.tracking.code import copy_needed
from vswin_dist.tracking.names import Names, of_files
from vswin_dist.tracking.provenance import redact
from vswin_dist.tracking.run import RunReference, attach, check_store, kind, open_run

PYFUNC_FOLDER = "artifacts"  # where MLflow puts the files within a pyfunc model
EXPERIMENT = "vswin-models"  # of models registered without a run
CHAMPION, CANDIDATE, INFLATED = "champion", "candidate", "inflated"  # aliases
WEIGHTS_AT = "weights_at"  # the tag, and the setting of the pyfunc model, that name the URL of files that were not copied
MODEL_TAG = "vswin.logged_model"  # of a version: the id of its logged model, which the Models page of the experiment shows
EXPORT_TAG = "export."  # how the tags of a version begin that say where it lies in another form
REQUIREMENTS = ("torch", "av", "safetensors", "numpy", "fsspec", "s3fs", "pyyaml", "pandas", "mlflow")
_REFERENCE = re.compile(r"^models:/(?P<name>[^/]+)(?:@(?P<alias>[\w\-]+)|/(?P<version>\d+))$")


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model, as the store has it."""

    name: str
    version: int
    run_id: str | None  # the training (or other run) that made it
    tags: dict[str, str]  # lineage and scores
    aliases: tuple[str, ...]
    description: str = ""  # Markdown
    model_id: str | None = None  # of its logged model; None of one that an earlier version registered

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`, which names the same model for ever."""
        return f"models:/{self.name}/{self.version}"

    @property
    def is_trained(self) -> bool:
        """False for 2D weights that were inflated, which a training starts from."""
        return "inflated_from" not in self.tags or "training_run" in self.tags


@dataclass(frozen=True)
class Measured:
    """Metrics that a run has at `step`, and the dataset that they were measured on."""

    step: int
    names: Sequence[str]
    dataset: str
    fingerprint: str


class Registry:
    """The registered models of the store at `uri`. Not every store has any, as `none`: see `register`.

    Args:
        fence: who is fenced out registers nothing and moves no alias.
    """

    def __init__(self, uri: str, fence: Fence = UNFENCED) -> None:
        self.uri, self.fence = uri, fence

    def register(
        self,
        name: str,
        folder_or_url: str,
        *,
        tags: Mapping[str, Any],
        pyfunc: Path,
        alias: str | None = None,
        run_id: str | None = None,
        description: str = "",
        measured: Measured | None = None,
    ) -> str:
        """Register the model at `folder_or_url` as the next version of `name`, made if absent.

        Where no version of that name that was trained is champion, this one is: see `crown_first`.

        Args:
            folder_or_url: holds `model.safetensors` and `model.json`. The files of a local folder are copied into the
                store; those at a URL stay there.
            tags: lineage: `dataset_fingerprint`, `inflated_from`, `source_commit`, `top1` and so on; those that
                are None are left out. `training_run` is added from `run_id`.
            pyfunc: the file that MLflow runs to load the model.
            alias: set to this version, and taken from the one that had it.
            description: what people read of it, as Markdown.
            measured: the scores of it that `run_id` has: see `measure`.

        Returns:
            The reference by which jobs find the model: `models:/NAME/VERSION`; its folder or URL where there is no
            registry.

        Raises:
            CheckpointError: a file is absent or `model.json` is not JSON.
            TrackingError: the store is away.
            ConfigError: MLflow refuses the name or the alias.
            FencedOut: another process has taken over.
        """
        place = storage.absolute(folder_or_url)
        _check_files(place)
        if not kind(self.uri).registers:
            return place
        backend.check_names(self.uri, Names(model=name, alias=alias))
        marks = {k: redact(str(v)) for k, v in tags.items() if v is not None}
        if run_id:
            marks["training_run"] = run_id
        if not storage.is_local(place):
            marks[WEIGHTS_AT] = redact(place)
        with backend.reachable(self.uri):
            self._make_name(name)
            model = self._log(name, place, pyfunc, run_id)
            marks[MODEL_TAG] = model.model_id
            number = self._add(name, model, run_id=run_id, tags=marks, description=description)
        if measured and run_id:
            self.measure(self.find(f"models:/{name}/{number}"), run_id, measured)
        if alias is not None:
            self.set_alias(name, alias, number)
        self.crown_first(name, number)
        return f"models:/{name}/{number}"

    def register_once(self, name: str, folder_or_url: str, *, tags: Mapping[str, Any], since_ms: int, **how: Any) -> str:
        """Register as `register` does what may have been registered before: by a request whose answer was lost.

        The version that a run has made of the same checkpoint is known by its tag `checkpoint`. An alias stays with a
        version that was made after `since_ms`, when this one was to be registered.

        Raises:
            As `register`.
        """
        run_id, alias, reference = how.get("run_id"), how.pop("alias", None), ""
        measured = Measured(**found) if (found := how.pop("measured", None)) else None
        with backend.reachable(self.uri):
            versions = backend.model_versions(self.uri, name)
        for version in versions:
            if version.run_id == run_id and version.tags.get("checkpoint") == redact(str(tags["checkpoint"])):
                reference = f"models:/{name}/{version.version}"
        reference = reference or self.register(name, folder_or_url, tags=tags, **how)
        if measured and run_id:
            self.measure(self.find(reference), run_id, measured)
        number = int(reference.rpartition("/")[2])
        later = [v for v in versions if int(v.creation_timestamp) > since_ms and int(v.version) != number]
        if alias and not any(alias in self.find(f"models:/{name}/{v.version}").aliases for v in later):
            self.set_alias(name, alias, number)
        self.crown_first(name, number)
        return reference

    def crown_first(self, name: str, version: int) -> None:
        """Let `champion` mean `version` where nobody has it, or weights that were inflated and not trained.

        Raises:
            As `set_alias`.
        """
        holder = self.aliases(name).get(CHAMPION)
        if holder is None:
            self.set_alias(name, CHAMPION, version)
        elif holder != version and not (known := self.find(f"models:/{name}/{holder}")).is_trained:
            self.crown(self.find(f"models:/{name}/{version}"), known, "the weights before any training are replaced", {})

    def crown(self, new: ModelVersion, old: ModelVersion | None, why: str, more: Mapping[str, str]) -> None:
        """Let `champion` mean `new` instead of `old`, and write on both of them, in tags, what happened, when and why.

        The alias moves last: where this is cut off, the same call completes it.

        Args:
            more: further tags of both.

        Raises:
            As `set_alias`.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        over = {"promoted_over": old.uri} if old else {}
        self.tag(new, {"promoted_at": now, "promoted_because": why, **over, **more})
        if old:
            self.tag(old, {"replaced_at": now, "replaced_because": why, "replaced_by": new.uri, **more})
        self.set_alias(new.name, CHAMPION, new.version)

    def measure(self, version: ModelVersion, run_id: str, measured: Measured) -> None:
        """Link scores to the logged model of `version` and to their dataset: MLflow's page of models ranks these by them.

        Raises:
            TrackingError: the store is away or refuses.
        """
        if version.model_id:
            dataset = (measured.dataset, measured.fingerprint)
            with backend.reachable(self.uri):
                backend.measure(self.uri, run_id, version.model_id, measured.step, measured.names, dataset)
                if run_id != version.run_id:  # which has it as an output
                    backend.log_model_input(self.uri, run_id, version.model_id)

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version.

        Raises:
            TrackingError: the store is away or refuses. FencedOut: another process has taken over.
        """
        self.fence.check()
        with backend.reachable(self.uri):
            for key, value in tags.items():
                backend.client(self.uri).set_model_version_tag(version.name, str(version.version), key, redact(value))

    def check_right(self, version: ModelVersion) -> None:
        """Refuse an account that may read `version` and change nothing of it: what it says is said again.

        Raises:
            TrackingError: the store is away or refuses.
        """
        self.tag(version, {MODEL_TAG: version.model_id} if version.model_id else {})

    def describe(self, version: ModelVersion, text: str) -> None:
        """Replace the description of a version.

        Raises:
            TrackingError: the store is away or refuses.
        """
        with backend.reachable(self.uri):
            backend.client(self.uri).update_model_version(version.name, str(version.version), _shortened(redact(text)))

    def aliases(self, name: str) -> dict[str, int]:
        """Return the aliases of `name` and the versions that they mean now.

        Raises:
            TrackingError: the store is away, or knows no such name.
        """
        with backend.reachable(self.uri):
            return {str(k): int(v) for k, v in backend.client(self.uri).get_registered_model(name).aliases.items()}

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let `models:/NAME@ALIAS` mean `version`.

        Raises:
            ConfigError: MLflow refuses the alias (`v3` and `latest` are reserved), or the version is absent.
            TrackingError: the store is away.
            FencedOut: another process has taken over.
        """
        self.check(f"models:/{name}@{alias}")
        self.fence.check()
        with backend.reachable(self.uri):
            try:
                backend.client(self.uri).set_registered_model_alias(name, alias, str(version))
            except Exception as error:
                if not backend.is_final(error) or backend.is_denied(error):
                    raise
                raise ConfigError(f"cannot set alias {alias!r} on models:/{name}/{version}: {error}") from error

    def keep_beside(self, version: ModelVersion, form: str, files: Sequence[Path]) -> str:
        """Keep `files`, a registered model in another form, among the artifacts of the run that made it.

        A version that was registered without a run gets a run of its own for them.

        Returns:
            Their folder, `runs:/RUN/exports/...`, which the version's tag `export.FORM` says too.

        Raises:
            TrackingError: the store is away.
        """
        made_by = version.run_id
        if made_by:
            run = attach(RunReference(self.uri, made_by))
        else:
            run = open_run(self.uri, EXPERIMENT, f"{form} of {version.uri.removeprefix('models:/')}")
        folder = f"exports/{of_files(version.name)}-{version.version}/{form}"
        try:
            for file in files:
                run.artifact_file(f"{folder}/{file.name}", file)
        except BaseException:
            if not made_by:
                run.end("FAILED")
            raise
        if not made_by:
            run.end("FINISHED")
        place = f"runs:/{run.id}/{folder}"
        with backend.reachable(self.uri):
            backend.client(self.uri).set_model_version_tag(version.name, str(version.version), f"{EXPORT_TAG}{form}", place)
        return place

    def find(self, reference: str) -> ModelVersion:
        """Find the version that `models:/NAME@ALIAS` or `models:/NAME/3` means now.

        Raises:
            CheckpointError: the name, alias or version does not exist; says what does.
            ConfigError: not such a reference, or there is no registry.
            TrackingError: the store is away.
        """
        return self._model_version(self._look_up(reference))

    def folder(self, model: str) -> str:
        """Find where the files of `model` are: of a registered model as `resolve` says; a folder or URL is one itself."""
        return self.resolve(model)[0] if is_reference(model) else model

    def resolve(self, reference: str) -> tuple[str, ModelVersion]:
        """Find where the files of a registered model are, and what the store says of it.

        Returns:
            A local folder or a URL that holds `model.safetensors` and `model.json`. What only MLflow's server can
            reach is downloaded once, into `models/` of the data root.

        Raises:
            CheckpointError: no such model, alias or version; or its files are not there, or not those of this project.
            ConfigError: not such a reference, or there is no registry.
            TrackingError: the store is away.
        """
        found = self._look_up(reference)
        version = self._model_version(found)
        location = version.tags.get(WEIGHTS_AT, "")
        if not location:
            with backend.reachable(self.uri):
                location = str(backend.client(self.uri).get_model_version_download_uri(version.name, str(version.version)))
                if location.startswith(("mlflow-artifacts:", "http:", "https:", "runs:")):
                    return _download(self.uri, location, version, str(found.creation_timestamp)), version
        for place in (storage.join(location, PYFUNC_FOLDER), location):
            if storage.exists(storage.join(place, CARD)):
                return storage.absolute(place), version
        raise CheckpointError(
            f"{reference} is version {version.version}, whose files should be at {location}: there is no "
            f"{CARD}. They were moved, are on another machine, or are of another project."
        )

    def check_names(self, name: str, alias: str | None = None) -> None:
        """Refuse names under which no model can be registered without a run; `register` does so at its end.

        Raises:
            ConfigError: there is no registry, or says which name is refused.
            TrackingError: the store is away or refuses.
        """
        self.check(f"registering {name!r}")
        check_store(self.uri, Names(experiment=EXPERIMENT, model=name, alias=alias), make=True)

    def check(self, what: str) -> None:
        """Refuse `what`, which needs a registry, where there is none.

        Raises:
            ConfigError: says why.
        """
        if not kind(self.uri).registers:
            raise ConfigError(
                f"{what}: tracking.uri={self.uri} has no registry of models. "
                "Name an MLflow store, or a model's folder or URL"
            )

    def _make_name(self, name: str) -> None:
        try:
            backend.client(self.uri).create_registered_model(name)
        except Exception as error:
            if backend.error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise

    def _log(self, name: str, place: str, pyfunc: Path, run_id: str | None) -> Any:
        """Log a pyfunc model with the files of the folder `place`, or where that is a URL with its name; return it."""
        client = backend.client(self.uri)
        if run_id:
            experiment = str(client.get_run(run_id).info.experiment_id)
        else:
            experiment = backend.experiment_id(self.uri, EXPERIMENT)
        copied = storage.is_local(place)
        with tempfile.TemporaryDirectory(prefix="vswin-register-") as temporary:
            workdir = Path(temporary)
            files = backend.PyfuncFiles(
                code=pyfunc,
                package=copy_needed(pyfunc, Path(vswin_dist.__file__).parent, workdir),
                artifacts={"weights": storage.join(place, WEIGHTS), "card": storage.join(place, CARD)} if copied else {},
                requirements=_requirements(),
                config={} if copied else {WEIGHTS_AT: place},
            )
            return backend.log_pyfunc(self.uri, files, experiment=experiment, name=name, run_id=run_id, workdir=workdir)

    def _add(self, name: str, model: Any, *, description: str, tags: Mapping[str, str], run_id: str | None) -> int:
        """Make a version of the pyfunc model `model`; returns its number."""
        self.fence.check()  # a copy takes its time
        client, text = backend.client(self.uri), _shortened(redact(description)) or None
        # A server checks the source against the model; a database would look the model up in the global store.
        known = None if backend.is_database(self.uri) else model.model_id
        made = client.create_model_version(
            name, model.artifact_location, run_id=run_id, tags=tags, model_id=known, description=text
        )
        link = json.dumps([{"name": name, "version": str(made.version)}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link, **tags})
        return int(made.version)

    def _look_up(self, reference: str) -> Any:
        match = _REFERENCE.match(reference)
        if not match:
            raise ConfigError(f"{reference!r} names no registered model: write models:/NAME@ALIAS or models:/NAME/VERSION")
        self.check(reference)
        name, alias, version = match["name"], match["alias"], match["version"]
        with backend.reachable(self.uri):
            client = backend.client(self.uri)
            try:
                return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
            except Exception as error:
                if not backend.is_final(error) or backend.is_denied(error):
                    raise
                raise CheckpointError(
                    f"{reference} does not exist in {backend.safe_uri(self.uri)}: {_what_exists(self.uri, name, alias)}"
                ) from error

    def _model_version(self, found: Any) -> ModelVersion:
        tags = {str(k): str(v) for k, v in found.tags.items()}
        mine = tuple(sorted(k for k, v in self.aliases(found.name).items() if v == int(found.version)))
        return ModelVersion(
            name=str(found.name),
            version=int(found.version),
            run_id=found.run_id or None,
            model_id=tags.pop(MODEL_TAG, None),
            tags=tags,
            aliases=mine,
            description=str(found.description or ""),
        )


def is_reference(model: str) -> bool:
    """Return True for `models:/...`: a registered model rather than a file."""
    return model.startswith("models:/")


def _shortened(description: str) -> str:
    """Cut a description to the characters that databases have for it."""
    most = backend.MAX_DESCRIPTION
    return description if len(description) <= most else f"{description[: most - 2]}…\n"


def _check_files(place: str) -> None:
    for name in MODEL_FILES:
        if not storage.exists(storage.join(place, name)):
            raise CheckpointError(f"{place} is not a model folder: {name} is absent")
    try:
        json.loads(storage.read_bytes(storage.join(place, CARD)))
    except ValueError as error:
        raise CheckpointError(f"{storage.join(place, CARD)} is not JSON: {error}") from error


def _requirements() -> list[str]:
    """Return the packages that prediction needs, at the versions installed here (without a build's `+cpu`)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def _what_exists(uri: str, name: str, alias: str | None) -> str:
    client = backend.client(uri)
    names = sorted(m.name for m in client.search_registered_models(max_results=1000))
    if name not in names:
        known = f"registered are {', '.join(names[:20])}" if names else "no model is registered there"
        return f"{known}.{nearest(name, names)}"
    aliases = {k: int(v) for k, v in client.get_registered_model(name).aliases.items()}
    versions = sorted(int(v.version) for v in backend.model_versions(uri, name))
    given = ", ".join(f"{k} (version {v})" for k, v in sorted(aliases.items())) or "none"
    held = f"{versions[0]} to {versions[-1]}" if versions else "none"
    return f"{name} has the aliases {given} and the versions {held}.{nearest(alias, aliases) if alias else ''}"


def _download(uri: str, location: str, version: ModelVersion, created: str) -> str:
    """Fetch the two files through the server, once; a part of a download is never taken for the whole."""
    identity = hashlib.sha256("\n".join((backend.safe_uri(uri), location, created)).encode()).hexdigest()[:16]
    target = local_files.home() / "models" / f"{version.name}-{version.version}-{identity}"
    if all((target / name).exists() for name in MODEL_FILES):
        return str(target)
    source = next(
        (p for p in (f"{location}/{PYFUNC_FOLDER}", location) if backend.artifact_exists(uri, f"{p}/{CARD}")), None
    )
    if source is None:
        raise CheckpointError(f"{version.uri} holds no {CARD} at {location}: it is not a model of this project")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as temporary:
        for name in MODEL_FILES:
            fetched = backend.download(uri, f"{source}/{name}", Path(temporary))
            os.replace(fetched, target / name)
    return str(target)
