"""Peak memory and time of a step for eight settings on two CPU ranks, predicted by `vswin_dist.planning` and measured.

`python jobs/benchmark.py planning`: real DeepSpeed engines take three steps of random clips. Measured is the most that a
rank has resident, its libraries included, and the fastest of the last two steps. What a core computes in a second is
taken from the first row, so that the times of the others are predictions.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import time

import torch

from vswin_dist.choices import GradientCheckpointing
from vswin_dist.config.schema import OptimSettings, TrainingSettings
from vswin_dist.models import build_model, count_macs
from vswin_dist.models.swin.presets import resolve
from vswin_dist.planning.memory import Setup, predict
from vswin_dist.planning.plan import RECOMPUTED
from vswin_dist.training.engine import Engine
from vswin_dist.training.optim import parameter_groups

GIB = 2**30
RANKS = 2
Row = tuple[str, tuple[int, int, int], int, int, GradientCheckpointing]
ROWS: list[Row] = [  # model, clip, micro-batch, ZeRO stage, checkpointing
    ("swin_t", (8, 112, 112), 8, 0, "none"),
    ("swin_t", (16, 112, 112), 8, 1, "none"),
    ("swin_t", (16, 112, 112), 16, 2, "block"),
    ("swin_t", (16, 112, 112), 8, 3, "none"),
    ("swin_s", (16, 112, 112), 8, 2, "selective"),
    ("swin_b", (8, 112, 112), 4, 1, "none"),
    ("swin_b", (16, 112, 112), 4, 2, "block"),
    ("swin_b", (16, 112, 112), 4, 2, "stage"),
]


def measure(row: Row) -> tuple[float, float]:
    """Return the bytes resident at the peak, and the seconds of a step; on one of the ranks."""
    name, clip, micro_batch, stage, checkpointing = row
    batch = RANKS * micro_batch
    training = TrainingSettings(
        workers=RANKS,
        global_batch=batch,
        micro_batch=micro_batch,
        zero_stage=stage,  # type: ignore[arg-type]
        precision="fp32",
    )
    optim = OptimSettings()
    model = build_model(name, gradient_checkpointing=checkpointing)
    engine = Engine(model, parameter_groups(model, optim), training, optim, 1, torch.device("cpu"))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        loss = engine.forward(torch.rand(micro_batch, 3, *clip), torch.arange(micro_batch)).logsumexp(1).mean()
        engine.backward(loss)
        engine.step()
        seconds.append(time.perf_counter() - began)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, min(seconds[1:])


def operations(row: Row) -> float:
    """Count the multiply-accumulates of a rank's step."""
    name, clip, micro_batch, _, checkpointing = row
    with torch.device("meta"):
        macs = count_macs(build_model(name), clip)
    return macs * micro_batch * (3 + RECOMPUTED[checkpointing])


def main(argv: list[str]) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="jobs/benchmark.py planning", description=__doc__)
    parser.add_argument("--rows", type=int, default=len(ROWS), help="how many of the settings")
    args = parser.parse_args(argv)
    ranks = importlib.import_module("tests.support.ranks")
    columns = ["model", "clip", "micro-batch", "ZeRO", "checkpointing", "GiB predicted", "measured", "error"]
    columns += ["step predicted", "measured", "error"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    rate = 0.0
    for row in ROWS[: args.rows]:
        name, clip, micro_batch, stage, checkpointing = row
        architecture = resolve(name, 400, {"gradient_checkpointing": checkpointing})
        memory = predict(architecture, Setup(clip, micro_batch, RANKS, stage, "fp32", "cpu")).total
        found = ranks.run_ranks(RANKS, measure, row)
        peak, seconds = (max(values) for values in zip(*found, strict=True))
        rate = rate or operations(row) / seconds
        step = operations(row) / rate
        cells = [name, " x ".join(map(str, clip)), str(micro_batch), str(stage), checkpointing]
        cells += [f"{memory / GIB:.2f}", f"{peak / GIB:.2f}", f"{memory / peak - 1:+.0%}"]
        cells += [f"{step:.2f} s", f"{seconds:.2f} s", f"{step / seconds - 1:+.0%}"]
        print(f"| {' | '.join(cells)} |", flush=True)
