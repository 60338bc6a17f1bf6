"""What a checkpoint costs a training: the stall of one written in the background beside the same written while steps wait.

`python jobs/benchmark.py checkpoint URL`: two gloo ranks on the CPU hold Swin-B, of its real size, with AdamW under ZeRO. In
the steps that follow, the processor idles, as that of a host of GPUs does; with `--train` they are real, of random clips.
The ways of a save take turns:

- background: as training does it;
- waiting: the same, and the steps wait until it is committed;
- rank 0 alone: full tensors are gathered on rank 0, serialised, hashed and copied to their place while the others wait,
  as training did it before.

S3 with 50 ms to each answer, the bucket being a folder below FOLDER (two terminals, or `&`)::

    rclone serve s3 --addr 127.0.0.1:9000 --auth-key key,secret FOLDER
    python -m tests.support.bad_network 9000 9001 0.05
    AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_ENDPOINT_URL_S3=http://127.0.0.1:9001 python \\
        jobs/benchmark.py checkpoint s3://bucket
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from vswin_dist import storage
from vswin_dist.config.schema import OptimSettings, TrainingSettings
from vswin_dist.device import Rank
from vswin_dist.errors import at_least
from vswin_dist.model_card import ModelCard
from vswin_dist.models import build_model
from vswin_dist.training.checkpoint import CheckpointWriter, Position, Saved
from vswin_dist.training.engine import MOMENTS, Engine
from vswin_dist.training.optim import parameter_groups

GB = 1e9
OPTIM = OptimSettings(lr=1e-4)
CARD = ModelCard({}, [], {}, {})
IDLE_STEP_S = 0.5
RANK_0, FIRST, BACKGROUND, WAITING = "rank 0 alone", "first in the background", "background", "waiting"


@dataclass(frozen=True)
class Save:
    """One save: seconds for which the steps stood still, for which steps that went on meanwhile were longer, and memory."""

    stall_s: float
    steps_meanwhile: int
    slowdown_s: float
    total_s: float  # from its beginning to the commit
    memory_gb: float  # resident at the peak, on both ranks, over what it was before any save


@dataclass(frozen=True)
class Options:
    """What the ranks are told."""

    url: str
    model: str
    clip: tuple[int, int, int]
    stage: Literal[0, 1, 2, 3]
    precision: Literal["bf16", "fp32"]
    repeats: int
    train: bool


class Memory:
    """Watches how much a process has resident, while the block runs."""

    def __enter__(self) -> Memory:
        self._process, self._end = psutil.Process(), threading.Event()
        self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


class Bench:
    """One rank's training."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rank = Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
        training = TrainingSettings(
            workers=self.rank.world_size, micro_batch=1, zero_stage=options.stage, precision=options.precision
        )
        torch.manual_seed(0)
        model = build_model(options.model, num_classes=400)
        self.engine = Engine(model, parameter_groups(model, OPTIM), training, OPTIM, 1, self.rank.device)
        self.clips = torch.randn(1, 3, *options.clip).to(self.engine.input_dtype)
        self.saved: list[Saved] = []
        self.writer = CheckpointWriter(options.url, self.rank, keep=1, on_saved=self.saved.append)
        self.writer.claim()
        self.count = self.held = 0

    def step(self) -> float:
        """Take a step; returns its seconds."""
        began = time.perf_counter()
        if self.options.train:
            self.train()
        else:
            time.sleep(IDLE_STEP_S)
        self.rank.barrier()
        return time.perf_counter() - began

    def train(self) -> None:
        """Take an optimizer step on random clips."""
        logits = self.engine.forward(self.clips, torch.zeros(1, dtype=torch.int64))
        self.engine.backward(nn.functional.cross_entropy(logits.float(), torch.zeros(1, dtype=torch.int64)))
        self.engine.step()

    def begin(self) -> None:
        """Begin a save in the background."""
        self.count += 1
        position = Position(self.count, 0, 0, "", "", {}, [], {})
        self.writer.save(position, self.engine.state(), CARD)

    def measure(self, name: str, begin: Callable[[], None], step_s: float) -> Save:
        """Save by `begin`, and take steps until it is committed."""
        self.rank.barrier()
        with Memory() as memory:
            began = time.perf_counter()
            begin()
            self.rank.barrier()
            stall, steps, working = time.perf_counter() - began, 0, 0.0
            while self.writer.in_flight:
                working += self.step()
                steps += 1
                asked = time.perf_counter()
                self.writer.progress()
                stall += time.perf_counter() - asked
            total = time.perf_counter() - began
        used = sum(self.rank.gather(memory.peak - self.held))
        self.rank.print(f"{name}: the steps stood still for {stall:.2f} s, all took {total:.2f} s")
        return Save(stall, steps, working - steps * step_s, total, used / GB)

    def waiting(self) -> None:
        """Save, and wait until it is committed."""
        self.begin()
        self.writer.finish()

    def rank_0_alone(self) -> None:
        """Save as one rank alone does it: gather, serialise, hash and copy, while the others wait."""
        found: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in self.engine.weights():
            if self.rank.is_main:
                found["model"][name] = tensor.clone()
        for name, tensor in self._full_moments():
            if self.rank.is_main:
                found["optimizer"][name] = tensor.clone()
        if self.rank.is_main:
            local = storage.is_local(self.options.url)
            with tempfile.TemporaryDirectory(dir=self.options.url if local else None) as folder:
                for name, tensors in found.items():
                    path = Path(folder, f"{name}.safetensors")
                    save_file(tensors, path)
                    with path.open("rb") as file:
                        hashlib.file_digest(file, "sha256")
                    storage.put_file(path, storage.join(self.options.url, "alone", path.name))
        self.rank.barrier()

    def _full_moments(self) -> Iterator[tuple[str, Tensor]]:
        """Gather every moment on every rank, by the sum of what each has."""
        mine = {part.name: part for part in self.engine.moments()}
        for name, p in self.engine.module.named_parameters():
            for key in (f"{moment}.{name}" for moment in MOMENTS):
                tensor = torch.zeros(getattr(p, "ds_shape", p.shape))
                if part := mine.get(key):
                    tensor.view(-1)[part.start : part.start + part.values.numel()] = part.values
                dist.all_reduce(tensor)
                yield key, tensor


def on_a_rank(options: Options) -> tuple[float, float, dict[str, list[Save]]]:
    """Measure on one rank: GB of the state, seconds of a step alone, and the saves of each way."""
    bench = Bench(options)
    parameters = sum(p.numel() for p in bench.engine.module.parameters())
    bench.train()
    alone = [bench.step() for _ in range(3)]
    bench.held = psutil.Process().memory_info().rss
    ways = {RANK_0: bench.rank_0_alone, FIRST: bench.begin, BACKGROUND: bench.begin, WAITING: bench.waiting}
    found: dict[str, list[Save]] = {name: [bench.measure(name, way, statistics.median(alone))] for name, way in ways.items()}
    for _ in range(options.repeats - 1):
        alone.append(bench.step())
        for name in (RANK_0, BACKGROUND, WAITING):
            found[name].append(bench.measure(name, ways[name], statistics.median(alone)))
    return 3 * 4 * parameters / GB, statistics.median(alone), found


def summary(saves: list[Save]) -> Save:
    """Take the median of each figure."""
    return Save(*(statistics.median(column) for column in zip(*(asdict(s).values() for s in saves), strict=True)))


def main(arguments: list[str]) -> int:
    """Measure, and print a line for each way and one JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", metavar="URL", help="where to save; what is written there is removed")
    parser.add_argument("--model", default="swin_b", help="a preset")
    parser.add_argument("--clip", nargs=3, type=int, default=(2, 32, 32), metavar=("T", "H", "W"), help="of a rank's clip")
    parser.add_argument("--stage", type=int, default=1, choices=(0, 1, 2, 3), help="of ZeRO")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of forward and backward")
    parser.add_argument("--repeats", type=int, default=3, help="saves of each way")
    parser.add_argument("--train", action="store_true", help="take real steps")
    args = parser.parse_args(arguments)
    at_least(1, repeats=args.repeats)
    from tests.support.ranks import run_ranks

    url = storage.join(storage.absolute(args.url), "benchmark-checkpoints")
    options = Options(url, args.model, tuple(args.clip), args.stage, args.precision, args.repeats, args.train)
    try:
        (state_gb, step_s, found), _ = run_ranks(2, on_a_rank, options, timeout_s=3600)
    finally:
        storage.remove(url, recursive=True)
    rows = {name: summary(saves) for name, saves in found.items()}
    print(
        f"{args.model}, {state_gb:.2f} GB of weights and moments, ZeRO-{args.stage} {args.precision}, a step {step_s:.2f} s"
    )
    for name, s in rows.items():
        share = ", ".join(f"{s.stall_s / rows[other].stall_s:.1%} of {other!r}" for other in (WAITING, RANK_0))
        print(
            f"{name}: steps stand still {s.stall_s:.2f} s ({share}); {s.steps_meanwhile:g} steps meanwhile take "
            f"{s.slowdown_s:.2f} s more; committed after {s.total_s:.2f} s; memory up by {s.memory_gb:.2f} GB"
        )
    report = {"processor": platform.processor(), "torch": torch.__version__, "options": asdict(options)}
    every = {name: [asdict(s) for s in saves] for name, saves in found.items()}
    print(json.dumps(report | {"state_gb": state_gb, "step_s": step_s, "saves": every}))
    return 0
