"""Parameter groups and the schedule."""

import itertools

import pytest
import torch

from vswin_dist.config.schema import OptimSettings
from vswin_dist.training.optim import learning_rate_factor, parameter_groups

OPTIM = OptimSettings(lr=1e-3, backbone_ratio=0.1, weight_decay=0.05, warmup_epochs=2.5, warmup_start=0.1)


def test_the_backbone_has_a_tenth_of_the_heads_rate_and_only_matrices_decay() -> None:
    shapes = {"patch_embed.proj.weight": (4, 3, 2, 4, 4), "patch_embed.norm.weight": (4,),
              "layers.0.blocks.0.attn.relative_position_bias_table": (9, 2), "layers.0.blocks.0.mlp.fc1.weight": (8, 4),
              "layers.0.blocks.0.mlp.fc1.bias": (8,), "head.weight": (2, 4), "head.bias": (2,)}
    groups = parameter_groups([(n, torch.empty(s)) for n, s in shapes.items()], OPTIM)
    found = {n: (g.lr_factor, g.weight_decay) for g in groups for n in g.names}
    assert found == {
        "patch_embed.proj.weight": (0.1, 0.05), "patch_embed.norm.weight": (0.1, 0.0),
        "layers.0.blocks.0.attn.relative_position_bias_table": (0.1, 0.0),
        "layers.0.blocks.0.mlp.fc1.weight": (0.1, 0.05), "layers.0.blocks.0.mlp.fc1.bias": (0.1, 0.0),
        "head.weight": (1.0, 0.05), "head.bias": (1.0, 0.0)}
    assert sum(g.elements for g in groups) == sum(torch.empty(s).numel() for s in shapes.values())


def test_warm_up_then_cosine() -> None:
    factors = [learning_rate_factor(step, 10, 30, OPTIM) for step in range(301)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[150] == pytest.approx(0.5)
    assert factors[300] == pytest.approx(0.0)
    assert max(range(301), key=factors.__getitem__) == 25
    assert all(a > b for a, b in itertools.pairwise(factors[25:]))
