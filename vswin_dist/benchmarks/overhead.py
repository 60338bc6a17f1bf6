"""What Ray, DeepSpeed, the loader and MLflow add to a step, beside plain PyTorch on the same batches in memory.

`python jobs/benchmark.py overhead`: swin_t at 8 x 112 x 112 on CPU ranks of one thread each. One rank is compared with a
plain loop, two with `torchrun` and DistributedDataParallel. Peer, training, and the peer again run one after the other; the
peer's figure is the mean of its two medians. A training's steps are those that it logged itself. With `--gpu` one rank on a
GPU trains as `k400_swin_t` does, 32 x 224 x 224 in bf16 with fp32 master weights, and the plain loop likewise.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vswin_dist.config import Settings, load_settings
from vswin_dist.data.loader import TrainLoader
from vswin_dist.data.plan import make_plan
from vswin_dist.data.transforms.batch_transform import BatchTransform
from vswin_dist.device import Rank
from vswin_dist.manifest import read_manifest
from vswin_dist.models import build_model

LEFT_OUT = 4  # of the first steps
SETTINGS = (
    "model.name=swin_t",
    "model.patch_size=null",
    "model.init=null",
    "data.frames=8",
    "data.stride=1",
    "data.size=112",
    "data.short_side=128",
    "data.workers=1",
    "evaluation.every_epochs=1000",
    "training.epochs=1000",
    "training.checkpoint_every=1000000",
    "training.zero_stage=1",
    "training.precision=fp32",
    "training.use_gpu=false",
    "training.cpus_per_worker=1",
)
ON_A_GPU = (
    "data.frames=32",
    "data.size=224",
    "data.short_side=256",
    "data.workers=8",
    "training.precision=bf16",
    "training.use_gpu=true",
    "training.cpus_per_worker=10",
)


def peer(arguments: list[str]) -> None:
    """Take the steps in plain PyTorch, on one rank or on those of torchrun, and print their seconds."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings = load_settings("demo", [*SETTINGS, *arguments])
    device = torch.device("cuda" if settings.training.use_gpu else "cpu")
    batches = _batches(settings, Rank(int(os.environ.get("RANK", "0")), ranks, device))
    torch.set_num_threads(1)
    model: Any = build_model("swin_t", num_classes=len(read_manifest(settings.data.train).classes)).to(device)
    masters = list(model.parameters())
    if device.type == "cuda":
        masters = [p.detach().clone() for p in masters]
        model = model.to(torch.bfloat16)
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(masters, lr=settings.optim.lr)
    seconds = []
    for clips, targets in itertools.islice(itertools.cycle(batches), settings.training.max_steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(clips).float(), targets).backward()
        if device.type == "cuda":
            for master, weight in zip(masters, model.parameters(), strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 40.0)
        optimizer.step()
        if device.type == "cuda":
            torch._foreach_copy_([p.data for p in model.parameters()], masters)
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(seconds), flush=True)


def _batches(settings: Settings, rank: Rank) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the rank's part of the first global batches, as the training gives them to the model."""
    manifest, batch = read_manifest(settings.data.train), settings.training.global_batch
    plan = make_plan(manifest, settings.data, settings.run.seed, batch)
    loader = TrainLoader(manifest, settings.data, plan, rank, batch // rank.world_size, last=4)
    dtype = torch.bfloat16 if rank.device.type == "cuda" else torch.float32
    transform = BatchTransform(settings.data, plan, len(manifest.classes), rank.device, dtype)
    return [transform(batch, step, position=0) for step, batch in enumerate(loader)]


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def _peer_seconds(ranks: int, own: list[str]) -> float:
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    output = _run([*start, "-m", __name__, *own], {"OMP_NUM_THREADS": "1"})
    return float(median(json.loads(output.strip().splitlines()[-1])[LEFT_OUT:]))


def _training_seconds(line: Any, ranks: int, own: list[str], steps: int, batch: int) -> float:
    name = f"ranks-{ranks}"
    line.run("train", "--recipe", "demo", f"run.name={name}", *SETTINGS, *own, f"training.workers={ranks}", timeout_s=1800)
    rates = line.history(name, "train/clips_per_second")
    return float(median(batch / rate for step, rate in rates.items() if LEFT_OUT < step <= steps))


def main(argv: list[str]) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="jobs/benchmark.py overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8, help="clips of a global batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=None, help="one and two; one on a GPU")
    parser.add_argument("--gpu", action="store_true", help="on a GPU of this machine")
    args = parser.parse_args(argv)
    support = importlib.import_module("tests.support.line")
    print("| ranks | peer, s a step | training, s a step | added |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="vswin-overhead-") as folder, support.short_folder() as ray_folder:
        (shards := Path(folder) / "shards").mkdir()
        line = support.Line(Path(folder), support.make_shards(shards), ray_folder)
        for ranks in args.ranks or ([1] if args.gpu else [1, 2]):
            own = [f"data.train={shards}/train", "data.val=null", f"training.max_steps={args.steps}"]
            own += ON_A_GPU if args.gpu else ()
            own += [f"training.global_batch={args.batch}", f"training.micro_batch={args.batch // ranks}"]
            before = _peer_seconds(ranks, own)
            ours = _training_seconds(line, ranks, own, args.steps, args.batch)
            beside = (before + _peer_seconds(ranks, own)) / 2
            kind = "plain loop" if ranks == 1 else "torchrun, DDP"
            print(f"| {ranks} | {beside:.3f} ({kind}) | {ours:.3f} | {ours / beside - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    peer(sys.argv[1:])
