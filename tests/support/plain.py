"""Training without Ray, DeepSpeed or ranks: the same model, start, batches and seed in a plain PyTorch loop.

The shortest way through the code, and what the distributed line is compared with: the losses are the same.
It knows no `schedule=epoch`, frozen parameters or averaged weights.
`python -m tests.support.plain --recipe demo key=value ...` runs it.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from vswin_dist import models
from vswin_dist.config import Settings, load_settings
from vswin_dist.config.schema import OptimSettings
from vswin_dist.data.loader import TrainLoader
from vswin_dist.data.plan import make_plan
from vswin_dist.data.transforms.batch_transform import BatchTransform
from vswin_dist.data.transforms.mixing import cross_entropy
from vswin_dist.device import Rank
from vswin_dist.evaluation.evaluate import Views, evaluate
from vswin_dist.evaluation.metrics import Scores
from vswin_dist.manifest import read_manifest
from vswin_dist.models.stochastic import sample_keys

ONE_RANK = Rank(0, 1, torch.device("cpu"))


def train(s: Settings, steps: int | None = None) -> tuple[torch.nn.Module, list[float]]:
    """Train in fp32; returns the model and the loss of each global batch."""
    manifest = read_manifest(s.data.train)  # the samples, and where their bytes lie in the shards
    classes = len(manifest.classes)
    plan = make_plan(manifest, s.data, s.run.seed, s.training.global_batch)  # their order
    total = plan.steps_per_epoch * s.training.epochs
    loader = TrainLoader(manifest, s.data, plan, ONE_RANK, s.training.global_batch, last=min(steps or total, total))
    transform = BatchTransform(s.data, plan, classes, ONE_RANK.device, torch.float32)

    torch.manual_seed(s.run.seed)
    model = models.build_model(
        s.model.name,
        num_classes=classes,
        patch_size=s.model.patch_size,
        drop_path_rate=s.model.drop_path_rate,
        head_dropout=s.model.head_dropout,
    )
    optimizer = torch.optim.AdamW(groups(model, s.optim), betas=s.optim.betas, eps=s.optim.eps)
    losses = []
    for step, batch in enumerate(loader):
        warm = min(step / (s.optim.warmup_epochs * plan.steps_per_epoch), 1.0)
        factor = (s.optim.warmup_start + (1 - s.optim.warmup_start) * warm) * (1 + math.cos(math.pi * step / total)) / 2
        for group in optimizer.param_groups:
            group["lr"] = s.optim.lr * group["ratio"] * factor
        clips, targets = transform(batch, step, position=0)  # [B, 3, T, H, W]
        logits = model(clips, sample_keys(s.run.seed, step, batch["occurrences"]))  # [B, K]
        loss = cross_entropy(logits, targets, s.optim.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if s.optim.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.optim.gradient_clipping)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def groups(model: torch.nn.Module, s: OptimSettings) -> list[dict[str, Any]]:
    """Give each parameter its weight decay and its part of the learning rate."""
    found = []
    for name, p in model.named_parameters():
        decays = p.ndim > 1 and "relative_position_bias_table" not in name
        ratio = 1.0 if name.startswith("head.") else s.backbone_ratio
        found.append({"params": [p], "weight_decay": s.weight_decay if decays else 0.0, "ratio": ratio})
    return found


def score(model: torch.nn.Module, s: Settings) -> Scores:
    """Score `model` on the validation set, with the views of the recipe."""
    assert s.data.val
    views = Views(s.evaluation.clips, s.evaluation.crops, s.evaluation.batch)
    val = read_manifest(s.data.val)
    return evaluate(model.eval(), val, s.data.val, s.data, views, ONE_RANK, torch.float32).scores(val)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--losses", type=int, default=50, help="how many of the first losses to print")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    chosen = load_settings(arguments.recipe, arguments.settings)
    trained, found = train(chosen)
    print(" ".join(f"{x:.6f}" for x in found[: arguments.losses]))
    print(score(trained, chosen))
