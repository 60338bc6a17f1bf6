"""Every check that needs no worker: storage, shards, labels, checkpoint layout, batch arithmetic."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from vswin_dist import models, storage
from vswin_dist.config import Settings
from vswin_dist.data.mixing import check_pairs
from vswin_dist.data.plan import fitting_worlds, make_plan, validation_set
from vswin_dist.data.sampling import resolve
from vswin_dist.manifest import check_same_classes, check_shard_sizes, read_manifest
from vswin_dist.tracking.run import check_store, tracking_uri
from vswin_dist.training import identity
from vswin_dist.training.optim import parameter_groups
from vswin_dist.training.prepared import Prepared
from vswin_dist.training.start import initial_weights, load, model_overrides, pinned


def preflight(s: Settings) -> Prepared:
    """Check that the training `s` can start, writing nothing but a probe where its checkpoints will go.

    What `s` leaves to the data is decided here, and nowhere else; the training runs with `Prepared.settings`.

    Raises:
        ConfigError, DataError, CheckpointError, PreflightError: what is wrong, with the values.
    """
    storage.use_s3_endpoint(s.storage.s3_endpoint)
    uri = tracking_uri(s.tracking.uri)
    root = storage.join(identity.runs_root(s), s.run.name)
    train = read_manifest(s.data.train)
    check_shard_sizes(train, s.data.train)
    data, warning = resolve(s.data, train)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    s = replace(s, data=data)
    val = validation_set(s.data)
    if val and s.data.val:
        check_same_classes(train.classes, val.classes, f"the validation set {s.data.val}")
        check_shard_sizes(val, s.data.val)
    t = s.training
    worlds = fitting_worlds(t.global_batch, t.min_workers or t.workers, t.workers, t.micro_batch)
    check_pairs(s.data, s.training.micro_batch)
    plan = make_plan(train, s.data, s.run.seed, s.training.global_batch)
    with torch.device("meta"):
        model = models.build_model(s.model.name, num_classes=len(train.classes), **model_overrides(s))
    resumes = identity.to_resume(s, root, train.fingerprint, plan.steps_per_epoch * s.training.epochs)
    s = replace(s, model=replace(s.model, init=resumes.settings["model.init"] if resumes else pinned(s.model.init, uri)))
    report = ""
    if s.model.init and not resumes:
        report = str(load(model, initial_weights(s.model.init, uri), s, dry_run=True))
    storage.check_writable(root)
    check_store(uri)
    groups = parameter_groups(model.named_parameters(), s.optim)
    return Prepared(s, uri, root, resumes, train, val, plan, worlds, sum(g.elements for g in groups), groups, report)
