"""The schema's rules, what texts mean by them, and what is refused."""

import dataclasses
import inspect
import json
import pickle
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from vswin_dist import config
from vswin_dist.config import from_flat, load_settings, may_differ, recipe_names, recipe_text, rules, schema, to_flat
from vswin_dist.config.load import GROUPS, KEYS, rule
from vswin_dist.errors import ConfigError

DATA = ["data.train=/shards"]
SPELLED = ["training.profile"]  # texts of one form
TEXTS = [key for key in KEYS if rule(key).is_text and key not in SPELLED]
LITERAL = (
    "0123456",
    "1.10",
    "2026-11-25",
    "1e3",
    "yes",
    "~",
    "NULL",
    "None",
    "0x1f",
    "1_000",
    "12:30:45",
    "exp #2",
    "/d/run #2/x",
    "a: b",
    " x ",
    "[x",
    "[x, y]",
    "{x: 1}",
    "'a'",
    '"',
    "@x",
    "%x",
    "!x 2",
    "&x",
    "*x",
    "- x",
    "a=b",
    "null ",
    "e\u0301",
)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_its_flat_form_and_a_pickle(name: str) -> None:
    settings = load_settings(name, DATA)
    assert from_flat(to_flat(settings), name) == settings == pickle.loads(pickle.dumps(settings))


def is_a_text(hint: Any) -> bool:
    """Whether a field of this type holds any text, or a list of any texts."""
    return hint is str or any(map(is_a_text, typing.get_args(hint)))


def test_the_text_settings_are_the_fields_of_type_str() -> None:
    hints = {f"{group}.{field}": hint for group, cls in GROUPS.items() for field, hint in typing.get_type_hints(cls).items()}
    assert [key for key in KEYS if is_a_text(hints[key]) and key not in SPELLED] == TEXTS and len(TEXTS) > 10


REQUIRED = {"run.name": "a", "model.name": "swin_t", "data.train": "/x"}


@pytest.mark.slow
@pytest.mark.parametrize("key", TEXTS)
def test_a_text_is_taken_as_it_stands(key: str, tmp_path: Path) -> None:
    """On the command line, in a recipe, and in what is kept of a run; refused as it stands where it cannot name a folder."""
    least, recipe = tmp_path / "least.yaml", tmp_path / "mine.yaml"
    least.write_text(yaml.safe_dump(REQUIRED))
    for text in LITERAL:
        value: Any = [text, "b"] if rule(key).is_list else text
        given = "['" + text.replace("'", "''") + "', b]" if rule(key).is_list else text
        recipe.write_text(yaml.safe_dump(REQUIRED | {key: value}, allow_unicode=True))
        for file, overrides in ((least, [f"{key}={given}"]), (recipe, [])):
            if key == "run.name" and not re.fullmatch(r"[\w\- ][\w\-.# ]*", text):
                with pytest.raises(ConfigError, match=re.escape(f"run.name={text!r}: letters")):
                    load_settings(str(file), overrides)
                continue
            kept = to_flat(load_settings(str(file), overrides))
            assert kept[key] == value
            assert to_flat(from_flat(json.loads(json.dumps(kept))))[key] == value


@pytest.mark.parametrize("key", TEXTS)
def test_a_bare_text_in_a_recipe_is_whole_or_refused(key: str, tmp_path: Path) -> None:
    """YAML takes what follows ' #' for a comment, and '!x' for a tag."""
    recipe = tmp_path / "mine.yaml"
    for text in LITERAL:
        written = f"[{text}]" if rule(key).is_list else text
        recipe.write_text("".join(f"{k}: {v}\n" for k, v in (REQUIRED | {key: written}).items()))
        try:
            value = to_flat(load_settings(str(recipe)))[key]
        except ConfigError as error:
            assert "\n" not in str(error) and (key in str(error) or "quotes" in str(error))
            continue
        if rule(key).is_list:
            assert value == [part.strip().strip("'") for part in text.split(",")]
        else:
            assert value == (None if text == "null " and rule(key).optional else text.strip().strip("'"))


def test_only_a_bare_null_is_null(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("run.name: 'null'\nmodel.name: x\ndata.train: /x\ndata.val: null\nmodel.init: 'null'  # a file\n")
    s = load_settings(str(recipe), ["storage.root=null", "tracking.uri=Null"])
    assert (s.run.name, s.data.val, s.model.init, s.storage.root, s.tracking.uri) == ("null", None, "null", None, "Null")


@pytest.mark.parametrize("name", ["0123456", "1.10", "2026-11-25", "1e3", "yes"])
def test_a_bare_text_in_a_recipe_is_a_text(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text(f"run.name: {name}\nmodel.name: swin_t\ndata.classes: [{name}, 'a, b']\n")
    s = load_settings(str(tmp_path / "mine.yml"), DATA)
    assert (s.run.name, s.data.classes) == (name, (name, "a, b"))
    assert load_settings("demo", [*DATA, f"run.name={name}"]).run.name == name


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.name=exp #2", "exp #2"),
        ("data.val=null", None),
        ("training.max_steps=null", None),
        ("model.window_size=null", None),
        ("tracking.experiment=null", "null"),  # which cannot be None
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=1", 1.0),
        ("training.epochs=0100", 100),
        ("training.use_gpu=true", True),
        ("training.use_gpu=Yes", True),
        ("training.use_gpu=off", False),
        ("training.zero_stage=3", 3),
        ("model.shift=3d", "3d"),
        ("model.window_size=[16,7, 7]", [16, 7, 7]),
        ("data.crop_scale=[5e-1, 1]", [0.5, 1.0]),
        ('data.classes=[0123, "a, b", exp #2, 2026-11-25, it\'s]', ["0123", "a, b", "exp #2", "2026-11-25", "it's"]),
        ('data.classes=[\'it\'\'s, a\', "b ""c""", null, yes,]', ["it's, a", 'b "c"', "null", "yes"]),
    ],
)
def test_a_text_is_read_by_the_type_of_the_field(override: str, value: Any) -> None:
    found = to_flat(load_settings("demo", [*DATA, override]))[override.partition("=")[0]]
    assert found == value and type(found) is type(value)


def test_values_that_are_typed_already_are_taken_strictly() -> None:
    flat = to_flat(load_settings("demo", DATA))
    assert from_flat(flat | {"optim.lr": 1, "model.window_size": [8, 7, 7]}).model.window_size == (8, 7, 7)
    for key, value in {"training.workers": True, "training.epochs": "3", "optim.lr": "1e-3", "data.val": 3}.items():
        with pytest.raises(ConfigError, match=f"^{key}={value!r}: expected "):
            from_flat(flat | {key: value})
    with pytest.raises(ConfigError, match=r"unknown setting 'data\.tran'"):
        from_flat(flat | {"data.tran": None})
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        from_flat(flat | {"data.train": None})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tran=/x", "unknown setting 'data.tran'. Did you mean 'data.train'?"),
        ("training.zero_stage=4", "training.zero_stage=4: expected one of 0, 1, 2, 3"),
        ("training.precision=bf61", "Did you mean 'bf16'?"),
        ("data.sampling=unifrom", "expected one of dense, uniform, or null. Did you mean 'uniform'?"),
        ("training.workers=two", "training.workers='two': expected a whole number, 1 or more"),
        ("training.workers=null", "training.workers='null': expected a whole number, 1 or more"),
        ("training.workers=0", "training.workers=0: expected 1 or more"),
        ("training.max_steps=1.5", "training.max_steps='1.5': expected a whole number, 1 or more, or null"),
        ("training.use_gpu=1", "training.use_gpu='1': expected true or false"),
        ("data.val=", "data.val is empty: expected text, or null"),
        ("data.crop_scale=[1]", "data.crop_scale=[1.0]: expected 2 values, got 1"),
        ("data.mean=[1, 2, 3, 4]", "data.mean=[1.0, 2.0, 3.0, 4.0]: expected 3 values, got 4"),
        ("data.mean=[1, 2, .inf]", "data.mean=[1.0, 2.0, '.inf']: expected a list of numbers"),
        ("data.mean=[1, 2, inf]", "data.mean=[1.0, 2.0, inf]: expected a finite number"),
        (
            "model.window_size=7",
            "model.window_size='7': expected a list of whole numbers, 1 or more, such as [8, 7, 7], or null",
        ),
        ("data.rand_augment_magnitude=31", "data.rand_augment_magnitude=31: expected from 0 to 30"),
        ("data.erasing=1.5", "data.erasing=1.5: expected from 0 to 1"),
        ("data.mixup=-1", "data.mixup=-1.0: expected 0 or more"),
        ("run.name=../other", "run.name='../other': letters, digits"),
        ("nonsense", "'nonsense' is not a setting: write key=value"),
        ("data.flip=1.5", "data.flip=1.5: expected from 0 to 1"),
        ("data.erasing=-0.1", "data.erasing=-0.1: expected from 0 to 1"),
        ("data.erasing=nan", "data.erasing=nan: expected from 0 to 1"),
        ("data.subset=0", "data.subset=0.0: expected more than 0, up to 1"),
        ("data.crop_scale=[0, 1]", "data.crop_scale=[0.0, 1.0]: expected more than 0, up to 1"),
        ("data.crop_scale=[1, 0.5]", "data.crop_scale=[1.0, 0.5]: expected the lower bound first"),
        ("data.crop_ratio=[2, 0.5]", "data.crop_ratio=[2.0, 0.5]: expected the lower bound first"),
        ("data.max_bad_samples=2", "data.max_bad_samples=2.0: expected from 0 to 1"),
        ("data.classes=[]", "data.classes=[]: leaves nothing to train on"),
        ("data.classes=[a,,b]", "data.classes holds an empty item: expected a list of texts, such as [a, b]"),
        ("data.classes=[a, b", "data.classes='[a, b': expected a list of texts, such as [a, b], or null"),
        ("data.std=[0, 1, 1]", "data.std=[0.0, 1.0, 1.0]: expected more than 0"),
        ("model.window_size=[8, 0, 7]", "model.window_size=[8, 0, 7]: expected 1 or more"),
        ("model.drop_path_rate=1", "model.drop_path_rate=1.0: expected from 0 up to, not including, 1"),
        ("model.shift=3D", "model.shift='3D': expected one of 3d, spatial, none. Did you mean '3d'?"),
        ("optim.betas=[0.9, 1]", "optim.betas=[0.9, 1.0]: expected from 0 up to, not including, 1"),
        ("optim.lr=0", "optim.lr=0.0: expected more than 0"),
        ("optim.lr=inf", "optim.lr=inf: expected more than 0"),
        ("optim.lr=fast", "optim.lr='fast': expected a number, more than 0"),
        ("optim.warmup_epochs=-1", "optim.warmup_epochs=-1.0: expected 0 or more"),
        ("training.epochs=1", "optim.warmup_epochs=1.5 is longer than the training of training.epochs=1"),
        ("evaluation.ema=true", "evaluation.ema=true with training.ema_decay=0: no average is kept"),
        ("optim.freeze_epochs=2", "optim.freeze_epochs=2 with optim.freeze=null: nothing is frozen"),
        ("evaluation.patience=2", "evaluation.patience=2 with data.val=null: there is no val/top1"),
        ("training.precision=fp16", "training.precision=fp16 with training.zero_stage=2 on CPUs: DeepSpeed has none there"),
        ("optim.freeze=[]", "optim.freeze=[]: name parameters or modules, or null for none"),
        ("optim.layer_decay=0", "optim.layer_decay=0.0: expected more than 0, up to 1"),
        ("training.ema_decay=1", "training.ema_decay=1.0: expected from 0 up to, not including, 1"),
    ],
)
def test_bad_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings("demo", [*DATA, override])
    assert message in str(error.value) and "pydantic" not in str(error.value)


def test_states_are_not_moved_where_they_are_not_split() -> None:
    with pytest.raises(ConfigError, match=r"training\.offload=true with training\.zero_stage=0"):
        load_settings("demo", [*DATA, "training.offload=true", "training.zero_stage=0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run.name: [a", "cannot be read"),
        ("- run.name", "is not a list of 'group.field: value' lines"),
        ("run.name: {a: 1}\nmodel.name: x\n", "run.name={'a': '1'}: expected text"),
        ("run.nmae: a", "Did you mean 'run.name'?"),
        ("data.val:", "data.val is empty"),
        (
            "data.val: /d/run #2/x",
            "line 1: of 'data.val: /d/run #2/x', YAML would keep only '/d/run': put the text in quotes",
        ),
        ("data.classes:\n- a\n- b #2\n", "line 3: of '- b #2', YAML would keep only 'b'"),
        ("data.classes: [a, &b c]", "YAML would keep only 'c'"),
        ("data.val: @x", "put texts of other signs in quotes"),
    ],
)
def test_bad_recipes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_settings(str(tmp_path / "mine.yaml"), DATA)
    assert message in str(error.value)


def test_a_group_is_checked_however_it_is_made() -> None:
    data = schema.DataSettings("x", frames=8)
    assert dataclasses.replace(data, size=32) == schema.DataSettings(train="x", frames=8, size=32)
    with pytest.raises(ConfigError, match=r"^data\.size=0: expected 1 or more$"):
        dataclasses.replace(data, size=0)
    with pytest.raises(ConfigError, match=r"^data\.train=3: expected text$"):
        schema.DataSettings(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^run\.name is not set"):
        schema.RunSettings()  # type: ignore[call-arg]
    settings = load_settings("demo", DATA)
    with pytest.raises(ConfigError, match="take stage 2"):
        dataclasses.replace(
            settings,
            model=dataclasses.replace(settings.model, compile=True),
            training=dataclasses.replace(settings.training, zero_stage=3),
        )


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_has_a_rule_and_a_meaning(key: str) -> None:
    """Numbers have bounds, lists a length or an own check, and each field a comment."""
    group, field = key.split(".")
    of = rule(key)
    assert of.key == key and rules.group_name(GROUPS[group]) == group
    if of.item["type"] in ("integer", "number") and "enum" not in of.schema and key != "data.mean":
        assert of.item.keys() & {"minimum", "exclusiveMinimum"}, "a number without a lower bound"
    if of.is_list and of.item["type"] != "string":
        assert of.schema["minItems"] == of.schema["maxItems"]
    lines = [line for line in inspect.getsource(GROUPS[group]).splitlines() if line.startswith(f"    {field}: ")]
    assert len(lines) == 1 and len(lines[0].partition("  # ")[2]) > 3, "a field without a comment"


def test_what_may_differ_on_resumption_is_marked_on_the_field() -> None:
    groups = {
        group: {key.split(".")[1] for key in KEYS if key.startswith(f"{group}.") and may_differ(key)} for group in GROUPS
    }
    assert groups["optim"] == {"max_skipped_steps"} and groups["run"] == {"fresh", "take_over"}
    assert groups["data"] >= {"train", "val", "workers", "prefetch", "cache_gb", "max_bad_samples"}
    assert not groups["data"] & {"frames", "size", "subset", "classes", "balance", "repeats", "mixup", "pixel_format"}
    assert groups["model"] == {"init", "gradient_checkpointing", "compile", "attention_kernel"}
    assert {"epochs", "global_batch", "precision"}.isdisjoint(groups["training"])
    assert groups["training"] >= {"workers", "min_workers", "use_gpu", "cpus_per_worker", "micro_batch", "zero_stage"}
    assert groups["training"] >= {"deterministic", "max_steps", "checkpoint_every", "keep_checkpoints", "max_failures"}
    for group in ("evaluation", "tracking", "storage"):
        assert groups[group] == {f.name for f in dataclasses.fields(GROUPS[group])}


def test_a_warm_up_may_take_the_whole_training() -> None:
    assert load_settings("demo", [*DATA, "training.epochs=4", "optim.warmup_epochs=4"]).optim.warmup_epochs == 4.0


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
    for form in ("yuv", "native"):
        with pytest.raises(ConfigError, match=rf"data\.pixel_format={form} needs an even data\.size, not 33"):
            load_settings("demo", [*odd, f"data.pixel_format={form}"])


@pytest.mark.parametrize("more", [[], ["data.train=null"]])
def test_what_has_no_default_must_be_given(more: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is not set: give data\.train=\.\.\."):
        load_settings("demo", more)


def test_the_defaults_are_what_a_recipe_need_not_say() -> None:
    needed = {"run.name": "x", "model.name": "swin_nano", "data.train": "y"}
    assert config.defaults() == {k: v for k, v in to_flat(from_flat(needed)).items() if k not in needed}


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'k400_swin_l'"):
        load_settings("k400-swin-l")
    with pytest.raises(ConfigError, match="Did you mean 'ablation_table6_spatial'"):
        recipe_text("ablation_table6_spatal")
