"""Recipes, overrides and what is refused."""

import re

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
    ("data.rand_augment_magnitude=31", "data.rand_augment_magnitude=31: expected from 0 to 30"),
    ("data.erasing=1.5", "data.erasing=1.5: expected from 0 to 1"),
    ("data.mixup=-1", "data.mixup=-1.0: expected 0 or more"),
    ("run.name=../other", "run.name='../other': letters, digits"),
    ("nonsense", "'nonsense' is no setting: write key=value"),
    ("data.flip=1.5", "data.flip=1.5: expected from 0 to 1"),
    ("data.erasing=-0.1", "data.erasing=-0.1: expected from 0 to 1"),
    ("data.erasing=.nan", "data.erasing=nan: expected from 0 to 1"),
    ("data.mixup=-1", "data.mixup=-1.0: expected 0 or more"),
    ("data.subset=0", "data.subset=0.0: expected more than 0, up to 1"),
    ("data.crop_scale=[0, 1]", "data.crop_scale=[0.0, 1.0]: expected more than 0, up to 1"),
    ("data.crop_scale=[1, 0.5]", "data.crop_scale=[1.0, 0.5]: the first is the least"),
    ("data.crop_ratio=[2, 0.5]", "data.crop_ratio=[2.0, 0.5]: the first is the least"),
    ("data.max_bad_samples=2", "data.max_bad_samples=2.0: expected from 0 to 1"),
    ("data.classes=[]", "data.classes=[] leaves nothing to train on"),
    ("data.std=[0, 1, 1]", "data.std=[0.0, 1.0, 1.0]: expected more than 0"),
    ("model.window_size=[8, 0, 7]", "model.window_size=[8, 0, 7]: expected 1 or more"),
    ("model.drop_path_rate=1", "model.drop_path_rate=1.0: expected from 0 up to, not including, 1"),
    ("model.shift=3D", "Did you mean '3d'?"),
    ("optim.betas=[0.9, 1]", "optim.betas=[0.9, 1.0]: expected from 0 up to, not including, 1"),
    ("optim.lr=0", "optim.lr=0.0: expected more than 0"),
    ("optim.lr=.inf", "optim.lr=inf: expected more than 0"),
    ("optim.warmup_epochs=-1", "optim.warmup_epochs=-1.0: expected 0 or more"),
    ("training.epochs=3", "optim.warmup_epochs=4 is longer than the training of training.epochs=3"),
])
def test_bad_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings("demo", [*DATA, override])
    assert message in str(error.value)


def test_a_warm_up_may_take_the_whole_training() -> None:
    assert load_settings("demo", [*DATA, "training.epochs=4"]).optim.warmup_epochs == 4.0


def test_every_number_has_bounds_and_every_bound_a_setting() -> None:
    from vswin_dist.config.load import ALLOWED, BOUNDS, CHOICES, KEYS, LENGTHS

    numbers = {key for key, hint in KEYS.items() if re.search(r"\b(int|float)\b", str(hint))}
    assert numbers == ALLOWED.keys() | {"training.zero_stage"}
    assert len(ALLOWED) == sum(len(keys) for _, keys in BOUNDS.values()), "a setting stands in two bounds"
    assert CHOICES.keys() | LENGTHS.keys() <= KEYS.keys()


def test_a_compiled_model_needs_its_weights_whole() -> None:
    with pytest.raises(ConfigError, match="stage 2"):
        load_settings("demo", ["data.train=x", "model.compile=true", "training.zero_stage=3"])


def test_the_least_number_of_ranks_is_not_above_the_most() -> None:
    assert load_settings("demo", [*DATA, "training.min_workers=2"]).training.min_workers == 2
    with pytest.raises(ConfigError, match=r"training.min_workers=3 is more than training.workers=2: lower the one"):
        load_settings("demo", [*DATA, "training.min_workers=3"])


def test_the_triton_kernel_needs_a_gpu() -> None:
    asked = ["data.train=x", "model.attention_kernel=triton"]
    with pytest.raises(ConfigError, match=r"training\.use_gpu=false"):
        load_settings("demo", asked)
    assert load_settings("demo", [*asked, "training.use_gpu=true"]).model.attention_kernel == "triton"


def test_planes_need_an_even_size() -> None:
    odd = ["data.train=x", "data.size=33"]
    assert load_settings("demo", [*odd, "data.pixel_format=rgb"]).data.size == 33
    with pytest.raises(ConfigError, match=r"data\.pixel_format=yuv needs an even data\.size, not 33"):
        load_settings("demo", [*odd, "data.pixel_format=yuv"])


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        load_settings("demo")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'k400_swin_l'"):
        load_settings("k400-swin-l")
