"""Training without Ray, DeepSpeed or ranks: the same model, start, batches and seed in a plain PyTorch loop.

What the distributed line is compared with. ``python -m tests.support.plain --recipe demo key=value ...`` runs it.
"""

from __future__ import annotations

import argparse
import math

import torch

from vswin_dist import models
from vswin_dist.config import Settings, load_settings
from vswin_dist.data.loader import TrainLoader
from vswin_dist.data.mixing import cross_entropy, mix
from vswin_dist.data.plan import make_plan
from vswin_dist.evaluation.evaluate import Rank, Views, evaluate
from vswin_dist.evaluation.metrics import Scores
from vswin_dist.manifest import read_manifest
from vswin_dist.models.stochastic import sample_keys


def train(s: Settings, steps: int | None = None) -> tuple[torch.nn.Module, list[float]]:
    """Train in fp32; returns the model and the loss of each global batch."""
    manifest = read_manifest(s.data.train)
    plan = make_plan(manifest, s.data, s.run.seed, s.training.global_batch)
    total = plan.steps_per_epoch * s.training.epochs
    torch.manual_seed(s.run.seed)
    model = models.build_model(s.model.name, num_classes=len(manifest.classes), drop_path_rate=s.model.drop_path_rate,
                               head_dropout=s.model.head_dropout)
    groups = []
    for name, p in model.named_parameters():
        decays = p.ndim > 1 and "relative_position_bias_table" not in name
        ratio = 1.0 if name.startswith("head.") else s.optim.backbone_ratio
        groups.append({"params": [p], "weight_decay": s.optim.weight_decay if decays else 0.0, "ratio": ratio})
    optimizer = torch.optim.AdamW(groups, betas=s.optim.betas, eps=s.optim.eps)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (s.data.mean, s.data.std))
    losses = []
    last = min(steps or total, total)
    batches = TrainLoader(manifest, s.data, plan, 0, 1, s.training.global_batch, last)
    for step, batch in enumerate(batches):
        warm = min(step / (s.optim.warmup_epochs * plan.steps_per_epoch), 1.0)
        factor = (s.optim.warmup_start + (1 - s.optim.warmup_start) * warm) * (1 + math.cos(math.pi * step / total)) / 2
        for group in optimizer.param_groups:
            group["lr"] = s.optim.lr * group["ratio"] * factor
        clips, targets = mix((batch["clips"].float() - mean) / std, batch["labels"], len(manifest.classes), s.data,
                             s.run.seed, step, 0)
        logits = model(clips, sample_keys(s.run.seed, step, batch["draws"]))
        loss = cross_entropy(logits, targets, s.optim.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if s.optim.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.optim.gradient_clipping)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def score(model: torch.nn.Module, s: Settings) -> Scores:
    """The validation score of `model`, with the views of the recipe."""
    assert s.data.val
    views = Views(s.evaluation.clips, s.evaluation.crops, s.evaluation.batch)
    return evaluate(model.eval(), read_manifest(s.data.val), s.data.val, s.data, views,
                    Rank(0, 1, torch.device("cpu")), torch.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--losses", type=int, default=50, help="how many of the first losses to print")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    chosen = load_settings(arguments.recipe, arguments.settings)
    trained, found = train(chosen)
    print(" ".join(f"{x:.6f}" for x in found[:arguments.losses]))
    print(score(trained, chosen))
