"""A small 2D Swin trained briefly on still frames, in the layout of the published 2D checkpoints.

It stands in for the ImageNet weights from which Video Swin starts: a video model whose patches and windows are one
frame deep is a 2D Swin. On the rendered set it learns the shape (the motion is not in a still frame), on a user's
folder the class.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from vswin_dist import models
from vswin_dist.config import Settings
from vswin_dist.data.loader import TrainLoader
from vswin_dist.data.plan import Plan
from vswin_dist.data.transforms.normalise import normalise
from vswin_dist.device import Rank
from vswin_dist.manifest import read_manifest


def pretrain(s: Settings, labels: dict[str, int] | None, epochs: int, out: Path) -> float:
    """Train the 2D counterpart of the recipe's model on one random frame of each video and write it to `out`.

    Args:
        labels: source id of a video -> what to learn from its frames; None: its class.

    Returns:
        The accuracy over the last epoch, in percent.
    """
    manifest = read_manifest(s.data.train)
    target = [labels[x.source_id] if labels else x.class_id for x in manifest.samples]
    torch.manual_seed(s.run.seed)
    model = models.build_model(
        s.model.name,
        num_classes=max(target) + 1,
        patch_size=(1, 4, 4),
        window_size=(1, 4, 4),
        drop_path_rate=0.0,
        head_dropout=0.0,
    )
    plan = Plan(manifest.fingerprint, len(target), s.run.seed, 32)
    steps = epochs * plan.steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    data = replace(s.data, frames=1, stride=1, workers=1)
    batches = TrainLoader(manifest, data, plan, Rank(0, 1, torch.device("cpu")), 32, steps)
    hits = total = 0
    for step, batch in enumerate(batches):
        wanted = torch.tensor([target[i] for i in batch["indices"].tolist()])
        logits = model(normalise(batch["clips"], data.mean, data.std, torch.float32))
        optimizer.zero_grad()
        F.cross_entropy(logits, wanted).backward()
        optimizer.step()
        schedule.step()
        if step >= steps - plan.steps_per_epoch:
            hits, total = hits + int((logits.argmax(1) == wanted).sum()), total + len(wanted)
    torch.save({"model": models.export_state(model, "microsoft2d")}, out)
    return 100 * hits / total
