"""Clips are functions of (seed, epoch, sample); damage is found; evaluation counts what it cannot read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vswin_dist.config import load_settings
from vswin_dist.data import loader
from vswin_dist.data.loader import TestClips, TrainClips, train_batches
from vswin_dist.data.plan import Plan
from vswin_dist.data.transforms import to_rgb
from vswin_dist.errors import DataError
from vswin_dist.evaluation.evaluate import Rank, Views, evaluate
from vswin_dist.manifest import Manifest, read_manifest


def settings(shards: Path, *overrides: str):
    return load_settings("demo", [f"data.train={shards}/train", f"data.val={shards}/val", "data.workers=0", *overrides]).data


def test_a_clip_depends_on_seed_epoch_and_sample_alone(motion_shards: Path) -> None:
    s, manifest = settings(motion_shards), read_manifest(str(motion_shards / "train"))
    clips = TrainClips(manifest, s.train, s, seed=0)
    clip, label, index = clips[(1, 5)]
    assert clip.shape == (3, 16, 32, 32) and clip.dtype == torch.uint8
    assert (label, index) == (manifest.samples[5].class_id, 5)
    assert torch.equal(clip, TrainClips(manifest, s.train, s, seed=0)[(1, 5)][0])
    assert not torch.equal(clip, clips[(2, 5)][0])
    assert not torch.equal(clip, TrainClips(manifest, s.train, s, seed=1)[(1, 5)][0])


def test_worker_processes_change_nothing_and_any_step_can_be_first(motion_shards: Path) -> None:
    s, manifest = settings(motion_shards), read_manifest(str(motion_shards / "train"))
    plan = Plan(manifest.fingerprint, len(manifest.samples), 0, 16)
    here = list(train_batches(manifest, s, plan, range(2, 5), 1, 2, 4))
    there = list(train_batches(manifest, replace(s, workers=2), plan, range(2, 5), 1, 2, 4))
    assert len(here) == len(there) == 6
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a["clips"], b["clips"]) and torch.equal(a["indices"], b["indices"])


def damaged(shards: Path, folder: Path) -> tuple[Manifest, str]:
    """The validation set with the bytes of sample 3 flipped."""
    shutil.copytree(shards / "val", folder / "val")
    manifest = read_manifest(str(folder / "val"))
    sample = manifest.samples[3]
    path = folder / "val" / manifest.shards[sample.shard].url
    data = bytearray(path.read_bytes())
    data[sample.offset + sample.size // 2] ^= 0xFF
    path.write_bytes(data)
    return manifest, str(folder / "val")


def test_damage_stops_training_and_is_counted_in_evaluation(motion_shards: Path, tmp_path: Path) -> None:
    manifest, url = damaged(motion_shards, tmp_path)
    s = replace(settings(motion_shards), train=url)
    with pytest.raises(DataError, match=f"sample '{manifest.samples[3].key}' at offset .* is damaged"):
        TrainClips(manifest, url, s, seed=0)[(0, 3)]
    batch = next(iter(loader.test_batches(manifest, url, s, [[2, 3, 4]], 2, 3)))
    assert batch["views"].shape == (2, 6, 3, 16, 32, 32) and batch["indices"].tolist() == [2, 4]
    assert [i for i, _ in batch["missing"]] == [3]

    def forward(clips: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(clips), 6) + torch.arange(6)

    scores = evaluate(forward, manifest, url, s, Views(2, 3, 8), Rank(0, 1, torch.device("cpu")), torch.float32)
    assert (scores.expected, scores.scored) == (12, 11)
    assert [key for key, _ in scores.missing] == [manifest.samples[3].key]
    assert scores.top1 == pytest.approx(100 * sum(x.class_id == 5 for i, x in enumerate(manifest.samples) if i != 3) / 11)


@pytest.mark.parametrize("form", ["rgb", "yuv"])
def test_frames_in_random_order_are_the_same_frames(motion_shards: Path, form: str) -> None:
    s, manifest = settings(motion_shards, f"data.pixel_format={form}"), read_manifest(str(motion_shards / "val"))
    ordered, shuffled = (to_rgb(TestClips(manifest, s.val, s, 1, 1, x)[0][0]) for x in (False, True))
    assert not torch.equal(ordered, shuffled)
    sums = [sorted(v[0].float().sum((0, 2, 3)).tolist()) for v in (ordered, shuffled)]
    assert sums[0] == sums[1]
