"""The recipes against what was published (paper, sections 4.1 to 4.3; the published configurations)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from vswin_dist import models
from vswin_dist.config import Settings, load_settings, recipe_names, recipe_text, to_flat
from vswin_dist.config.ablations import ROWS, Row
from vswin_dist.config.load import rule
from vswin_dist.training.initial_model import model_overrides


@dataclass(frozen=True)
class Published:
    """A row of the published tables; MACs with two more per LayerNorm element, as the paper counts."""

    model: str
    parameters: int
    gmacs: float
    drop_path: float
    lr: float
    weight_decay: float
    scores: tuple[str, ...]
    start: str
    classes: int = 400
    window: tuple[int, int, int] = (8, 7, 7)
    size: int = 224


T_1K, B_22K = "swin_tiny_patch4_window7_224.pth", "swin_base_patch4_window7_224_22k.pth"
L_384 = "swin_large_patch4_window12_384_22k.pth"
PUBLISHED = {
    "k400_swin_t": Published("swin_t", 28_158_070, 87.88, 0.1, 1e-3, 0.02, ("78.8 / 93.6 at 4 clips x 3 crops",), T_1K),
    "k400_swin_s": Published(
        "swin_s",
        49_816_678,
        165.86,
        0.1,
        1e-3,
        0.02,
        ("80.6 / 94.5 at 4 clips x 3 crops",),
        "swin_small_patch4_window7_224.pth",
    ),
    "k400_swin_b": Published(
        "swin_b",
        88_048_984,
        281.57,
        0.3,
        1e-3,
        0.05,
        ("80.6 / 94.6 at 4 clips x 3 crops",),
        "swin_base_patch4_window7_224.pth",
    ),
    "k400_swin_b_22k": Published(
        "swin_b", 88_048_984, 281.57, 0.2, 3e-4, 0.05, ("82.7 / 95.5 at 4 clips x 3 crops",), B_22K
    ),
    "k400_swin_l": Published(
        "swin_l",
        196_953_916,
        603.62,
        0.4,
        3e-4,
        0.05,
        ("83.1 / 95.9 at 4 clips x 3 crops",),
        "swin_large_patch4_window7_224_22k.pth",
    ),
    "k400_swin_l_384": Published(
        "swin_l",
        199_999_516,
        2107.42,
        0.4,
        3e-4,
        0.05,
        ("84.6 / 96.5 at 4 clips x 3 crops", "84.9 / 96.7 at 10 clips x 5 crops"),
        L_384,
        window=(8, 12, 12),
        size=384,
    ),
    "k600_swin_b": Published(
        "swin_b", 88_253_984, 281.57, 0.2, 3e-4, 0.05, ("84.0 / 96.5 at 4 clips x 3 crops",), B_22K, classes=600
    ),
    "k600_swin_l_384": Published(
        "swin_l",
        200_306_916,
        2107.42,
        0.4,
        3e-4,
        0.05,
        ("85.9 / 97.1 at 4 clips x 3 crops", "86.1 / 97.3 at 10 clips x 5 crops"),
        L_384,
        classes=600,
        window=(8, 12, 12),
        size=384,
    ),
    "ssv2_swin_b": Published(
        "swin_b",
        88_834_038,
        320.59,
        0.4,
        3e-4,
        0.05,
        ("69.6 / 92.7 at 1 clip x 3 crops",),
        "models:/k400_swin_b_w1677@champion",
        classes=174,
        window=(16, 7, 7),
    ),
}
ABSENT: dict[str, Any] = {  # what a recipe means by saying nothing of it
    "run.seed": 0,
    "run.fresh": False,
    "model.init": None,
    "model.init_ema": False,
    "model.inflate_embedding": "inflate",
    "model.inflate_bias": "duplicate",
    "model.inflate_noise": 0.0,
    "model.patch_size": None,
    "model.window_size": None,
    "model.drop_path_rate": 0.1,
    "model.head_dropout": 0.5,
    "model.attention_design": "joint",
    "model.shift": "3d",
    "model.bias_index": "offset",
    "model.gradient_checkpointing": "none",
    "model.compile": False,
    "model.attention_kernel": "auto",
    "data.val": None,
    "data.sampling": None,
    "data.frames": 32,
    "data.stride": 2,
    "data.size": 224,
    "data.short_side": 256,
    "data.crop_scale": [0.08, 1.0],
    "data.crop_ratio": [0.75, 1.3333],
    "data.flip": 0.5,
    "data.flip_labels": "mirror",
    "data.rand_augment_ops": 0,
    "data.rand_augment_magnitude": 7,
    "data.erasing": 0.0,
    "data.mixup": 0.0,
    "data.cutmix": 0.0,
    "data.subset": 1.0,
    "data.classes": None,
    "data.balance": "none",
    "data.repeats": 1,
    "data.mean": [123.675, 116.28, 103.53],
    "data.std": [58.395, 57.12, 57.375],
    "data.workers": 2,
    "data.prefetch": 4,
    "data.pixel_format": "rgb",
    "data.cache_gb": 0.0,
    "data.max_bad_samples": 0.01,
    "training.workers": 2,
    "training.min_workers": None,
    "training.use_gpu": False,
    "training.cpus_per_worker": 1.0,
    "training.epochs": 30,
    "training.max_steps": None,
    "training.global_batch": 64,
    "training.micro_batch": 1,
    "training.zero_stage": 1,
    "training.precision": "bf16",
    "training.deterministic": False,
    "training.checkpoint_every": None,
    "training.keep_checkpoints": 2,
    "training.max_failures": 3,
    "training.grace_s": 30.0,
    "optim.lr": 1e-3,
    "optim.backbone_ratio": 0.1,
    "optim.param_groups": "clean",
    "optim.weight_decay": 0.05,
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.warmup_epochs": 2.5,
    "optim.warmup_start": 0.1,
    "optim.schedule": "step",
    "optim.gradient_clipping": 0.0,
    "optim.label_smoothing": 0.0,
    "evaluation.every_epochs": 1,
    "evaluation.clips": 1,
    "evaluation.crops": 1,
    "evaluation.batch": 8,
    "tracking.uri": None,
    "tracking.experiment": "vswin",
    "tracking.register_as": None,
    "storage.root": None,
    "storage.s3_endpoint": None,
}
ON_A_GPU: dict[str, Any] = {
    "data.workers": 8,
    "training.use_gpu": True,
    "training.cpus_per_worker": 10.0,
    "training.micro_batch": 8,
}
OF_ALL: dict[str, Any] = {  # the same in every published training
    "model.bias_index": "official",
    "training.workers": 8,
    "optim.param_groups": "official",
    "optim.schedule": "epoch",
}
OF_KINETICS: dict[str, Any] = {"data.sampling": "dense", "data.flip_labels": "keep"}
OF_SSV2: dict[str, Any] = {
    "data.sampling": "uniform",
    "data.flip": 0.0,
    "data.rand_augment_ops": 4,
    "data.erasing": 0.25,
    "optim.label_smoothing": 0.1,
    "training.epochs": 60,
}
OF_LARGE: dict[str, Any] = {"training.zero_stage": 2}
AT_384: dict[str, Any] = {
    "data.size": 384,
    "data.short_side": 439,
    "training.micro_batch": 4,
    "evaluation.batch": 4,
    "model.gradient_checkpointing": "block",
}
OWN: dict[str, dict[str, Any]] = {  # this project's recipes
    "demo": {
        "model.name": "swin_nano",
        "model.patch_size": [4, 4, 4],
        "model.inflate_noise": 1.0,
        "model.drop_path_rate": 0.0,
        "model.head_dropout": 0.0,
        "data.sampling": "dense",
        "data.frames": 16,
        "data.stride": 1,
        "data.size": 32,
        "data.short_side": 32,
        "data.crop_scale": [0.7, 1.0],
        "data.crop_ratio": [0.8, 1.25],
        "data.flip": 0.0,
        "data.workers": 0,
        "training.epochs": 6,
        "training.global_batch": 16,
        "training.micro_batch": 8,
        "training.zero_stage": 2,
        "training.precision": "fp32",
        "optim.backbone_ratio": 1.0,
        "optim.weight_decay": 0.02,
        "optim.warmup_epochs": 1.5,
        "optim.gradient_clipping": 1.0,
        "evaluation.every_epochs": 4,
        "evaluation.batch": 32,
    },
    "finetune": ON_A_GPU
    | {
        "model.name": "swin_t",
        "model.drop_path_rate": 0.2,
        "data.crop_scale": [0.3, 1.0],
        "data.rand_augment_ops": 2,
        "data.erasing": 0.25,
        "training.workers": 1,
        "training.global_batch": 32,
        "training.micro_batch": 16,
        "optim.lr": 5e-4,
        "optim.gradient_clipping": 1.0,
        "optim.label_smoothing": 0.1,
    },
}
FILES = [*OWN, *PUBLISHED]
# What a row of an ablation changes in the recipe that it starts from.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "table4_joint": ("k400_swin_t", {}),
    "table4_split": ("k400_swin_t", {"model.attention_design": "split"}),
    "table4_factorized": ("k400_swin_t", {"model.attention_design": "factorized"}),
    "table5_dim16_window16": ("k400_swin_t", {"model.window_size": [16, 7, 7]}),
    "table5_dim8_window8": ("k400_swin_t", {"data.frames": 16, "data.stride": 4}),
    "table5_dim4_window4": ("k400_swin_t", {"data.frames": 8, "data.stride": 8, "model.window_size": [4, 7, 7]}),
    "table5_dim16_window8": ("k400_swin_t", {}),
    "table5_dim16_window4": ("k400_swin_t", {"model.window_size": [4, 7, 7]}),
    "table6_3d": ("k400_swin_t", {}),
    "table6_spatial": ("k400_swin_t", {"model.shift": "spatial"}),
    "table6_none": ("k400_swin_t", {"model.shift": "none"}),
    "table7_1k_ratio01": ("k400_swin_b", {}),
    "table7_1k_ratio1": ("k400_swin_b", {"optim.backbone_ratio": 1.0}),
    "table7_22k_ratio01": ("k400_swin_b_22k", {}),
    "table7_22k_ratio1": ("k400_swin_b_22k", {"optim.backbone_ratio": 1.0}),
    "table8_inflate": ("k400_swin_t", {}),
    "table8_centre": ("k400_swin_t", {"model.inflate_embedding": "centre"}),
    "table9_duplicate": ("k400_swin_t", {}),
    "table9_centre": ("k400_swin_t", {"model.inflate_bias": "centre"}),
}


def settings(recipe: str) -> Settings:
    return load_settings(recipe, ["data.train=/shards"])


def header(recipe: str) -> list[str]:
    return [line.removeprefix("# ") for line in recipe_text(recipe).splitlines() if line.startswith("#")]


@cache
def counts(name: str, classes: int, clip: tuple[int, int, int], overrides: tuple[tuple[str, Any], ...]) -> tuple[int, float]:
    with torch.device("meta"):
        model = models.build_model(name, num_classes=classes, **dict(overrides))
    return models.count_parameters(model), models.count_macs(model, clip, paper=True) / 1e9


def counts_of(s: Settings, classes: int = 400) -> tuple[int, float]:
    """(parameters, 10^9 MACs) of the model of `s`; each architecture is counted once."""
    without = ("drop_path_rate", "head_dropout", "bias_index", "gradient_checkpointing", "shift")  # none of these counts
    overrides = tuple((k, v) for k, v in model_overrides(s).items() if k not in without)
    return counts(s.model.name, classes, (s.data.frames, s.data.size, s.data.size), overrides)


def test_the_recipes_are_those_that_were_published() -> None:
    rows = {f"ablation_{name}" for name in CHANGES}
    assert sorted(recipe_names()) == sorted([*FILES, *rows])
    assert sorted(row.recipe for row in ROWS) == sorted(rows)


def changes_of(name: str) -> dict[str, Any]:
    """What the recipe `name` must change in `ABSENT`."""
    if name in OWN:
        return OWN[name]
    fact = PUBLISHED[name]
    changes = ON_A_GPU | OF_ALL | (OF_SSV2 if name.startswith("ssv2") else OF_KINETICS)
    if fact.model == "swin_l":
        changes |= OF_LARGE
    if fact.size == 384:
        changes |= AT_384
    return changes | {
        "model.name": fact.model,
        "model.drop_path_rate": fact.drop_path,
        "model.window_size": None if fact.window == (8, 7, 7) else list(fact.window),
        "optim.lr": fact.lr,
        "optim.weight_decay": fact.weight_decay,
    }


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_has_the_published_settings_said_or_not(name: str) -> None:
    expected = ABSENT | changes_of(name) | {"run.name": name, "data.train": "/shards"}
    found = to_flat(settings(name))
    assert {k: found[k] for k in expected} == expected
    batch = settings(name).training
    assert batch.global_batch % (batch.workers * batch.micro_batch) == 0


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_says_only_what_differs_from_the_defaults(name: str) -> None:
    said = [line.partition(":")[0] for line in recipe_text(name).splitlines() if not line.startswith("#")]
    found = to_flat(settings(name))
    needless = [key for key in said if not rule(key).required and found[key] == rule(key).default]
    assert not needless and len(said) == len(set(said)) and "data.train" not in said


def test_no_recipe_equals_another() -> None:
    """In what it sets, or in the data and the weights that its command names."""
    means = {}
    for name in FILES:
        command = re.sub(r"--recipe \S+", "", header(name)[0])
        means[name] = (to_flat(settings(name)) | {"run.name": None}, command)
    for name, mine in means.items():
        assert [other for other in means if means[other] == mine] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipes_model_has_the_published_counts(name: str) -> None:
    fact = PUBLISHED[name]
    parameters, gmacs = counts_of(settings(name), fact.classes)
    assert (parameters, round(gmacs, 2)) == (fact.parameters, fact.gmacs)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.recipe)
def test_an_ablation_differs_from_its_base_in_what_it_is_about(row: Row) -> None:
    base, changes = CHANGES[row.recipe.removeprefix("ablation_")]
    assert row.base == base and [o.partition("=")[0] for o in row.overrides] == list(changes)
    mine, before = to_flat(settings(row.recipe)), to_flat(settings(base))
    assert {k: v for k, v in mine.items() if before[k] != v} == {"run.name": row.recipe, **changes}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.recipe)
def test_an_ablation_is_its_base_with_overrides_and_its_text_alone_reproduces_it(row: Row, tmp_path: Path) -> None:
    """The text is what MLflow keeps of a run as recipe.yaml."""
    named = [f"run.name={row.recipe}", "data.train=/shards"]
    found = to_flat(settings(row.recipe))
    assert to_flat(load_settings(row.base, [*row.overrides, *named])) == found
    text = recipe_text(row.recipe)
    assert f"# {row.base} with " in text and all(f"{o.replace('=', ': ')}\n" in text for o in row.overrides)
    (tmp_path / "recipe.yaml").write_text(text)
    assert to_flat(load_settings(str(tmp_path / "recipe.yaml"), ["data.train=/shards"])) == found


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in ROWS if r.gmacs], ids=lambda r: r.recipe)
def test_an_ablations_model_has_the_published_counts(row: Row) -> None:
    parameters, gmacs = counts_of(settings(row.recipe))
    assert round(gmacs) == row.gmacs
    assert row.mparams in (None, round(parameters / 1e6, 1))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_opens_with_its_command_its_score_and_its_machines(name: str) -> None:
    lines = header(name)
    text = " ".join(lines)
    assert f"python jobs/train.py --recipe {name} " in lines[0] and "data.train=" in lines[0] and "data.val=" in lines[0]
    if name == "demo":
        return
    s = settings(name)
    assert "Not run here." in text and "model.init=" in lines[0]
    assert f"{s.training.workers} GPU" in text and f"micro-batch {s.training.micro_batch}: " in text and "GiB" in text
    if name in PUBLISHED:
        assert lines[0].endswith((f"model.init={PUBLISHED[name].start}", f"model.init=s3://BUCKET/{PUBLISHED[name].start}"))
        assert all(score in text for score in PUBLISHED[name].scores)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.recipe)
def test_an_ablation_names_its_table_and_score(row: Row) -> None:
    text = " ".join(header(row.recipe))
    assert f"Table {row.table}, " in text and f": {row.top1} / {row.top5}" in text and "4 clips x 3 crops" in text
    assert "22k" not in header(row.recipe)[0] or row.label.startswith("22k")
