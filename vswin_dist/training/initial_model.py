"""The model before the first step: random weights, a checkpoint, or a registered model, inflated ones among them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from vswin_dist import models, storage
from vswin_dist.config import Settings
from vswin_dist.model_card import WEIGHTS
from vswin_dist.models import LoadReport
from vswin_dist.models.swin.presets import Architecture, resolve
from vswin_dist.tracking import Registry, is_reference


def model_overrides(s: Settings) -> dict[str, Any]:
    """Return the arguments of `build_model` that the settings name; None leaves a value to the preset."""
    known = {f.name for f in fields(Architecture)}
    return {k: v for k, v in vars(s.model).items() if k in known and v is not None}


def architecture_of(s: Settings, num_classes: int) -> Architecture:
    """Return the architecture that the settings mean."""
    return resolve(s.model.name, num_classes, model_overrides(s))


def pinned(init: str | None, uri: str) -> str | None:
    """Replace an alias by the version that it means now: an alias may move during a training run."""
    return Registry(uri).find(init).uri if init and is_reference(init) else init


def initial_weights(init: str, uri: str) -> str:
    """Find the file that `model.init` means: of a registered model in the store `uri`, or as it stands."""
    return storage.join(Registry(uri).folder(init), WEIGHTS) if is_reference(init) else init


def random_model(s: Settings, num_classes: int) -> models.VideoSwin:
    """Build the model with random weights that `run.seed` decides."""
    torch.manual_seed(s.run.seed)
    return models.build_model(s.model.name, num_classes=num_classes, **model_overrides(s))


def initial_model(s: Settings, num_classes: int, uri: str) -> tuple[models.VideoSwin, LoadReport | None]:
    """Build the model before the first step, the same on every rank: from the seed, then from `model.init`."""
    model = random_model(s, num_classes)
    if not s.model.init:
        return model, None
    return model, load(model, initial_weights(s.model.init, uri), s)


def load(model: models.VideoSwin, path: str, s: Settings, dry_run: bool = False) -> LoadReport:
    """Load the checkpoint at `path`, inflated as the recipe says where it is of 2D; see `models.load_pretrained`."""
    m = s.model
    report = models.load_pretrained(
        model, path, embedding=m.inflate_embedding, bias=m.inflate_bias, ema=m.init_ema, dry_run=dry_run
    )
    if s.model.inflate_noise and not dry_run and report.counts()["inflated"]:
        models.break_time_symmetry(model, s.model.inflate_noise, s.run.seed)
    return report
