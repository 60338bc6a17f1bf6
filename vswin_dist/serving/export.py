"""The portable form of a model: ``model.safetensors`` (weights by parameter name) and ``model.json`` (the card).

The card holds what is needed to build the network, to cut clips for it and to name its answers, and where it comes
from. No file is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vswin_dist import storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import CheckpointError
from vswin_dist.models import VideoSwin, build_model, export_state
from vswin_dist.tracking.registry import CARD, WEIGHTS

FORMAT, VERSION = "vswin-model", 1
# The fields of DataSettings that say how test clips are cut; what a model was trained with, so they travel with it.
PREPROCESSING = ("sampling", "frames", "stride", "size", "short_side", "mean", "std", "pixel_format")


@dataclass(frozen=True)
class ModelCard:
    """What ``model.json`` holds."""

    settings: dict[str, Any]  # build_model(**settings)
    classes: list[str]  # class id -> name; empty for a model whose head was never trained
    preprocessing: dict[str, Any]  # see PREPROCESSING; empty for a model that was never trained
    lineage: dict[str, Any] = field(default_factory=dict)

    def data_settings(self) -> DataSettings:
        """The clip settings in the form that `vswin_dist.data` takes.

        Raises:
            CheckpointError: the model was registered without them, such as one inflated and not yet trained.
        """
        if missing := [name for name in PREPROCESSING if self.preprocessing.get(name) is None]:
            raise CheckpointError(f"the model's {CARD} does not say how clips are cut ({', '.join(missing)}): it was "
                                  "not trained yet, or its file was changed")
        values: dict[str, Any] = {name: self.preprocessing[name] for name in PREPROCESSING}
        values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return DataSettings(train="", **values)


def preprocessing_of(settings: DataSettings) -> dict[str, Any]:
    """The part of a training's data settings that goes into the card; `sampling` is resolved."""
    assert settings.sampling, "data.sampling was not resolved"
    return {name: getattr(settings, name) for name in PREPROCESSING}


def write_model(url: str, model: VideoSwin, *, classes: Sequence[str], preprocessing: Mapping[str, Any],
                lineage: Mapping[str, Any]) -> str:
    """Write the two files of `model` (with its `settings`) into the folder `url`; returns it, absolute."""
    target = storage.absolute(url)
    card = ModelCard(dict(model.settings), list(classes), dict(preprocessing), dict(lineage))
    _check_classes(card, target)
    # A saved file must not share storage with the model, nor hold tensors of a GPU.
    state = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in export_state(model, "native").items()}
    storage.put_bytes(storage.join(target, WEIGHTS), safetensors.torch.save(state, {"format": "pt"}))
    storage.put_bytes(storage.join(target, CARD), card_bytes(card))
    return target


def card_bytes(card: ModelCard) -> bytes:
    """The content of ``model.json``."""
    body = {"format": FORMAT, "version": VERSION, **asdict(card)}
    return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()


def read_card(url: str) -> ModelCard:
    """The card in the model folder `url`.

    Raises:
        CheckpointError: absent, of another format, or contradicting itself.
    """
    path = storage.join(storage.absolute(url), CARD)
    try:
        body = json.loads(storage.read_bytes(path))
        if body.get("format") != FORMAT or body.get("version") != VERSION:
            raise CheckpointError(f"{path} is no model card that this version reads: format {body.get('format')!r}, "
                                  f"version {body.get('version')!r}; expected {FORMAT!r}, {VERSION}")
        card = ModelCard(**{f.name: body[f.name] for f in fields(ModelCard)})
        _check_classes(card, path)
    except FileNotFoundError as error:
        raise CheckpointError(f"no model at {url}: {path} does not exist") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no readable model card: {type(error).__name__}: {error}") from error
    return card


def load_model(url: str) -> tuple[VideoSwin, ModelCard]:
    """Build the model in the folder `url` and load its weights; in evaluation mode, on the CPU.

    Raises:
        CheckpointError: a file is absent or damaged, or the weights do not fit the card (names both shapes).
    """
    card = read_card(url)
    path = storage.join(storage.absolute(url), WEIGHTS)
    try:
        local = storage.is_local(path)  # is mapped, not read twice
        state = safetensors.torch.load_file(path) if local else safetensors.torch.load(storage.read_bytes(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"no model at {url}: {path} does not exist") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    model = build_model(**card.settings)
    _check_weights(export_state(model, "native"), state, path)
    with torch.no_grad():
        model.load_state_dict(state, strict=False)  # buffers that are derived from the settings are not in the file
    return model.eval(), card


def _check_classes(card: ModelCard, where: str) -> None:
    if card.classes and card.settings.get("num_classes") != len(card.classes):
        raise CheckpointError(f"{where}: the model has {card.settings.get('num_classes')} outputs and "
                              f"{len(card.classes)} class names")


def _check_weights(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{path}: {len(missing)} of {len(wanted)} weights are absent, first {missing[0]!r}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{path}: {len(extra)} weights that the model has not, first {extra[0]!r}")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(f"{path}: {name!r} has shape {list(found[name].shape)}, the model's is "
                                  f"{list(tensor.shape)}")
