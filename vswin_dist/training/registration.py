"""Register the best checkpoint of a training; where the store is away, the wish to do so is kept for later."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vswin_dist
from vswin_dist import storage
from vswin_dist.errors import TrackingError
from vswin_dist.tracking import CANDIDATE, Measured, Registry, Run, send_kept
from vswin_dist.training import averaged_model, checkpoint, run_record
from vswin_dist.training.description import describe_trained
from vswin_dist.training.spec import TrainingSpec
from vswin_dist.training.trainer import WorkerConfig


def register_best(spec: TrainingSpec, config: WorkerConfig, tracking: Run, pyfunc: Path) -> dict[str, Any]:
    """Register the best checkpoint as candidate, later where the store is away; returns what `train` returns."""
    s = spec.settings
    best = checkpoint.best(checkpoint.list_checkpoints(config.checkpoints))
    assert best, "a training run that ended has a checkpoint"
    if not storage.is_local(best.url):  # is registered where it is
        checkpoint.keep_for_model(best.url, run_record.registered_name(s))
    scores = {k.removeprefix("val/"): round(v, 4) for k, v in best.position.metrics.items()}
    name = run_record.registered_name(s)
    folder = averaged_model.export(best.url) if s.evaluation.ema else best.url
    weights = {"weights": "averaged"} if s.evaluation.ema else {}
    tags = config.lineage | {"step": best.position.step, "checkpoint": best.url} | scores | weights
    text = describe_trained(spec, config.lineage, best.position.step, best.position.metrics)
    how: dict[str, Any] = {"alias": CANDIDATE, "tags": tags, "description": text}
    measured = _measured(spec, best.position)
    try:
        if tracking.spool and tracking.spool.waiting():  # such as the scores, which are linked to the model
            send_kept(tracking.reference, is_over=False)
        registry = Registry(spec.tracking_uri, config.run.fence)
        model = registry.register(name, folder, run_id=config.run.run_id, pyfunc=pyfunc, measured=measured, **how)
    except TrackingError as error:
        if not error.retriable or tracking.spool is None:
            raise
        code = pyfunc.relative_to(Path(vswin_dist.__file__).parent).as_posix()
        since = {"pyfunc": code, "since_ms": int(time.time() * 1000), "measured": measured and asdict(measured)}
        tracking.spool.put("register", {"name": name, "folder_or_url": folder, **how, **since})
        model = folder
    return {
        "run_id": config.run.run_id,
        "checkpoint": best.url,
        "model": model,
        "step": best.position.step,
        **best.position.metrics,
    }


def _measured(spec: TrainingSpec, position: checkpoint.Position) -> Measured | None:
    """Name the scores of the training's own validation; None where there was none at this step."""
    if not spec.val or not position.metrics:
        return None
    return Measured(position.step, [*position.metrics], spec.val.name, spec.val.fingerprint)
