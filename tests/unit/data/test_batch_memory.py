"""Buffers go round between a worker and its rank, and no batch changes while anything of it is held."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from tests.unit.data.test_loader import loader
from vswin_dist.data import batch_memory
from vswin_dist.data.batch_memory import BatchMemory

RING = "r"


@pytest.fixture
def memory() -> Iterator[BatchMemory]:
    """Two buffers of a worker, whose rank is this process too."""
    batch_memory.open_ring(RING)
    yield BatchMemory(RING, 0, 2)
    batch_memory.close_ring(RING)


def sent(memory: BatchMemory, shape: tuple[int, ...], value: int, part: int | None = None) -> torch.Tensor:
    """A batch as the rank gets it."""
    room = memory.take(shape)
    room.tensor.fill_(value)
    found = pickle.loads(ForkingPickler.dumps(room.part(part)))
    assert isinstance(found, torch.Tensor)
    return found


def test_a_buffer_is_used_again_when_the_last_tensor_over_it_is_gone(memory: BatchMemory) -> None:
    first, second, third = (sent(memory, (2, 5), value) for value in (1, 2, 3))
    place = first.data_ptr()
    row, numbers = first[1], second.numpy()
    del first, second
    other = sent(memory, (2, 5), 4)  # both buffers are in use
    assert row.tolist() == [1] * 5 and (numbers == 2).all() and (third == 3).all() and (other == 4).all()
    del row
    again = sent(memory, (2, 5), 5)
    assert again.data_ptr() == place and (again == 5).all() and (numbers == 2).all() and (third == 3).all()


def test_batches_may_grow_and_shrink(memory: BatchMemory) -> None:
    places = set()
    for value, (size, part) in enumerate([(10, None), (4, None), (5000, None), (5000, 7), (20, None), (0, None), (6, 0)]):
        batch = sent(memory, (size, 3), value, part)
        assert batch.shape == (size if part is None else part, 3) and (batch == value).all()
        places.add(batch.data_ptr())
        del batch
    assert len(places - {0}) <= 2


def test_what_nobody_waits_for_is_dropped(memory: BatchMemory) -> None:
    held = sent(memory, (4,), 1)
    batch_memory.close_ring(RING)
    assert sent(memory, (4,), 2).numel() == 0 and held.tolist() == [1] * 4


@pytest.mark.slow
def test_batches_of_processes_lie_in_few_buffers(motion_shards: Path) -> None:
    wanted = [batch["clips"] for batch in loader(motion_shards)]
    places, held = set(), []
    for batch, alone in zip(loader(motion_shards, "data.workers=1", "data.prefetch=1"), wanted, strict=True):
        assert torch.equal(batch["clips"], alone)
        places.add(batch["clips"].data_ptr())
        held.append(batch["labels"])
    assert len(places) <= 3 and len(held) == 20
    gc.collect()
    assert not batch_memory._RINGS


@pytest.mark.slow
def test_what_is_held_of_a_batch_stays(motion_shards: Path) -> None:
    """A view of each, also of an iterator that was left half-way."""
    wanted = [batch["clips"][1, 0] for batch in loader(motion_shards)]
    left = iter(loader(motion_shards, "data.workers=2", "data.prefetch=1"))
    first = next(left)["clips"][1, 0]
    del left
    held = [batch["clips"][1, 0] for batch in loader(motion_shards, "data.workers=2", "data.prefetch=1")]
    for one, alone in zip([first, *held], [wanted[0], *wanted], strict=True):
        assert torch.equal(one, alone)
