"""Run a function on several ranks in real processes."""

from __future__ import annotations

import os
import pickle  # not the queue's own pickling, which shares a tensor's memory with a process that has ended
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.ports import free_port


def _enter(rank: int, world: int, port: int, backend: str, function: Callable[..., Any], args: tuple[Any, ...],
           results: Any) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
                       "DS_ACCELERATOR": "cpu" if backend == "gloo" else "cuda"})
    import torch

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world)
    try:
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any, backend: str = "gloo",
              timeout_s: float = 240) -> list[Any]:
    """`function(*args)` on ranks 0..world-1 of a fresh process group; their results in order of rank.

    Args:
        backend: gloo, or nccl with a GPU for each rank.
    """
    port = free_port()
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_enter, args=(r, world, port, backend, function, args, results))
                 for r in range(world)]
    for p in processes:
        p.start()
    try:
        found = {}
        for _ in processes:
            rank, value, error = results.get(timeout=timeout_s)
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = pickle.loads(value)
        return [found[r] for r in range(world)]
    finally:
        for p in processes:
            p.join(20)
            if p.is_alive():
                p.kill()
                p.join()
