"""Mixup, cutmix, soft targets and the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vswin_dist.config.schema import DataSettings
from vswin_dist.data.transforms import mixing
from vswin_dist.errors import ConfigError

K, SEED = 5, 3
NONE = DataSettings(train="")
MIXUP = DataSettings(train="", mixup=0.8)
CUTMIX = DataSettings(train="", cutmix=1.0)
BOTH = DataSettings(train="", mixup=0.8, cutmix=1.0)


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 2, 12, 20, generator=generator), torch.randint(0, K, (size,), generator=generator)


@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 16), (1, 2), (2, 8), (2, 4), (4, 2), (8, 2)])
def test_ranks_and_micro_batches_change_nothing(settings: DataSettings, world_size: int, micro: int) -> None:
    clips, labels = batch()
    whole = mixing.mix(clips, labels, K, settings, SEED, 7, 0)
    part = 16 // world_size
    parts = [
        mixing.mix(clips[p : p + micro], labels[p : p + micro], K, settings, SEED, 7, p)
        for rank in range(world_size)
        for p in range(rank * part, (rank + 1) * part, micro)
    ]
    assert torch.equal(torch.cat([c for c, _ in parts]), whole[0])
    assert torch.equal(torch.cat([t for _, t in parts]), whole[1])
    assert not torch.equal(mixing.mix(clips, labels, K, settings, SEED, 8, 0)[0], whole[0])
    assert not torch.equal(mixing.mix(clips, labels, K, settings, SEED + 1, 7, 0)[0], whole[0])


def test_mixup_is_the_weighted_mean_of_neighbours() -> None:
    clips, labels = batch(4)
    mixed, targets = mixing.mix(clips, labels, K, MIXUP, SEED, 0, 6)
    one_hot = torch.eye(K)[labels]
    for i, partner, pair in ((0, 1, 3), (1, 0, 3), (2, 3, 4), (3, 2, 4)):
        own = mixing.draw_pair(MIXUP, 12, 20, SEED, 0, pair).own
        assert 0 < own < 1
        assert torch.allclose(mixed[i], own * clips[i] + (1 - own) * clips[partner], atol=1e-6)
        assert torch.allclose(targets[i], own * one_hot[i] + (1 - own) * one_hot[partner], atol=1e-6)


def test_cutmix_takes_a_box_of_all_frames_and_its_fraction_of_the_target() -> None:
    clips, labels = torch.stack([torch.full((3, 2, 12, 20), float(i)) for i in range(8)]), torch.arange(8)
    mixed, targets = mixing.mix(clips, labels, 8, CUTMIX, SEED, 0, 0)
    for i in range(8):
        from_partner = mixed[i] == (i ^ 1)
        assert torch.equal(from_partner | (mixed[i] == i), torch.ones_like(from_partner))
        assert (from_partner == from_partner[0, 0]).all(), "another box in another frame or channel"
        assert targets[i, i ^ 1].item() == pytest.approx(from_partner[0, 0].double().mean().item(), abs=1e-6)
        assert targets[i].sum().item() == pytest.approx(1)
    assert 0 < targets[0::2, 1::2].diagonal().mean() < 1


def test_boxes_are_inside_and_fractions_follow_the_distribution() -> None:
    drawn = [mixing.draw_pair(BOTH, 224, 224, 0, step, 0) for step in range(2000)]
    boxes = [p.box for p in drawn if p.box]
    assert 900 < len(boxes) < 1100
    assert all(0 <= t <= b <= 224 and 0 <= x <= r <= 224 for t, b, x, r in boxes)
    mixup = torch.tensor([p.own for p in drawn if not p.box])
    assert mixup.mean().item() == pytest.approx(0.5, abs=0.03)
    assert mixup.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(0.8, 0.8)


def test_hard_targets_stay_what_they_were() -> None:
    clips, labels = batch()
    assert mixing.mix(clips, labels, K, NONE, SEED, 0, 0) == (clips, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_soft_targets_is_that_of_hard_ones(smoothing: float) -> None:
    logits, labels = torch.randn(16, K, generator=torch.Generator().manual_seed(1)), batch()[1]
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.equal(mixing.cross_entropy(logits, labels, smoothing), expected)
    soft = mixing.cross_entropy(logits, F.one_hot(labels, K).float(), smoothing)
    assert soft.item() == pytest.approx(expected.item(), abs=1e-6)


def test_smoothing_and_mixing_combine() -> None:
    clips, labels = batch()
    targets = mixing.mix(clips, labels, K, MIXUP, SEED, 0, 0)[1]
    logits = torch.randn(16, K, generator=torch.Generator().manual_seed(1))
    by_hand = -((0.9 * targets + 0.1 / K) * logits.log_softmax(1)).sum(1).mean()
    assert mixing.cross_entropy(logits, targets, 0.1).item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_an_odd_micro_batch_is_refused_where_clips_are_mixed() -> None:
    mixing.check_pairs(NONE, 3)
    mixing.check_pairs(BOTH, 4)
    with pytest.raises(ConfigError, match=r"training.micro_batch=3 is odd, and data.mixup=0.8, data.cutmix=0 mix"):
        mixing.check_pairs(MIXUP, 3)
