"""Run a function on several ranks in real processes, forked for each call from one that has imported what they need."""

from __future__ import annotations

import contextlib
import os
import pickle  # not multiprocessing's own pickling, which shares the memory of tensors, a file descriptor for each
import queue
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import TCPStore


def _enter(
    rank: int, environment: dict[str, str], backend: str, function: Callable[..., Any], args: bytes, results: Any
) -> None:
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    world = int(environment["WORLD_SIZE"])
    import torch

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    try:
        dist.init_process_group(backend, rank=rank, world_size=world)
        results.put((rank, pickle.dumps(function(*pickle.loads(args))), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def rendezvous(world: int) -> Iterator[dict[str, str]]:
    """What `world` ranks need in their environment to find each other, as torchrun does it.

    The store is this process's own, at a port that the system gives it: a port that was only looked for can be taken before
    rank 0 listens at it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    del store  # it ends here, and not before


def _result(results: Any, processes: list[Any], timeout_s: float) -> tuple[int, bytes, str | None]:
    """The next result; fails at once where a rank ended that put none."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        ended = [
            f"rank {rank} {'was killed by' if p.exitcode < 0 else 'ended with'} {abs(p.exitcode)}"
            for rank, p in enumerate(processes)
            if p.exitcode
        ]
        with contextlib.suppress(queue.Empty):
            found: tuple[int, bytes, str | None] = results.get(timeout=0.5)
            return found
        assert not ended, ended
    raise AssertionError(f"no result within {timeout_s:g} s")


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, backend: str = "gloo", timeout_s: float = 240
) -> list[Any]:
    """`function(*args)` on ranks 0..world-1 of a fresh process group; their results in order of rank.

    Args:
        backend: gloo, or nccl with a GPU for each rank.
    """
    with rendezvous(world) as found:
        environment = {
            **os.environ,  # as it is now, and not as it was when the process was started that ranks are forked from
            **found,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu" if backend == "gloo" else "cuda",
        }
        context: Any = mp.get_context("forkserver" if backend == "gloo" else "spawn")  # CUDA does not survive a fork
        context.set_forkserver_preload(["tests.support.rank_imports"])
        results = context.Queue()
        processes = [
            context.Process(target=_enter, args=(r, environment, backend, function, pickle.dumps(args), results))
            for r in range(world)
        ]
        for p in processes:
            p.start()
        try:
            return _collect(results, processes, timeout_s)
        finally:
            for p in processes:
                p.join(20)
                if p.is_alive():
                    p.kill()
                    p.join()


def _collect(results: Any, processes: list[Any], timeout_s: float) -> list[Any]:
    """What all ranks returned, in their order."""
    found = {}
    for _ in processes:
        rank, value, error = _result(results, processes, timeout_s)
        assert error is None, f"rank {rank}:\n{error}"
        assert value is not None
        found[rank] = pickle.loads(value)
    return [found[r] for r in range(len(processes))]
