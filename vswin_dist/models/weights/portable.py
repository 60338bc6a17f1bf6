"""Write and load a model in its portable form, see `vswin_dist.model_card`. No file is unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vswin_dist import storage
from vswin_dist.errors import CheckpointError
from vswin_dist.model_card import CARD, WEIGHTS, ModelCard, card_bytes, check_classes, read_card
from vswin_dist.models.swin.model import VideoSwin, build_model
from vswin_dist.models.weights.layouts import export_state


def write_model(
    url: str, model: VideoSwin, *, classes: Sequence[str], preprocessing: Mapping[str, Any], lineage: Mapping[str, Any]
) -> str:
    """Write the two files of `model` (with its `settings`) into the folder `url`; returns it, absolute."""
    target = storage.absolute(url)
    card = ModelCard(dict(model.settings), list(classes), dict(preprocessing), dict(lineage))
    check_classes(card, target)
    # A saved file must not share storage with the model, nor hold tensors of a GPU.
    state = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in export_state(model, "native").items()}
    storage.put_bytes(storage.join(target, WEIGHTS), safetensors.torch.save(state, {"format": "pt"}))
    storage.put_bytes(storage.join(target, CARD), card_bytes(card))
    return target


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
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    model = build_model(**card.settings)
    _check_weights(export_state(model, "native"), state, path)
    with torch.no_grad():
        model.load_state_dict(state, strict=False)  # buffers that are derived from the settings are not in the file
    return model.eval(), card


def _check_weights(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{path}: {len(missing)} of {len(wanted)} weights are absent, first {missing[0]!r}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{path}: {len(extra)} weights that the model has not, first {extra[0]!r}")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {list(found[name].shape)}, the model's is {list(tensor.shape)}"
            )
