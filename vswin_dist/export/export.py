"""Export a model: write it, read it back, compare its outputs with the model's, and only then put it where it is to be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vswin_dist import storage
from vswin_dist.errors import ConfigError, WorkFailed, after_start, before_start
from vswin_dist.export.formats import FORMATS, Format
from vswin_dist.export.subject import Subject, choose_clips
from vswin_dist.model_card import CARD
from vswin_dist.models.weights.portable import load_model
from vswin_dist.tracking import ModelVersion, Registry, is_reference, tracking_uri, wait_for_store
from vswin_dist.tracking.registry import EXPORT_TAG

RETRY = "Once that is mended, the same command exports it."


@dataclass(frozen=True)
class Difference:
    """How far the outputs of an export are from the model's, for one number of clips."""

    batch: int
    largest: float
    logits: float  # the model's largest, for the scale

    def __str__(self) -> str:
        return f"batch of {self.batch}: largest difference {self.largest:.2e}, of logits up to {self.logits:.3g}"


@dataclass(frozen=True)
class Export:
    """An export that was written and checked, in a temporary folder."""

    path: Path  # a file, or a folder of files
    differences: tuple[Difference, ...]

    def files(self) -> list[Path]:
        """Return its files; in a folder, this project's card last, by which a reader knows a whole one."""
        if self.path.is_file():
            return [self.path]
        return sorted(self.path.iterdir(), key=lambda file: (file.name == CARD, file.name))

    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files())


@before_start()
def find_subject(
    model: str, uri: str | None, shape: tuple[int, int, int] | None, batch: int | None
) -> tuple[Subject, ModelVersion | None]:
    """Load what `model` means now: `models:/...`, or a folder or URL; and its registered version, where it is one.

    Raises:
        CheckpointError: there is none; says what there is. ConfigError: as `choose_clips`.
        PreflightError: the store is away.
    """
    if not is_reference(model):
        reference, version, folder = model, None, storage.absolute(model)
    else:
        folder, version = Registry(tracking_uri(uri)).resolve(model)
        reference = version.uri
    network, card = load_model(folder)
    clips = choose_clips(card, shape, batch)
    tags = version.tags if version else {}
    facts = {name: value for name, value in tags.items() if not name.startswith(EXPORT_TAG)}
    return Subject(reference, network, card, clips, facts), version


@before_start()
def check_request(to: str, model: str, out: str | None, register: bool) -> None:
    """Refuse what cannot be done, before anything is loaded; the S3 endpoint is set before.

    Raises:
        ConfigError: the export would go nowhere, to a folder where it is a file, or beside a model that is not registered.
        PreflightError: packages are absent, or `out` cannot be written.
    """
    if out is None and not register:
        raise ConfigError("the export would go nowhere: give --out URL, or --register for the artifacts of the model's run")
    if register and not is_reference(model):
        raise ConfigError(f"--register keeps the export beside a registered model: {model!r} is none (models:/NAME@ALIAS)")
    FORMATS[to].check_packages(to)
    if out is not None:
        _check_target(out, to)


def _check_target(out: str, to: str) -> None:
    suffix, target = FORMATS[to].suffix, storage.absolute(out)
    if not suffix:
        storage.check_writable(target)
        return
    is_bucket = not storage.is_local(target) and target.count("/") == 2
    if out.endswith("/") or is_bucket or (storage.exists(target) and not storage.is_file(target)):
        file = storage.join(out, f"model{suffix}")
        raise ConfigError(f"--out {out} names a folder, but --to {to} makes a file: name it, as in --out {file}")
    storage.check_writable(target.rpartition("/")[0] or "/")


@contextmanager
def exported(subject: Subject, to: str, tolerance: float) -> Iterator[Export]:
    """Write the export in a temporary folder, and check it.

    Raises:
        ConfigError: the form cannot hold the model.
        WorkFailed: its outputs differ from the model's by more than `tolerance`.
    """
    with tempfile.TemporaryDirectory(prefix="vswin-export-") as folder:
        path = Path(folder, f"model{FORMATS[to].suffix}")
        FORMATS[to].write(subject, path)
        differences = tuple(compare(subject, FORMATS[to], path))
        worst = max(differences, key=lambda found: (found.largest != found.largest, found.largest))
        if not worst.largest <= tolerance:
            raise WorkFailed(
                f"{subject.reference} --to {to}: {worst}, more than the bound {tolerance:g}. Nothing was written. Where "
                "rounding alone may be the cause, --tolerance allows more"
            )
        yield Export(path, differences)


@torch.inference_mode()
def compare(subject: Subject, form: Format, path: Path) -> Iterator[Difference]:
    """Compare the outputs of the file or folder `path` with the model's own, for each number of clips to be checked."""
    classifier = form.read(subject, path)
    for batch in subject.clips.checked():
        clips = subject.clips.draw(batch)
        expected, found = subject.model(clips), classifier(clips)
        if found.shape != expected.shape:
            raise WorkFailed(f"{path.name}: outputs {list(found.shape)} for {batch} clips, the model {list(expected.shape)}")
        yield Difference(batch, float((found - expected).abs().max()), float(expected.abs().max()))


def publish(export: Export, out: str) -> str:
    """Put a checked export at the URL `out`, of a file or of a folder; returns it, absolute.

    Raises:
        StorageError: it cannot be written.
    """
    target = storage.absolute(out)
    with after_start(RETRY):
        for file in export.files():
            storage.put_file(file, target if export.path.is_file() else storage.join(target, file.name))
    return target


def register(export: Export, version: ModelVersion, to: str, uri: str | None) -> str:
    """Keep a checked export beside its model, see `Registry.keep_beside`; returns where.

    Raises:
        TrackingError: the store is away or refuses.
    """
    with after_start(RETRY):
        wait_for_store(tracking_uri(uri))
        return Registry(tracking_uri(uri)).keep_beside(version, to, export.files())
