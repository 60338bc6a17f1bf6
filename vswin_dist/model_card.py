"""The portable form of a model: `model.safetensors` (weights by parameter name) and `model.json` (the card).

The card holds what is needed to build the network, to cut clips for it and to name its answers, and where it comes
from. Its files are written and read with their weights by `vswin_dist.models.weights.portable`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from vswin_dist import storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import CheckpointError
from vswin_dist.records import read_record

WEIGHTS, CARD = "model.safetensors", "model.json"
MODEL_FILES = (WEIGHTS, CARD)
FORMAT, VERSION = "vswin-model", 1
# The fields of DataSettings that say how test clips are cut; what a model was trained with, so they travel with it.
PREPROCESSING = ("sampling", "frames", "stride", "size", "short_side", "mean", "std", "pixel_format", "test_views")
NEWER = ("test_views",)  # of these, what earlier cards do not say: the setting's default then


@dataclass(frozen=True)
class ModelCard:
    """What `model.json` holds."""

    settings: dict[str, Any]  # build_model(**settings)
    classes: list[str]  # class id -> name; empty for a model whose head was never trained
    preprocessing: dict[str, Any]  # see PREPROCESSING; empty for a model that was never trained
    lineage: dict[str, Any] = field(default_factory=dict)

    def data_settings(self) -> DataSettings:
        """Give the clip settings in the form that `vswin_dist.data` takes.

        Raises:
            CheckpointError: the model was registered without them, such as one inflated and not yet trained.
        """
        said = [name for name in PREPROCESSING if self.preprocessing.get(name) is not None]
        if missing := [name for name in PREPROCESSING if name not in (*said, *NEWER)]:
            raise CheckpointError(
                f"the model's {CARD} does not say how clips are cut ({', '.join(missing)}): it was "
                "not trained yet, or its file was changed"
            )
        values: dict[str, Any] = {name: self.preprocessing[name] for name in said}
        values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return DataSettings(train="", **values)


def preprocessing_of(settings: DataSettings) -> dict[str, Any]:
    """Select the part of a run's data settings that goes into the card; `sampling` is resolved."""
    assert settings.sampling, "data.sampling was not resolved"
    return {name: getattr(settings, name) for name in PREPROCESSING}


def card_bytes(card: ModelCard) -> bytes:
    """Encode the content of `model.json`."""
    body = {"format": FORMAT, "version": VERSION, **asdict(card)}
    return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()


def read_card(url: str) -> ModelCard:
    """Read the card in the model folder `url`.

    Raises:
        CheckpointError: absent, of another format, or contradicting itself.
    """
    path = storage.join(storage.absolute(url), CARD)
    try:
        card = read_record(path, ModelCard, format=FORMAT, version=VERSION, what="model card", error=CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(f"no model at {url}: {path} does not exist") from error
    check_classes(card, path)
    return card


def check_classes(card: ModelCard, where: str) -> None:
    """Refuse a card whose class names are not as many as the model's outputs; `where` is named in the error."""
    if card.classes and card.settings.get("num_classes") != len(card.classes):
        raise CheckpointError(
            f"{where}: the model has {card.settings.get('num_classes')} outputs and {len(card.classes)} class names"
        )
