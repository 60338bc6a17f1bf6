"""The one loop over the pool: bounded by its room, in any order, tasks of dead workers repeated."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.executor import DEATHS, LocalExecutor, Task
from tests.unit.data_prep.inprocess import InProcess
from vswin_dist.errors import DataError, WorkFailed


def double(number: int) -> int:
    return 2 * number


def late(argument: tuple[float, int]) -> int:
    time.sleep(argument[0])
    return argument[1]


def die_until(argument: tuple[str, int]) -> str:
    """Leave a mark and be killed, until there are as many marks as asked for."""
    folder, times = Path(argument[0]), argument[1]
    if len(list(folder.iterdir())) < times:
        (folder / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def refuse(message: str) -> None:
    raise DataError(message)


def fail(message: str) -> None:
    raise KeyError(message)


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalExecutor]:
    with LocalExecutor(2) as executor:
        yield executor


@pytest.mark.slow
def test_every_task_comes_back_once_with_its_ticket_in_the_order_of_completion(pool: LocalExecutor) -> None:
    done = list(pool.run(Task(n, double, n) for n in range(30)))
    assert sorted((d.ticket, d.value) for d in done) == [(n, 2 * n) for n in range(30)]
    assert list(pool.run([])) == []
    turns = [d.ticket for d in pool.run([Task("late", late, (1.0, 1)), Task("soon", late, (0.0, 2))])]
    assert turns == ["soon", "late"]


@pytest.mark.parametrize("backwards", [False, True])
def test_tasks_are_taken_only_as_there_is_room(backwards: bool) -> None:
    taken: list[int] = []

    def tasks() -> Iterator[Task]:
        for n in range(20):
            taken.append(n)
            yield Task(n, double, n)

    finished = 0
    for _ in InProcess(backwards).run(tasks()):
        assert len(taken) - finished <= 4, "more than the room of four"
        finished += 1
    assert finished == 20


def test_none_waits_until_a_running_task_was_dealt_with() -> None:
    dealt: list[int] = []

    def tasks() -> Iterator[Task | None]:
        yield Task(0, double, 0)
        yield Task(1, double, 1)
        while len(dealt) < 2:
            yield None
        yield Task(2, double, sum(dealt))
        yield None  # nothing follows it: the end

    for done in InProcess().run(tasks()):
        dealt.append(done.value)
    assert dealt == [0, 2, 4]
    assert list(InProcess().run([None, Task(0, double, 0)])) == [], "nothing runs that could be waited for"


@pytest.mark.slow
def test_the_task_of_a_dead_worker_is_repeated_and_given_up_at_last(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tasks = [
        Task("survives", die_until, (str(tmp_path / "a"), DEATHS - 1)),
        Task("never", die_until, (str(tmp_path / "b"), 10**6)),
        *(Task(n, double, n) for n in range(8)),
    ]
    with LocalExecutor(2) as executor:
        done = {d.ticket: d for d in executor.run(tasks)}
    assert done["survives"].value == "done" and not done["survives"].crashed
    assert done["never"].crashed and len(list((tmp_path / "b").iterdir())) == DEATHS
    assert [done[n].value for n in range(8)] == [2 * n for n in range(8)]


def test_what_a_task_raises_ends_the_loop(pool: LocalExecutor) -> None:
    with pytest.raises(DataError, match="not this one"):
        list(pool.run([Task(0, refuse, "not this one")]))
    with pytest.raises(WorkFailed, match=r"KeyError: 'x'[\s\S]*Traceback"):
        list(pool.run([Task(0, fail, "x")]))
    assert [d.value for d in pool.run([Task(0, double, 4)])] == [8]


def test_what_the_tasks_themselves_raise_ends_the_loop() -> None:
    def tasks() -> Iterator[Task]:
        yield Task(0, double, 0)
        raise WorkFailed("the archive is damaged")

    with pytest.raises(WorkFailed, match="the archive is damaged"):
        list(InProcess().run(tasks()))


def test_leaving_ends_the_workers() -> None:
    with LocalExecutor(2) as executor:
        pids = executor.pids
        assert [d.value for d in executor.run([Task(0, double, 1)])] == [2]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
