from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from vswin_dist import storage
from vswin_dist.errors import CheckpointError
from vswin_dist.model_card import CARD, WEIGHTS
from vswin_dist.models.weights import portable


def change_card(folder: str, **changes: Any) -> None:
    path = Path(folder, CARD)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: str, **changes: torch.Tensor | None) -> None:
    path = Path(folder, WEIGHTS)
    state = safetensors.torch.load_file(path) | changes
    safetensors.torch.save_file({k: v for k, v in state.items() if v is not None}, path)


def test_a_model_comes_back_as_it_was(folder: str, network: nn.Module) -> None:
    model, card = portable.load_model(folder)
    assert not model.training
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(clips), network(clips))
    assert (card.classes, card.lineage) == (["left", "right", "up"], {"step": 7})
    data = card.data_settings()
    assert (data.frames, data.stride, data.size, data.short_side) == (4, 2, 32, 40)
    assert data.mean == (123.675, 116.28, 103.53)


def test_a_model_in_object_storage(network: nn.Module, folder: str, tmp_path: Path) -> None:
    url = f"memory://export/{tmp_path.name}"
    for name in (WEIGHTS, CARD):
        storage.put_file(f"{folder}/{name}", f"{url}/{name}")
    model, _ = portable.load_model(url)
    assert torch.equal(next(model.parameters()), next(network.parameters()))


def test_weights_that_do_not_fit_name_both_shapes(folder: str) -> None:
    change_weights(folder, **{"head.weight": torch.zeros(5, 2)})
    with pytest.raises(CheckpointError, match=r"'head\.weight' has shape \[5, 2\], the model's is \[3, \d+\]"):
        portable.load_model(folder)


def test_weights_that_are_absent_or_too_many(folder: str) -> None:
    change_weights(folder, more=torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"1 weights that the model has not, first 'more'"):
        portable.load_model(folder)
    change_weights(folder, **{"more": None, "head.bias": None})
    with pytest.raises(CheckpointError, match=r"1 of \d+ weights are absent, first 'head\.bias'"):
        portable.load_model(folder)


def test_damaged_or_absent_files(folder: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model at .*nowhere"):
        portable.load_model(str(tmp_path / "nowhere"))
    Path(folder, WEIGHTS).write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="damaged or not a safetensors"):
        portable.load_model(folder)
    Path(folder, WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        portable.load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version 2; expected 'vswin-model', 1"),
        ({"classes": ["a"]}, "3 outputs and 1 class names"),
        ({"settings": None}, "is not a valid model card: settings is null, not an object"),
    ],
)
def test_a_card_that_is_wrong(folder: str, changes: dict[str, Any], message: str) -> None:
    change_card(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        portable.load_model(folder)


def test_an_untrained_model_says_so_when_clips_are_to_be_cut(folder: str) -> None:
    change_card(folder, preprocessing={"frames": 4})
    with pytest.raises(CheckpointError, match=r"does not say how clips are cut \(sampling, stride"):
        portable.load_model(folder)[1].data_settings()


def test_more_class_names_than_outputs_are_not_written(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="3 outputs and 2 class names"):
        portable.write_model(str(tmp_path / "m"), network, classes=["a", "b"], preprocessing={}, lineage={})
    assert not (tmp_path / "m").exists()
