"""Check what needs no worker: storage, shards, labels, checkpoint layout, batch arithmetic."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from vswin_dist import models, storage
from vswin_dist.config import Settings
from vswin_dist.data.plan import fitting_world_sizes, make_plan, validation_set
from vswin_dist.data.sampling import resolve
from vswin_dist.data.transforms.mixing import check_pairs
from vswin_dist.errors import before_start
from vswin_dist.manifest import Manifest, check_same_classes, check_shard_sizes, read_manifest
from vswin_dist.tracking import Names, check_store, tracking_uri
from vswin_dist.training import run_record
from vswin_dist.training.initial_model import initial_weights, load, model_overrides, pinned
from vswin_dist.training.optim import parameter_groups
from vswin_dist.training.spec import TrainingSpec


def preflight(s: Settings) -> TrainingSpec:
    """Check that the run `s` can start, writing nothing but a probe where its checkpoints will go.

    What `s` leaves to the data is decided here, and nowhere else; the run trains with `TrainingSpec.settings`.

    Raises:
        ConfigError, DataError, CheckpointError, PreflightError: what is wrong, with the values.
    """
    storage.use_s3_endpoint(s.storage.s3_endpoint)
    with before_start():
        return _preflight(s)


def _preflight(s: Settings) -> TrainingSpec:
    uri = tracking_uri(s.tracking.uri)
    root = storage.join(run_record.runs_root(s), s.run.name)
    s, train, val = resolve_data(s)
    t = s.training
    world_sizes = fitting_world_sizes(t.global_batch, t.min_workers or t.workers, t.workers, t.micro_batch)
    check_pairs(s.data, t.micro_batch)
    plan = make_plan(train, s.data, s.run.seed, t.global_batch)
    with torch.device("meta"):
        model = models.build_model(s.model.name, num_classes=len(train.classes), **model_overrides(s))
    resumes = run_record.to_resume(s, root, train.fingerprint, plan.steps_per_epoch * t.epochs)
    s = replace(s, model=replace(s.model, init=resumes.settings["model.init"] if resumes else pinned(s.model.init, uri)))
    report = ""
    if s.model.init and not resumes:
        report = str(load(model, initial_weights(s.model.init, uri), s, dry_run=True))
    storage.check_writable(root)
    resumed = resumes.run_id if resumes else ""
    names = Names(run_id=resumed) if resumed else Names(experiment=s.tracking.experiment)
    check_store(uri, replace(names, model=run_record.registered_name(s)))
    groups = parameter_groups(model, s.optim)
    return TrainingSpec(
        settings=s,
        tracking_uri=uri,
        root=root,
        resumes=resumes,
        number=resumes.number if resumes else run_record.next_number(root),
        train=train,
        val=val,
        plan=plan,
        world_sizes=world_sizes,
        parameters=sum(g.elements for g in groups),
        groups=groups,
        load_report=report,
    )


def resolve_data(s: Settings) -> tuple[Settings, Manifest, Manifest | None]:
    """Read the sets' manifests and decide what the settings leave to them; both are checked against their shards."""
    train = read_manifest(s.data.train)
    check_shard_sizes(train, s.data.train)
    data, warning = resolve(s.data, train)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    val = validation_set(data)
    if val and data.val:
        check_same_classes(train.classes, val.classes, f"the validation set {data.val}")
        check_shard_sizes(val, data.val)
    return replace(s, data=data), train, val
