"""Clips are functions of (seed, epoch, sample); any step can be first; corrupt samples are replaced, damage stops."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.shards import with_corrupt_videos, with_damaged_storage
from vswin_dist import storage
from vswin_dist.config import load_settings
from vswin_dist.config.schema import DataSettings
from vswin_dist.data import loader as feeding
from vswin_dist.data.loader import Batch, TrainLoader
from vswin_dist.data.plan import Plan, make_plan
from vswin_dist.data.transforms.normalise import to_rgb
from vswin_dist.data.transforms.resample import crops_to_rgb
from vswin_dist.device import Rank
from vswin_dist.errors import CheckpointError, DataError
from vswin_dist.evaluation.evaluate import Views, evaluate
from vswin_dist.manifest import Manifest, read_manifest

CPU = torch.device("cpu")


def settings(shards: Path, *overrides: str):
    return load_settings("demo", [f"data.train={shards}/train", f"data.val={shards}/val", "data.workers=0", *overrides]).data


def loader(shards: Path, *overrides: str, rank: int = 0, world_size: int = 1, micro: int = 4, last: int = 5, seed: int = 0):
    s = settings(shards, *overrides)
    manifest = read_manifest(s.train)
    return TrainLoader(manifest, s, make_plan(manifest, s, seed, 16), Rank(rank, world_size, CPU), micro, last)


@pytest.fixture(scope="module")
def whole(motion_shards: Path) -> list[Batch]:
    """The micro-batches of five steps of three an epoch."""
    return list(loader(motion_shards))


def test_a_flipped_clip_has_the_mirrored_class(motion_shards: Path) -> None:
    """The shards' classes: clockwise, counter-clockwise, down, left, right, up."""
    whole = ("data.crop_scale=[1,1]", "data.crop_ratio=[1,1]")
    still, numbers = join(loader(motion_shards, *whole, "data.flip=0", last=2))
    manifest = read_manifest(str(motion_shards / "train"))
    for rule, classes in (("mirror", [1, 0, 2, 4, 3, 5]), ("keep", list(range(6)))):
        batches = list(loader(motion_shards, *whole, "data.flip=1", f"data.flip_labels={rule}", last=2))
        assert torch.equal(join(batches)[0], still.flip(4))
        labels = torch.cat([b["labels"] for b in batches]).tolist()
        assert labels == [classes[manifest.samples[i].class_id] for i in numbers]
    alone = replace(manifest, classes=[c.replace("right", "east") for c in manifest.classes])  # left has no counterpart
    s = settings(motion_shards, *whole, "data.flip=1")
    batches = list(TrainLoader(alone, s, make_plan(manifest, s, 0, 16), Rank(0, 1, CPU), 4, 2))
    labels = torch.cat([b["labels"] for b in batches])
    unflipped = labels == 3
    assert unflipped.any() and torch.equal(join(batches)[0][unflipped], still[unflipped])


def test_augmentation_is_of_the_sample_and_evaluation_has_none(motion_shards: Path, whole: list[Batch]) -> None:
    strong = ("data.rand_augment_ops=4", "data.rand_augment_magnitude=30", "data.erasing=1", "data.mixup=1")
    first, again = (join(loader(motion_shards, *strong, micro=m, last=1))[0] for m in (4, 16))
    assert torch.equal(first, again)
    assert not torch.equal(first, join(whole[:4])[0])
    val, plain, s = read_manifest(str(motion_shards / "val")), settings(motion_shards), settings(motion_shards, *strong)
    views = [next(feeding.test_batches(val, s.val, one, [[0]], 2, 3))["views"] for one in (plain, s)]
    assert torch.equal(*views)


def join(batches: Iterable[Batch]) -> tuple[torch.Tensor, list[int]]:
    """All clips and sample numbers of `batches`, in order."""
    found = list(batches)
    return torch.cat([b["clips"] for b in found]), torch.cat([b["indices"] for b in found]).tolist()


def test_a_clip_depends_on_seed_epoch_and_sample_alone(motion_shards: Path, whole: list[Batch]) -> None:
    clips, numbers = join(whole)
    plan: Plan = loader(motion_shards).plan
    assert numbers[:48] == plan.epoch_steps(0).samples.ravel().tolist()
    assert clips.shape == (80, 3, 16, 32, 32) and clips.dtype == torch.uint8
    again, same = join(loader(motion_shards, micro=16, last=2))
    assert torch.equal(clips[:32], again) and numbers[:32] == same
    twice = next(i for i in numbers[48:] if i in numbers[:48])
    assert not torch.equal(clips[numbers.index(twice)], clips[48 + numbers[48:].index(twice)]), "another epoch"
    other, others = join(loader(motion_shards, seed=1, last=1))
    known = next(i for i in others if i in numbers[:48])
    assert not torch.equal(clips[numbers.index(known)], other[others.index(known)])


def test_repeated_samples_are_augmented_each_time_otherwise(motion_shards: Path) -> None:
    batch = next(iter(loader(motion_shards, "data.repeats=2", micro=16)))
    assert batch["indices"][:8].tolist() == batch["indices"][8:].tolist()
    assert not any(torch.equal(a, b) for a, b in zip(batch["clips"][:8], batch["clips"][8:], strict=True))
    assert batch["occurrences"].tolist() == [*batch["indices"][:8].tolist(), *(batch["indices"][8:] + 52).tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_the_bytes_that_a_rank_reads_are_counted(motion_shards: Path, workers: int) -> None:
    one = loader(motion_shards, f"data.workers={workers}", last=2)
    assert one.metrics == {"data/bytes_read": 0}
    _, numbers = join(one)
    sizes: dict[str, int] = {}
    for tar in (motion_shards / "train").glob("*.tar"):
        with tarfile.open(tar) as members:
            sizes |= {m.name.removesuffix(".mp4"): m.size for m in members if m.name.endswith(".mp4")}
    assert one.metrics == {"data/bytes_read": sum(sizes[one.manifest.samples[i].key] for i in numbers)}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_it_resumes_in_mid_epoch_with_the_batch_that_would_have_come(
    motion_shards: Path, whole: list[Batch], workers: int
) -> None:
    begun = loader(motion_shards, f"data.workers={workers}")
    before = list(itertools.islice(begun, 10))  # 2 steps and a half
    state = json.loads(json.dumps(begun.state_dict()))
    assert state["step"] == 2
    resumed = loader(motion_shards, f"data.workers={workers}")
    resumed.load_state_dict(state)
    for a, b in zip(whole, before[:8] + list(resumed), strict=True):
        assert torch.equal(a["clips"], b["clips"])
        assert all(torch.equal(a[k], b[k]) for k in ("labels", "indices", "occurrences"))


def test_two_ranks_then_one_then_two_read_the_same(motion_shards: Path, whole: list[Batch]) -> None:
    clips, numbers = join(whole)
    state, parts, sequence = {}, [], []
    for world_size, last in ((2, 2), (1, 4), (2, 5)):
        ranks = [loader(motion_shards, rank=r, world_size=world_size, last=last, micro=8) for r in range(world_size)]
        for one in ranks:
            one.load_state_dict(state or one.state_dict())
        for micro in zip(*ranks, strict=True):
            part, order = join(micro)
            parts.append(part)
            sequence += order
        assert len({json.dumps(one.state_dict()) for one in ranks}) == 1
        state = ranks[0].state_dict()
    assert sequence == numbers and torch.equal(torch.cat(parts), clips)


def test_a_position_of_another_order_is_refused(motion_shards: Path) -> None:
    with pytest.raises(CheckpointError, match=r"one of another plan: seed 1, not 0\. Resume with"):
        loader(motion_shards).load_state_dict(loader(motion_shards, seed=1).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_is_replaced_by_the_same_one_always(motion_shards: Path, tmp_path: Path, workers: int) -> None:
    chosen = range(0, 52, 3)  # so many that each step and each rank has some, whatever order the fingerprint gives
    with_corrupt_videos(motion_shards / "train", tmp_path / "train", chosen)
    batches = list(loader(tmp_path, f"data.workers={workers}", last=3))
    corrupt = [c for batch in batches for c in batch["corrupt"]]
    plan: Plan = loader(tmp_path).plan
    expected = [(s, p) for s in range(3) for p, i in enumerate(plan.batch(s).samples) if i in chosen]
    assert sorted({(c.step, c.position) for c in corrupt}) == expected and len({c.step for c in corrupt}) == 3
    assert {c.position // 8 for c in corrupt} == {0, 1}, "all of them on one rank"
    assert all("cannot be decoded" in c.reason for c in corrupt)
    clips, numbers = join(batches)
    assert sum(a != b for a, b in zip(numbers, plan.epoch_steps(0).samples.ravel(), strict=True)) == len(expected)
    for c in corrupt:
        assert numbers[16 * c.step + c.position] == c.substitute not in chosen
    labels = torch.cat([b["labels"] for b in batches])
    assert labels.tolist() == [read_manifest(f"{tmp_path}/train").samples[i].class_id for i in numbers]
    ranks = [list(loader(tmp_path, rank=r, world_size=2, micro=8, last=3)) for r in range(2)]
    assert torch.equal(clips, join(m for micro in zip(*ranks, strict=True) for m in micro)[0])


def test_nothing_but_corrupt_samples_stops(motion_shards: Path, tmp_path: Path) -> None:
    with_corrupt_videos(motion_shards / "train", tmp_path / "train", range(52))
    with pytest.raises(DataError, match=r"step 0, position 0: 32 videos in a row do not decode; the last: .* cannot be"):
        next(iter(loader(tmp_path)))


def test_damaged_storage_stops_training(motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    manifest = with_damaged_storage(motion_shards / "train", tmp_path / "train", 3)
    with pytest.raises(DataError) as error:
        list(loader(tmp_path))
    text = str(error.value)
    assert text.startswith(f"sample {manifest.samples[3].key!r} cannot be read: {tmp_path}/train/")
    assert "are damaged (crc32" in text and "after 5 attempts" in text
    assert text.endswith(f"run data-prep verify --repair {tmp_path}/train") and "\n" not in text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_stops_training_in_one_line(motion_shards: Path, tmp_path: Path, workers: int) -> None:
    with_corrupt_videos(motion_shards / "train", tmp_path / "train", [])
    next((tmp_path / "train").glob("*.tar")).unlink()
    with pytest.raises(
        DataError, match=r"^sample .* does not exist\. Its shard is damaged or gone: run data-prep verify"
    ) as error:
        list(loader(tmp_path, f"data.workers={workers}"))
    assert "\n" not in str(error.value)


def test_evaluation_counts_what_it_cannot_read(motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    manifest: Manifest = with_damaged_storage(motion_shards / "val", tmp_path / "val", 3)
    url, s = str(tmp_path / "val"), settings(motion_shards)
    batch = next(feeding.test_batches(manifest, url, s, [[2, 3, 4]], 2, 3))
    assert batch["views"].shape == (2, 6, 3, 16, 32, 32) and batch["indices"].tolist() == [2, 4]
    assert [i for i, _ in batch["missing"]] == [3]

    def forward(clips: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(clips), 6) + torch.arange(6)

    scores = evaluate(forward, manifest, url, s, Views(2, 3, 8), Rank(0, 1, CPU), torch.float32).scores(manifest)
    assert (scores.expected, scores.scored) == (12, 11)
    assert [key for key, _ in scores.missing] == [manifest.samples[3].key]
    assert scores.top1 == pytest.approx(100 * sum(x.class_id == 5 for i, x in enumerate(manifest.samples) if i != 3) / 11)
    there = list(feeding.test_batches(manifest, s.val, replace(s, workers=2), [[2, 3], [4], [5, 6], [7]], 1, 1))
    assert [b["indices"].tolist() for b in there] == [[2, 3], [4], [5, 6], [7]]


@pytest.mark.parametrize("form", ["rgb", "yuv"])
def test_frames_in_random_order_are_the_same_frames(motion_shards: Path, form: str) -> None:
    s, manifest = settings(motion_shards, f"data.pixel_format={form}"), read_manifest(str(motion_shards / "val"))
    batches = (next(feeding.test_batches(manifest, s.val, s, [[0]], 1, 1, shuffled)) for shuffled in (False, True))
    ordered, shuffled = (to_rgb(batch["views"][0]) for batch in batches)
    assert not torch.equal(ordered, shuffled)
    sums = [sorted(v[0].float().sum((0, 2, 3)).tolist()) for v in (ordered, shuffled)]
    assert sums[0] == sums[1]


def as_rgb(batch: Batch, s: DataSettings) -> torch.Tensor:
    return crops_to_rgb(batch["clips"], batch["crops"], s.frames, s.size)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_native_crops_are_those_of_rgb_and_resume_alike(motion_shards: Path, whole: list[Batch], workers: int) -> None:
    """The same clips with the same labels in the same order; pixels differ as each side rounds and resizes chroma."""
    native = ("data.pixel_format=native", f"data.workers={workers}")
    begun = loader(motion_shards, *native)
    before = [(batch, as_rgb(batch, begun.settings)) for batch in itertools.islice(begun, 10)]
    resumed = loader(motion_shards, *native)
    resumed.load_state_dict(begun.state_dict())
    found = before[:8] + [(batch, as_rgb(batch, begun.settings)) for batch in resumed]
    for wanted, (batch, rgb) in zip(whole, found, strict=True):
        assert all(torch.equal(wanted[k], batch[k]) for k in ("labels", "indices", "occurrences"))
        assert rgb.shape == wanted["clips"].shape and (rgb.int() - wanted["clips"].int()).abs().float().mean() < 3
    alone = loader(motion_shards, "data.pixel_format=native", micro=16, last=2)
    assert torch.equal(torch.cat([as_rgb(b, alone.settings) for b in alone]), torch.cat([rgb for _, rgb in found[:8]]))


@pytest.mark.slow
def test_native_crops_skip_corrupt_samples(motion_shards: Path, tmp_path: Path) -> None:
    with_corrupt_videos(motion_shards / "train", tmp_path / "train", range(0, 52, 3))
    rgb, native = (list(loader(tmp_path, f"data.pixel_format={form}", last=3)) for form in ("rgb", "native"))
    assert sum(len(b["corrupt"]) for b in native) > 0
    s = loader(tmp_path).settings
    for one, other in zip(rgb, native, strict=True):
        assert one["corrupt"] == other["corrupt"] and torch.equal(one["indices"], other["indices"])
        assert (one["clips"].int() - as_rgb(other, s).int()).abs().float().mean() < 3


def test_views_of_native_are_planes(motion_shards: Path) -> None:
    manifest = read_manifest(str(motion_shards / "val"))
    made = [
        next(feeding.test_batches(manifest, s.val, s, [[0, 1]], 2, 3))["views"]
        for s in (settings(motion_shards, f"data.pixel_format={form}") for form in ("yuv", "native"))
    ]
    assert torch.equal(*made)
    s = settings(motion_shards, "data.pixel_format=native")
    alone = Rank(0, 1, CPU)
    found = evaluate(lambda c: torch.zeros(len(c), 6), manifest, s.val, s, Views(1, 1, 8), alone, torch.float32)
    assert found.scores(manifest).scored == 12
