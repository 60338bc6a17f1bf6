"""Parameter groups to the tensor, and the schedule's exact values."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from math import cos, inf, pi
from typing import Any

import pytest
import torch

from tests.parity.recipe import reference_folder
from vswin_dist.config.schema import OptimSettings
from vswin_dist.errors import ConfigError
from vswin_dist.models import VideoSwin, build_model
from vswin_dist.models.weights.layouts import from_native
from vswin_dist.training.optim import groups_table, learning_rate_factor, parameter_groups

OPTIM = OptimSettings(lr=1e-3, backbone_ratio=0.1, weight_decay=0.05, warmup_epochs=2.5, warmup_start=0.1)
EPOCH = replace(OPTIM, schedule="epoch")
KINDS = ("clean", "official", "mmaction2")
KEYS = {  # of the published configurations: (learning-rate factor, factor on the decay)
    "absolute_pos_embed": (1.0, 0.0),
    "relative_position_bias_table": (1.0, 0.0),
    "norm": (1.0, 0.0),
    "backbone": (0.1, 1.0),
}

# Swin-T with 400 classes: label -> (learning-rate factor, weight decay, tensors, elements). 173 tensors, 28,158,070.
# Tables: 12 blocks, 2,535 rows x 3, 6, 12 or 24 heads. Norms: 58 tensors of 24,768 elements.
SWIN_T = {
    "clean": {
        "backbone": (0.1, 0.05, 52, 27_436_032),
        "backbone_no_decay": (0.1, 0.0, 119, 414_438),
        "head": (1.0, 0.05, 1, 307_200),
        "head_no_decay": (1.0, 0.0, 1, 400),
    },
    "official": {
        "backbone": (0.1, 0.05, 159, 27_500_640),
        "bias_tables": (1.0, 0.0, 12, 349_830),
        "head": (1.0, 0.05, 2, 307_600),
    },
    "mmaction2": {
        "backbone": (0.1, 0.05, 101, 27_475_872),
        "backbone_no_decay": (0.1, 0.0, 70, 374_598),
        "head": (1.0, 0.05, 2, 307_600),
    },
}


def swin_t(**overrides: Any) -> VideoSwin:
    with torch.device("meta"):
        return build_model("swin_t", **overrides)


def grouped(kind: str, model: VideoSwin) -> dict[str, tuple[float, float]]:
    """Native name -> (learning-rate factor, weight decay)."""
    groups = parameter_groups(model, replace(OPTIM, param_groups=kind))
    return {n: (g.lr_factor, g.weight_decay) for g in groups for n in g.names}


@pytest.mark.parametrize("kind", KINDS)
def test_the_groups_of_swin_t(kind: str) -> None:
    groups = parameter_groups(swin_t(), replace(OPTIM, param_groups=kind))
    found = {g.label: (g.lr_factor, g.weight_decay, len(g.names), g.elements) for g in groups}
    assert found == SWIN_T[kind] and len(groups) == len(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("design", ["joint", "split", "factorized"])
def test_groups_and_their_names_keep_the_order_of_the_model(kind: str, design: str) -> None:
    model = swin_t(attention_design=design)
    groups = parameter_groups(model, replace(OPTIM, param_groups=kind))
    order = {name: position for position, (name, _) in enumerate(model.named_parameters())}
    positions = [[order[name] for name in group.names] for group in groups]
    assert sorted(itertools.chain(*positions)) == list(range(len(order)))
    assert all(rows == sorted(rows) for rows in positions)
    assert [rows[0] for rows in positions] == sorted(rows[0] for rows in positions)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tensor_falls_where_it_belongs(kind: str) -> None:
    found = grouped(kind, swin_t())
    block = "layers.2.blocks.5."
    expected = {  # clean, official, mmaction2
        "patch_embed.proj.weight": ((0.1, 0.05), (0.1, 0.05), (0.1, 0.05)),
        "patch_embed.proj.bias": ((0.1, 0.0), (0.1, 0.05), (0.1, 0.05)),
        "patch_embed.norm.weight": ((0.1, 0.0), (0.1, 0.05), (0.1, 0.0)),
        f"{block}norm1.bias": ((0.1, 0.0), (0.1, 0.05), (0.1, 0.0)),
        f"{block}attn.relative_position_bias_table": ((0.1, 0.0), (1.0, 0.0), (0.1, 0.0)),
        f"{block}attn.qkv.bias": ((0.1, 0.0), (0.1, 0.05), (0.1, 0.05)),
        f"{block}mlp.fc1.weight": ((0.1, 0.05), (0.1, 0.05), (0.1, 0.05)),
        "layers.0.downsample.norm.weight": ((0.1, 0.0), (0.1, 0.05), (0.1, 0.0)),
        "layers.0.downsample.reduction.weight": ((0.1, 0.05), (0.1, 0.05), (0.1, 0.05)),
        "norm.weight": ((0.1, 0.0), (0.1, 0.05), (0.1, 0.0)),
        "head.weight": ((1.0, 0.05), (1.0, 0.05), (1.0, 0.05)),
        "head.bias": ((1.0, 0.0), (1.0, 0.05), (1.0, 0.05)),
    }
    assert {n: found[n] for n in expected} == {n: by_kind[KINDS.index(kind)] for n, by_kind in expected.items()}


def by_keys(name: str, kind: str) -> tuple[float, float]:
    """What the published configurations give a tensor of that name: mmcv's rule, or mmaction2's."""
    keys = [k for k in KEYS if k in name]
    if kind == "official":
        keys = sorted(keys, key=len)[-1:]
    rate, decay = 1.0, 0.05
    for key in keys:
        rate, decay = rate * KEYS[key][0], decay * KEYS[key][1]
    return rate, decay


@pytest.mark.parametrize("kind", ["official", "mmaction2"])
@pytest.mark.parametrize("design", ["joint", "split", "factorized"])
def test_groups_are_those_of_the_published_keys(kind: str, design: str) -> None:
    for name, found in grouped(kind, swin_t(attention_design=design)).items():
        assert found == by_keys(from_native(name, "official"), kind), name


@pytest.mark.parametrize("kind", ["official", "mmaction2"])
def test_groups_are_those_of_the_published_checkpoints_names(kind: str) -> None:
    folder = reference_folder()
    if folder is None:
        pytest.skip("no reference fixtures: set VSWIN_REFERENCE")
    listed = (folder / "state_dict_keys" / "official_swin_tiny_patch244_window877_k400.txt").read_text().splitlines()
    rows = [line.split("\t") for line in listed if line.endswith("\tparam")]
    model = swin_t()
    found = {from_native(n, "official"): r for n, r in grouped(kind, model).items()}
    shapes = {from_native(n, "official"): "x".join(map(str, p.shape)) for n, p in model.named_parameters()}
    assert shapes == {name: shape for name, _, shape, _ in rows}
    assert found == {name: by_keys(name, kind) for name, *_ in rows}


def test_temporal_layers_belong_to_the_backbone() -> None:
    split, factorized = swin_t(attention_design="split"), swin_t(attention_design="factorized")
    table, gain = "temporal_layers.0.attn.relative_position_bias_table", "layers.0.blocks.0.temporal.gain"
    weight, norm = "temporal_layers.1.mlp.fc1.weight", "temporal_layers.1.norm2.weight"
    for kind, of_table, of_gain, of_norm in (
        ("clean", (0.1, 0.0), (0.1, 0.0), (0.1, 0.0)),
        ("official", (1.0, 0.0), (0.1, 0.05), (0.1, 0.05)),
        ("mmaction2", (0.1, 0.0), (0.1, 0.05), (0.1, 0.0)),
    ):
        of_split = grouped(kind, split)
        assert (of_split[table], of_split[norm], of_split[weight]) == (of_table, of_norm, (0.1, 0.05))
        assert grouped(kind, factorized)[gain] == of_gain


def test_the_table_shows_every_group() -> None:
    text = groups_table(parameter_groups(swin_t(), replace(OPTIM, param_groups="official")), 1e-3)
    assert "| bias_tables | 12 | 349,830 | 0.001 | 0 |" in text and "| backbone | 159 | 27,500,640 | 0.0001 | 0.05 |" in text


def test_layers_are_slowed_by_depth() -> None:
    """Swin-T's head has depth 13; the factors are those of timm's rule, 0.75 ** (13 - depth), times the backbone's."""
    groups = parameter_groups(swin_t(), replace(OPTIM, layer_decay=0.75, backbone_ratio=0.5))
    found = {n: g.lr_factor for g in groups for n in g.names}
    expected = {
        "patch_embed.proj.weight": 0.5 * 0.0237572807,  # 0.75 ** 13
        "layers.0.blocks.0.norm1.bias": 0.5 * 0.0316763744,  # 12
        "layers.2.blocks.5.mlp.fc1.weight": 0.5 * 0.421875,  # 3
        "norm.weight": 0.5 * 0.75,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }
    assert {n: found[n] for n in expected} == pytest.approx(expected, rel=1e-6)
    assert {g.label for g in groups if "patch_embed.proj.weight" in g.names} == {"backbone_0"}
    assert "| backbone_no_decay_12 | " in groups_table(groups, 1e-3) and "| head | 1 |" in groups_table(groups, 1e-3)
    assert len({g.label for g in groups}) == len(groups) == 2 * 13 + 2


def test_a_pattern_freezes_parameters_and_modules() -> None:
    freeze = replace(OPTIM, freeze=("patch_embed", "layers.[01].*", "norm.weight"))
    groups = parameter_groups(swin_t(), replace(freeze, freeze_epochs=2))
    frozen = {n for g in groups if g.frozen_epochs for n in g.names}
    assert {n.split(".")[0] for n in frozen} == {"patch_embed", "layers", "norm"} and "norm.bias" not in frozen
    assert {n[:8] for n in frozen if n.startswith("layers")} == {"layers.0", "layers.1"}
    assert {g.label for g in groups if g.frozen_epochs} == {"backbone_frozen", "backbone_no_decay_frozen"}
    assert "| backbone_frozen for 2 epochs |" in groups_table(groups, 1e-3)
    assert {g.frozen_epochs for g in parameter_groups(swin_t(), freeze)} == {0, inf}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("patch_embd",), "'patch_embd' matches no parameter and no module. Did you mean 'patch_embed'?"),
        (("norm", "layers.4"), "'layers.4' matches no parameter and no module. Did you mean 'layers.3'?"),
        (("*",), "leaves nothing to train: all 173 parameters match"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_all_is_refused(patterns: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parameter_groups(swin_t(), replace(OPTIM, freeze=patterns))


def test_warm_up_then_cosine() -> None:
    factors = [learning_rate_factor(step, 10, 30, OPTIM) for step in range(301)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[150] == pytest.approx(0.5)
    assert factors[300] == pytest.approx(0.0)
    assert max(range(301), key=factors.__getitem__) == 25
    assert all(a > b for a, b in itertools.pairwise(factors[25:]))


@pytest.mark.parametrize(
    ("step", "expected"),
    [  # 10 steps an epoch, 30 epochs, warm-up of 25 steps
        (0, 0.1),
        (5, 0.28),  # 0.1 + 0.9 x 5/25; the cosine of epoch 0 is 1
        (9, 0.424),
        (10, 0.46 * (1 + cos(pi / 30)) / 2),  # the warm-up goes by step, on the rate of its epoch
        (24, 0.964 * (1 + cos(pi / 15)) / 2),
        (25, 0.9890738003669028),  # (1 + cos 12 degrees) / 2
        (29, 0.9890738003669028),
        (30, 0.9755282581475768),  # (1 + cos 18 degrees) / 2
        (150, 0.5),
        (159, 0.5),
        (299, 0.0027390523158633),  # (1 - cos 6 degrees) / 2: the published schedule does not reach 0
    ],
)
def test_the_published_schedule(step: int, expected: float) -> None:
    assert learning_rate_factor(step, 10, 30, EPOCH) == pytest.approx(expected, rel=1e-12)


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate_factor(0, 10, 30, replace(EPOCH, warmup_epochs=0.0)) == 1.0
