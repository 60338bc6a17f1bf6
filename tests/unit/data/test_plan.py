"""The order of global batches: exactly once, balanced, and independent of the number of ranks."""

import pickle
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vswin_dist.config.schema import DataSettings
from vswin_dist.data.plan import Plan, check_batch, evaluation_batches, fitting_world_sizes, make_plan, validation_set
from vswin_dist.errors import ConfigError
from vswin_dist.manifest import Manifest, Sample, Shard, write_manifest
from vswin_dist.randomness import named_rng

WORLD_SIZES = (1, 2, 4, 64, 4096)


def plan(samples: int = 103, batch: int = 16, seed: int = 0) -> Plan:
    return Plan("f" * 32, samples, seed, batch)


def manifest(*sizes: int) -> Manifest:
    """`sizes[c]` samples of class `c0`, `c1`, ..., one class after the other."""
    labels = [c for c, n in enumerate(sizes) for _ in range(n)]
    samples = [Sample(f"k{i}", c, 0, i, 1, 0, "mp4", 9, 1.0, 9.0, 8, 8, "") for i, c in enumerate(labels)]
    return Manifest(
        "m",
        "train",
        [f"c{c}" for c in range(len(sizes))],
        {},
        [Shard("0.tar", 1, "", len(labels))],
        samples,
        [],
        len(labels),
    )


def options(**values: object) -> DataSettings:
    return replace(DataSettings("train"), **values)


def test_an_epoch_has_each_sample_once_but_for_the_remainder() -> None:
    p = plan()
    assert (p.steps_per_epoch, p.left_out) == (6, 7)
    for epoch in range(3):
        seen = np.concatenate([p.batch(epoch * 6 + i).samples for i in range(6)])
        assert len(set(seen.tolist())) == 96
        assert set(seen) | set(p.order(epoch)[96:]) == set(range(103))


def test_the_order_is_that_of_earlier_releases() -> None:
    """A training run that was begun before resumes in the same order."""
    assert plan().order(0)[:8].tolist() == [72, 4, 0, 64, 57, 74, 52, 30]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_together_read_the_global_batch_in_order(world_size: int) -> None:
    p = plan(13_000, 4096)
    assert (p.steps_per_epoch, p.left_out) == (3, 712)
    for step in (0, 2, 3, 7):
        parts = [p.rank_batch(step, r, world_size) for r in range(world_size)]
        assert {len(x.samples) for x in parts} == {4096 // world_size}
        assert np.array_equal(np.concatenate([x.samples for x in parts]), p.batch(step).samples)
        assert {x.epoch for x in parts} == {step // 3}


def test_changes_of_the_world_size_in_mid_epoch_lose_and_repeat_nothing() -> None:
    p = plan(20 * 4096 + 5, 4096)
    world_sizes = [WORLD_SIZES[i] for i in np.random.default_rng(0).integers(len(WORLD_SIZES), size=20)]
    seen = np.concatenate(
        [p.rank_batch(step, r, world_size).samples for step, world_size in enumerate(world_sizes) for r in range(world_size)]
    )
    assert set(world_sizes) == set(WORLD_SIZES)
    assert np.array_equal(seen, p.order(0)[:-5]) and len(np.unique(seen)) == 20 * 4096
    assert np.array_equal(p.epoch_steps(0).samples.ravel(), seen)


def test_micro_batches_start_at_any_step() -> None:
    p = plan()
    whole = list(p.micro_batches(range(12), 1, 2, 4))
    assert whole[2 * 5 :] == list(p.micro_batches(range(5, 12), 1, 2, 4))
    assert all(len(b) == 4 for b in whole) and len(whole) == 24
    assert [o.position for o in whole[2] + whole[3]] == list(range(8, 16)) and whole[2][0].step == 1


def test_the_order_depends_on_data_seed_and_epoch() -> None:
    orders = [plan().order(0), plan().order(1), plan(seed=1).order(0), Plan("e" * 32, 103, 0, 16).order(0)]
    assert len({o.tobytes() for o in orders}) == 4
    assert np.array_equal(plan().order(0), plan(batch=8).order(0))


def test_a_subset_is_fixed_has_all_classes_and_grows_with_its_fraction() -> None:
    m = manifest(40, 8, 1)
    pools = [make_plan(m, options(subset=s), 0, 4).pool for s in (0.1, 0.5)]
    assert [np.bincount([m.samples[i].class_id for i in p]).tolist() for p in pools] == [[4, 1, 1], [20, 4, 1]]
    assert set(pools[0]) < set(pools[1])
    assert set(pools[0]) != set(make_plan(m, options(subset=0.1), 1, 4).pool)
    p = make_plan(m, options(subset=0.5), 0, 4)
    assert (p.epoch_samples, p.steps_per_epoch, p.left_out) == (25, 6, 1)
    for epoch in (0, 3):
        assert sorted(p.order(epoch)) == list(pools[1])
    assert p.order(0).tolist() != p.order(1).tolist()


def test_classes_are_chosen_by_name() -> None:
    p = make_plan(manifest(5, 9, 7), options(classes=("c2", "c0")), 0, 4)
    assert sorted(p.order(0)) == [*range(5), *range(14, 21)]
    with pytest.raises(ConfigError, match=r"data.classes names 'c22', which is not a class of train. Did you mean 'c2'\?"):
        make_plan(manifest(5, 9, 7), options(classes=("c22",)), 0, 4)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_balanced_classes_come_equally_often_in_every_batch(world_size: int) -> None:
    m = manifest(9000, 1200, 37)
    p = make_plan(m, options(balance="class"), 0, 4096)
    labels = np.array([s.class_id for s in m.samples])
    for step in range(2 * p.steps_per_epoch):
        parts = [p.rank_batch(step, r, world_size).samples for r in range(world_size)]
        counts = np.bincount(labels[np.concatenate(parts)], minlength=3)
        assert np.ptp(counts) <= 2, counts
    times = Counter(p.order(0).tolist())
    for label in range(3):  # within a class, no sample occurs twice more than another
        counts = [times[i] for i in np.flatnonzero(labels == label)]
        assert max(counts) - min(counts) <= 1
    found = [o for batch in p.micro_batches(range(p.steps_per_epoch), 0, 1, 64) for o in batch]
    assert len({p.occurrence_number(o) for o in found}) == len(found), "two occurrences of an epoch would look the same"
    assert all(p.sample_and_copy(p.occurrence_number(o)) == (o.sample, o.copy) for o in found)


def test_repeated_samples_share_their_batch_and_differ_in_their_copy() -> None:
    p = make_plan(manifest(30, 20), options(repeats=4), 0, 16)
    assert (p.steps_per_epoch, p.left_out) == (12, 2)
    seen: Counter[int] = Counter()
    for step in range(12):
        _, samples, copies = p.batch(step)
        assert len(set(zip(samples.tolist(), copies.tolist(), strict=True))) == 16
        assert set(Counter(samples.tolist()).values()) == {4} and set(copies) == {0, 1, 2, 3}
        assert all(a != b for a, b in zip(samples, np.roll(samples, 1), strict=True))
        seen.update(samples.tolist())
    assert len(seen) == 48 and set(seen.values()) == {4}
    assert np.array_equal(p.epoch_steps(0).samples[5], p.batch(5).samples)
    assert np.array_equal(p.epoch_steps(0).copies[5], p.batch(5).copies)


def test_options_are_part_of_the_identity() -> None:
    m = manifest(30, 20)
    plans = [
        make_plan(m, options(**o), 0, 8)
        for o in ({}, {"subset": 0.5}, {"classes": ("c0",)}, {"balance": "class"}, {"repeats": 2})
    ]
    assert len({str(p.identity) for p in plans}) == 5
    assert plans[0].identity == make_plan(m, options(), 0, 8).identity


@pytest.mark.parametrize(
    ("world_size", "micro", "message"),
    [
        (32, 1, "training.workers=32 is more than the 16 samples"),
        (3, 1, "does not divide by training.workers=3: 1 samples would be left. Nearest number of workers: 2"),
        (2, 3, "does not divide by training.micro_batch=3. Nearest: 2"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_numbers(world_size: int, micro: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_batch(16, world_size, micro)
    assert message in str(error.value)


def test_an_elastic_run_skips_the_world_sizes_that_do_not_divide() -> None:
    assert fitting_world_sizes(48, 1, 16, 2) == {1: 24, 2: 12, 3: 8, 4: 6, 6: 4, 8: 3, 12: 2}  # 16: 3 of each rank, in twos
    assert fitting_world_sizes(48, 5, 7, 1) == {6: 8}
    with pytest.raises(ConfigError, match=r"does not divide by training.workers=11: 4 samples would be left"):
        fitting_world_sizes(48, 9, 11, 1)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 samples, fewer than one global batch of 16"):
        plan(samples=10)
    with pytest.raises(ConfigError, match=r"training.global_batch=16 does not divide by data.repeats=3"):
        make_plan(manifest(50), options(repeats=3), 0, 16)
    with pytest.raises(ConfigError, match=r"data.subset=0.0: expected more than 0"):
        make_plan(manifest(50), options(subset=0.0), 0, 16)


def test_a_large_order_is_held_once_by_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWIN_CACHE", str(tmp_path))
    labels = np.repeat(np.arange(3), [900, 90, 10])
    for number, more in enumerate(({}, {"pool": np.arange(0, 1000, 2)}, {"balanced": labels})):
        alone, together = (Plan(f"f{number}", 1000, 0, 16, **more) for _ in range(2))
        expected = alone.epoch_steps(1)
        monkeypatch.setattr("vswin_dist.data.plan.SHARED_FROM", 100)
        sent = pickle.dumps(together)
        assert len(sent) < 500, "the arrays are sent by name"
        for plan in (together, pickle.loads(sent)):
            assert plan.identity == alone.identity
            for found, wanted in zip(plan.epoch_steps(1), expected, strict=True):
                assert np.array_equal(found, wanted)
        monkeypatch.undo()
        monkeypatch.setenv("VSWIN_CACHE", str(tmp_path))
    assert len(list((tmp_path / "orders").glob("*.safetensors"))) == 3


def test_a_large_order_is_there_before_its_epoch_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWIN_CACHE", str(tmp_path))
    monkeypatch.setattr("vswin_dist.data.plan.SHARED_FROM", 100)
    p = Plan("ahead", 160, 0, 16)  # ten steps an epoch

    def made() -> int:
        for thread in threading.enumerate():
            if thread.name == "next-order":
                thread.join(60)
        return len(list((tmp_path / "orders").glob("*.safetensors")))

    batches = p.micro_batches(range(20), 0, 1, 16)
    found = [(next(batches), made())[1] for _ in range(20)]
    assert found == [1] * 5 + [2] * 15, "the last epoch has none after it"


def test_an_order_is_numpys_permutation() -> None:
    expected = named_rng("fp/5/2").permutation(1000)  # what an epoch's order has been from the start
    assert np.array_equal(Plan("fp", 1000, 5, 16).order(2), expected)
    pool = np.arange(0, 1000, 3)
    assert np.array_equal(Plan("fp", 1000, 5, 16, pool=pool).order(2), pool[named_rng("fp/5/2").permutation(len(pool))])


def test_the_order_of_a_large_epoch_is_that_of_its_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Plan("fp", 1000, 5, 16).identity
    assert "order" not in small, "what was begun before goes on"
    monkeypatch.setattr("vswin_dist.data.plan.SORTED_FROM", 300)
    draws = named_rng("fp/5/2").integers(0, 2**64 - 1, 1000, np.uint64, endpoint=True)
    expected = sorted(range(1000), key=lambda i: (int(draws[i]) >> 10, i))  # ten bits hold the numbers
    large = Plan("fp", 1000, 5, 16)
    assert large.order(2).tolist() == expected and large.order(2).dtype == np.int32
    pool = np.arange(0, 1000, 3)
    assert sorted(Plan("fp", 1000, 5, 16, pool=pool).order(2).tolist()) == pool.tolist()
    assert large.order(3).tolist() != expected, "each epoch has its own"
    assert large.identity == small | {"order": "sorted"}, "another order is another plan"
    assert "order" not in Plan("fp", 1000, 5, 16, balanced=np.arange(1000) % 7).identity


@pytest.mark.parametrize(("samples", "world_size", "batch"), [(10, 1, 4), (10, 3, 2), (1, 4, 8), (9, 2, 9)])
def test_evaluation_gives_every_sample_to_one_rank_in_equal_rounds(samples: int, world_size: int, batch: int) -> None:
    parts = [evaluation_batches(samples, r, world_size, batch) for r in range(world_size)]
    assert sorted(i for batches, _ in parts for b in batches for i in b) == list(range(samples))
    assert len({rounds for _, rounds in parts}) == 1
    assert max(len(batches) for batches, _ in parts) == parts[0][1]


def test_the_neighbours_of_a_sample_in_evaluation_do_not_depend_on_the_ranks() -> None:
    def neighbours(world_size: int) -> list[range]:
        return sorted((b for r in range(world_size) for b in evaluation_batches(22, r, world_size, 5)[0]), key=min)

    alone = [range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 22)]
    assert [neighbours(w) for w in (1, 2, 3, 7)] == [alone] * 4
    left = [evaluation_batches(22, r, 2, 5, todo=[1, 3, 4]) for r in range(2)]
    assert [(list(batches), rounds) for batches, rounds in left] == [([alone[1], alone[4]], 2), ([alone[3]], 2)]


def test_validation_is_of_the_classes_that_are_trained(tmp_path: Path) -> None:
    write_manifest(manifest(3, 2, 4), str(tmp_path))
    data = options(val=str(tmp_path))
    for classes, expected in ((None, range(9)), (("c2", "c0"), [0, 1, 2, 5, 6, 7, 8])):
        found = validation_set(replace(data, classes=classes))
        assert found and [s.key for s in found.samples] == [f"k{i}" for i in expected]
        assert found.classes == ["c0", "c1", "c2"], "the head keeps its classes"
    with pytest.raises(ConfigError, match=r"has no video of data.classes=\['c3'\]"):
        validation_set(replace(data, classes=("c3",)))
    assert validation_set(options()) is None
