"""Recipes, overrides and what is refused."""

import pytest

from vswin_dist.config import from_flat, load_settings, recipe_names, to_flat
from vswin_dist.errors import ConfigError

DATA = ["data.train=/shards"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_flat_complete_and_loads(name: str) -> None:
    import yaml

    from vswin_dist.config import recipe_text
    from vswin_dist.config.load import KEYS

    assert set(yaml.safe_load(recipe_text(name))) == set(KEYS)
    settings = load_settings(name, DATA)
    assert from_flat(to_flat(settings), name) == settings


def test_overrides_are_read_as_yaml() -> None:
    s = load_settings("demo", [*DATA, "optim.lr=3e-4", "model.window_size=[16,7,7]", "data.val=null", "run.name=123"])
    assert (s.optim.lr, s.model.window_size, s.data.val, s.run.name) == (3e-4, (16, 7, 7), None, "123")


@pytest.mark.parametrize(("override", "message"), [
    ("data.tran=/x", "unknown setting 'data.tran'. Did you mean 'data.train'?"),
    ("training.zero_stage=4", "training.zero_stage=4: expected one of 0, 1, 2, 3"),
    ("training.precision=bf61", "Did you mean 'bf16'?"),
    ("training.workers=two", "training.workers='two': expected int, got str"),
    ("training.workers=0", "training.workers=0: expected 1 or more"),
    ("training.use_gpu=1", "training.use_gpu=1: expected bool, got int"),
    ("data.crop_scale=[1]", "data.crop_scale=[1.0]: expected 2 values, got 1"),
    ("model.window_size=7", "model.window_size=7: expected a list"),
    ("nonsense", "'nonsense' is no setting: write key=value"),
])
def test_bad_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings("demo", [*DATA, override])
    assert message in str(error.value)


def test_a_compiled_model_needs_its_weights_whole() -> None:
    with pytest.raises(ConfigError, match="stage 2"):
        load_settings("demo", ["data.train=x", "model.compile=true", "training.zero_stage=3"])


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        load_settings("demo")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'k400_swin_l'"):
        load_settings("k400-swin-l")
