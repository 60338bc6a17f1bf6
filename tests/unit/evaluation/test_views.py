"""On which views a model is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vswin_dist.config import load_settings
from vswin_dist.evaluation.evaluate import Views
from vswin_dist.evaluation.report import find_model
from vswin_dist.model_card import CARD, preprocessing_of


@pytest.mark.parametrize(
    ("recipe", "expected"), [("k400_swin_t", (4, 3)), ("k400_swin_l_384", (10, 5)), ("ssv2_swin_b", (1, 3))]
)
def test_a_model_is_scored_as_its_recipe_says_unless_told(folder: str, recipe: str, expected: tuple[int, int]) -> None:
    data = load_settings(recipe, ["data.train=x", "data.sampling=dense"]).data
    path = Path(folder, CARD)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocessing": preprocessing_of(data)}))
    model = find_model(folder, "none", None)
    assert model.views(None, None, 8) == Views(*expected, 8)
    assert model.views(2, None, 8) == Views(2, expected[1], 8)
    assert model.views(None, 1, 4, True) == Views(expected[0], 1, 4, True)


def test_a_card_of_before_has_the_views_of_before(folder: str) -> None:
    path = Path(folder, CARD)
    card = json.loads(path.read_text())
    assert card["preprocessing"].pop("test_views") == [4, 3]
    path.write_text(json.dumps(card))
    assert find_model(folder, "none", None).views(None, None, 8) == Views(4, 3, 8)
