"""A model says what each of its parameters is to an optimizer: part, depth and kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vswin_dist.models import ParameterRole, VideoSwin, build_model


def meta(name: str, **settings: Any) -> VideoSwin:
    with torch.device("meta"):
        return build_model(name, **settings)


@pytest.mark.parametrize("design", ["joint", "split", "factorized"])
def test_every_parameter_has_a_role_in_the_order_of_the_model(design: str) -> None:
    model = meta("swin_nano", attention_design=design)
    assert list(model.parameter_roles()) == [name for name, _ in model.named_parameters()]


def test_depths_of_swin_t_count_its_blocks() -> None:
    """Stages of 2, 2, 6 and 2 blocks: 1 to 12 between the patch embedding and the head."""
    roles = meta("swin_t").parameter_roles()
    for stage, depths in enumerate([(1, 2), (3, 4), (5, 6, 7, 8, 9, 10), (11, 12)]):
        for block, depth in enumerate(depths):
            found = {r.depth for n, r in roles.items() if n.startswith(f"layers.{stage}.blocks.{block}.")}
            assert found == {depth}, (stage, block)
    others = {
        "patch_embed.proj.weight": 0,
        "patch_embed.norm.bias": 0,
        "layers.0.downsample.reduction.weight": 2,  # as the block before it
        "layers.2.downsample.norm.weight": 10,
        "norm.weight": 12,
        "head.weight": 13,
        "head.bias": 13,
    }
    assert {name: roles[name].depth for name in others} == others


@pytest.mark.parametrize(("design", "last"), [("joint", 7), ("split", 9), ("factorized", 7)])
def test_depth_rises_by_one_from_the_patches_to_the_head_alone(design: str, last: int) -> None:
    roles = list(meta("swin_nano", attention_design=design).parameter_roles().values())
    depths = [role.depth for role in roles]
    assert depths == sorted(depths) and set(depths) == set(range(last + 1))
    assert {role.depth for role in roles if role.part == "head"} == {last}
    assert last not in {role.depth for role in roles if role.part == "backbone"}


@pytest.mark.parametrize("design", ["joint", "split", "factorized"])
def test_kinds_are_those_of_the_modules(design: str) -> None:
    model = meta("swin_nano", attention_design=design)
    roles = model.parameter_roles()
    by_kind = {kind: {n for n, r in roles.items() if r.kind == kind} for kind in ("weight", "bias", "norm", "bias_table")}
    modules = dict(model.named_modules())
    norms = {n for n, m in modules.items() if isinstance(m, nn.LayerNorm)}
    assert by_kind["norm"] == {f"{n}.{part}" for n in norms for part in ("weight", "bias")}
    attentions = {"joint": 6, "split": 8, "factorized": 12}[design]
    assert len(by_kind["bias_table"]) == attentions
    assert all(n.endswith(".relative_position_bias_table") for n in by_kind["bias_table"])
    products = {n for n, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv3d))}
    assert by_kind["weight"] == {f"{n}.weight" for n in products}
    assert {n for n in by_kind["bias"] if not n.endswith(".bias")} == {n for n in roles if n.endswith(".temporal.gain")}


def test_a_role_of_each_sort() -> None:
    roles = meta("swin_t", attention_design="factorized").parameter_roles()
    block = "layers.2.blocks.5"
    assert roles["head.weight"] == ParameterRole("head", 13, "weight")
    assert roles["head.bias"] == ParameterRole("head", 13, "bias")
    assert roles[f"{block}.norm1.bias"] == ParameterRole("backbone", 10, "norm")
    assert roles[f"{block}.attn.qkv.bias"] == ParameterRole("backbone", 10, "bias")
    assert roles[f"{block}.temporal.relative_position_bias_table"] == ParameterRole("backbone", 10, "bias_table")
    assert roles[f"{block}.temporal.gain"] == ParameterRole("backbone", 10, "bias")
    assert roles["norm.weight"] == ParameterRole("backbone", 12, "norm")
