"""The order of global batches: exactly once, and independent of the number of ranks."""

import numpy as np
import pytest

from vswin_dist.data.plan import Plan, check_batch, rank_share
from vswin_dist.errors import ConfigError


def plan(samples: int = 103, batch: int = 16, seed: int = 0) -> Plan:
    return Plan("f" * 32, samples, seed, batch)


def test_an_epoch_has_each_sample_once_but_for_the_remainder() -> None:
    p = plan()
    assert (p.steps_per_epoch, p.left_out) == (6, 7)
    for epoch in range(3):
        seen = np.concatenate([p.batch(epoch * 6 + i)[1] for i in range(6)])
        assert len(set(seen.tolist())) == 96
        assert set(seen) | set(p.order(epoch)[96:]) == set(range(103))


@pytest.mark.parametrize("world", [1, 2, 4, 16])
def test_ranks_together_read_the_global_batch_in_order(world: int) -> None:
    p = plan()
    for step in (0, 5, 6, 40):
        parts = [p.rank_batch(step, r, world) for r in range(world)]
        assert np.array_equal(np.concatenate([i for _, i in parts]), p.batch(step)[1])
        assert {e for e, _ in parts} == {step // 6}


def test_micro_batches_start_at_any_step() -> None:
    p = plan()
    whole = list(p.micro_batches(range(12), 1, 2, 4))
    assert whole[2 * 5:] == list(p.micro_batches(range(5, 12), 1, 2, 4))
    assert all(len(b) == 4 for b in whole) and len(whole) == 24


def test_the_order_depends_on_data_seed_and_epoch() -> None:
    orders = [plan().order(0), plan().order(1), plan(seed=1).order(0), Plan("e" * 32, 103, 0, 16).order(0)]
    assert len({o.tobytes() for o in orders}) == 4
    assert np.array_equal(plan().order(0), plan(batch=8).order(0))


@pytest.mark.parametrize(("world", "micro", "message"), [
    (32, 1, "training.workers=32 is more than the 16 samples"),
    (3, 1, "does not divide by training.workers=3: 1 samples would be left. Nearest number of workers: 2"),
    (2, 3, "does not divide by training.micro_batch=3. Nearest: 2"),
])
def test_sizes_that_do_not_divide_are_refused_with_the_numbers(world: int, micro: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_batch(16, world, micro)
    assert message in str(error.value)


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="10 samples, fewer than one global batch of 16"):
        plan(samples=10)


@pytest.mark.parametrize(("samples", "world", "batch"), [(10, 1, 4), (10, 3, 2), (1, 4, 8), (9, 2, 9)])
def test_evaluation_gives_every_sample_to_one_rank_in_equal_rounds(samples: int, world: int, batch: int) -> None:
    shares = [rank_share(samples, r, world, batch) for r in range(world)]
    assert sorted(i for batches, _ in shares for b in batches for i in b) == list(range(samples))
    assert len({rounds for _, rounds in shares}) == 1
    assert max(len(batches) for batches, _ in shares) == shares[0][1]
