"""The training loop of one rank; read it top to bottom.

Shapes: B micro-batch of a rank, T frames, H x W pixels, K classes.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from vswin_dist.config import Settings, from_flat
from vswin_dist.data.augment import augment_draws
from vswin_dist.data.loader import Batch, TrainLoader
from vswin_dist.data.mixing import cross_entropy, mix
from vswin_dist.data.plan import Plan, make_plan, validation_set
from vswin_dist.data.quarantine import Bad, Ledger
from vswin_dist.data.transforms import normalise, to_rgb
from vswin_dist.errors import WorkFailed
from vswin_dist.evaluation.evaluate import Rank, Views, evaluate
from vswin_dist.manifest import Manifest, read_manifest
from vswin_dist.models.stochastic import sample_keys
from vswin_dist.serving.export import ModelCard, preprocessing_of
from vswin_dist.tracking.metrics import MetricLogger
from vswin_dist.training import checkpoint
from vswin_dist.training.checkpoint import Position
from vswin_dist.training.engine import Engine
from vswin_dist.training.optim import learning_rate_factor, parameter_groups
from vswin_dist.training.start import be_deterministic, initial_model

SENT_WITHIN_S = 2.0  # what a checkpoint waits at most for the metrics before it to be sent
STEPS_LEFT = "steps_left"  # the reported metric that says whether more ranks are worth a restart
LOG_EVERY = 10  # steps whose figures are fetched from the device and sent together


@dataclass(frozen=True)
class Job:
    """What the driver hands to every rank: plain values, so that Ray can ship them."""

    settings: dict[str, Any]  # flat
    root: str  # URL of this run's checkpoints
    run_id: str
    tracking_uri: str
    lineage: dict[str, Any] = field(default_factory=dict)
    submission: str = ""  # another for each time that the driver starts the ranks


Report = Callable[[dict[str, float], str | None], None]  # metrics, URL of the checkpoint


def train(job: Job, rank: Rank, report: Report) -> None:
    """Train from the last checkpoint of `job` (or its start) to its end; called on every rank."""
    logger = MetricLogger(job.tracking_uri, job.run_id) if rank.rank == 0 else None
    try:
        run(job, rank, report, logger)
    finally:  # what was measured before a failure tells why
        if logger:
            logger.close()


def run(job: Job, rank: Rank, report: Report, logger: MetricLogger | None) -> None:
    """`train`, with the logger that rank 0 has."""
    s = from_flat(job.settings)
    if s.training.deterministic:
        be_deterministic()
    manifest = read_manifest(s.data.train)
    val = validation_set(s.data)
    plan = make_plan(manifest, s.data, s.run.seed, s.training.global_batch)
    total = plan.steps_per_epoch * s.training.epochs
    last = min(total, s.training.max_steps or total)
    loader = TrainLoader(manifest, s.data, plan, rank.rank, rank.world, s.training.micro_batch, last,
                         pin=rank.device.type == "cuda")
    accumulation = loader.accumulation

    model, _ = initial_model(s, len(manifest.classes), job.tracking_uri)
    engine = Engine(model, parameter_groups(model.named_parameters(), s.optim), s.training, s.optim, accumulation,
                    rank.device)
    start = restore(engine, loader, job.root, rank)
    ledger = Ledger(job.root, manifest, s.data.train)
    ledger.load()
    ledger.check(plan, start, s.data.max_bad_samples)
    if rank.rank == 0:
        print(f"{plan.epoch_samples} samples, {plan.steps_per_epoch} steps an epoch, {plan.left_out} left out of "
              f"each; {rank.world} ranks x {s.training.micro_batch} x {accumulation}; steps {start}..{last}", flush=True)

    batches = iter(loader)
    pending: list[StepFigures] = []
    began = time.perf_counter()  # of the steps that are pending
    for step in range(start, last):
        factor = learning_rate_factor(step, plan.steps_per_epoch, s.training.epochs, s.optim)
        rates = engine.set_learning_rate(factor)
        pending.append(train_step(engine, batches, step, accumulation, s, rank, len(manifest.classes), plan))
        pending[-1].values |= {f"lr/{g.label}": r for g, r in zip(engine.groups, rates, strict=True)}

        done = step + 1
        epoch_ends = done % plan.steps_per_epoch == 0
        every = s.training.checkpoint_every or plan.steps_per_epoch
        saving = done % every == 0 or done == last
        if saving or epoch_ends or len(pending) == LOG_EVERY:
            bad = flush(pending, began, plan, logger, rank, last)
            quarantine(ledger, bad, done, plan, s, rank, logger)
        metrics: dict[str, float] = {}
        if val and (done == last or (epoch_ends and (done // plan.steps_per_epoch) % s.evaluation.every_epochs == 0)):
            metrics = validate(engine, val, s, rank, logger, done)
        if saving or metrics:
            if logger:  # ranks may end right after it, and what goes on from it logs none of its steps again
                logger.flush(SENT_WITHIN_S)
            url = save(engine, job, s, manifest, loader, done, metrics, rank)
            report({"step": done, STEPS_LEFT: last - done, "epoch": done / plan.steps_per_epoch, **metrics}, url)
        if not pending:
            began = time.perf_counter()
    report_memory(rank, logger, last)


def report_memory(rank: Rank, logger: MetricLogger | None, step: int) -> None:
    """Print and log each rank's peak memory: of the device, or of the process where that is the CPU."""
    if rank.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(rank.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks: list[float] = [0.0] * rank.world
    dist.all_gather_object(peaks, peak / 2**30)
    if logger:
        print(f"peak memory per rank: {', '.join(f'{p:.2f}' for p in peaks)} GiB", flush=True)
        logger.log(step, {f"system/peak_memory_gib_rank_{r}": p for r, p in enumerate(peaks)})


@dataclass
class StepFigures:
    """What is known of one step; tensors stay on the device until they are flushed, so that no step waits for it."""

    step: int
    loss: torch.Tensor  # of this rank, mean over its micro-batches
    grad_norm: torch.Tensor
    waited: float  # seconds for data
    values: dict[str, float]
    bad: list[Bad]  # videos of this rank's batches that did not decode


def train_step(engine: Engine, batches: Iterator[Batch], step: int, accumulation: int, s: Settings,
               rank: Rank, classes: int, plan: Plan) -> StepFigures:
    """One optimizer step: `accumulation` micro-batches forward and backward, then the update."""
    waited = 0.0
    loss_sum = torch.zeros((), device=rank.device)
    place = rank.rank * accumulation * s.training.micro_batch  # of the next clip in the global batch
    bad: list[Bad] = []
    for _ in range(accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        bad += batch["bad"]
        clips = batch["clips"].to(rank.device, non_blocking=True)
        if s.data.pixel_format == "yuv":
            clips = augment_draws(to_rgb(clips), s.data, plan, step, batch["draws"])
        clips = normalise(clips, s.data.mean, s.data.std, engine.input_dtype)  # [B, 3, T, H, W]
        labels = batch["labels"].to(rank.device, non_blocking=True)  # [B]
        clips, targets = mix(clips, labels, classes, s.data, s.run.seed, step, place)
        place += len(clips)
        keys = sample_keys(s.run.seed, step, batch["draws"].to(rank.device, non_blocking=True))
        logits = engine.forward(clips, keys)  # [B, K]
        loss = cross_entropy(logits, targets, s.optim.label_smoothing)
        engine.backward(loss)
        engine.step()
        loss_sum += loss.detach()
    return StepFigures(step, loss_sum / accumulation, engine.gradient_norm(), waited, {}, bad)


def flush(pending: list[StepFigures], began: float, plan: Plan, logger: MetricLogger | None, rank: Rank,
          last: int) -> list[Bad]:
    """Average the pending losses over the ranks in one operation; rank 0 logs them. Empties `pending`.

    A step alone cannot be timed on a GPU, which is still at work when the host goes on; here the host waits for it. Each
    pending step is given the mean since `began`.

    Returns:
        What did not decode on any rank, the same on all of them.

    Raises:
        WorkFailed: a loss or the norm of a gradient is not finite; on all ranks alike, and before that step is saved.
    """
    bad = [b for f in pending for b in f.bad]
    losses = torch.stack([*(f.loss for f in pending), torch.full((), float(len(bad)), device=rank.device)])
    if rank.world > 1:
        dist.all_reduce(losses)
        if losses[-1] > 0:
            parts: list[list[Bad]] = [[]] * rank.world
            dist.all_gather_object(parts, bad)
            bad = [b for part in parts for b in part]
        losses /= rank.world
    found: list[tuple[float, float]] = torch.stack([losses[:-1], torch.stack([f.grad_norm for f in pending])]).T.tolist()
    seconds = (time.perf_counter() - began) / len(pending)  # of a step
    for figures, (loss, norm) in zip(pending, found, strict=True):
        check_finite(figures.step + 1, loss, norm)
    if logger:
        clips, wait = plan.global_batch / seconds, sum(f.waited for f in pending) / len(pending) / seconds
        for figures, (loss, norm) in zip(pending, found, strict=True):
            done = figures.step + 1
            logger.log(done, {"train/loss": loss, "train/grad_norm": norm, "epoch": done / plan.steps_per_epoch,
                              "train/clips_per_second": clips, "train/data_wait_share": wait, **figures.values})
        mean = sum(loss for loss, _ in found) / len(found)
        print(f"step {done}/{last}  loss {mean:.4f}  {clips:.1f} clips/s  data wait {wait:.0%}  "
              f"about {seconds * (last - done):.0f} s left", flush=True)
    pending.clear()
    return bad


def check_finite(step: int, loss: float, norm: float) -> None:
    """Stop a training whose weights are lost, or whose step was left out; see `flush`."""
    if math.isfinite(loss) and math.isfinite(norm) and norm >= 0:  # DeepSpeed's -1 is a norm that is not finite
        return
    what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
    raise WorkFailed(f"{what} at step {step}; no checkpoint was written from there on. Start over (another run.name, or "
                     "run.fresh=true) with a lower optim.lr, optim.gradient_clipping=1 or training.precision=fp32.")


def quarantine(ledger: Ledger, bad: list[Bad], done: int, plan: Plan, s: Settings, rank: Rank,
               logger: MetricLogger | None) -> None:
    """Enter `bad` into the ledger, the same on all ranks; rank 0 writes it. Stops the training beyond the budget."""
    if bad:
        ledger.add(bad)
        if logger:
            ledger.write()
            print(f"step {done}: {len(ledger.entries)} videos do not decode and were replaced; see {ledger.url}", flush=True)
        if rank.world > 1:
            dist.barrier()  # a rank that stops ends the others: not before the ledger is written
    if logger:
        logger.log(done, ledger.metrics)
    ledger.check(plan, done, s.data.max_bad_samples)


def validate(engine: Engine, val: Manifest, s: Settings, rank: Rank, logger: MetricLogger | None,
             step: int) -> dict[str, float]:
    """Score the validation set with the current weights; the same metrics on every rank."""
    assert s.data.val
    views = Views(s.evaluation.clips, s.evaluation.crops, s.evaluation.batch)
    with engine.full_module() as module:
        scores = evaluate(module, val, s.data.val, s.data, views, rank, engine.input_dtype)
    if logger:
        logger.log(step, scores.metrics())
        print(f"step {step}: {scores}", flush=True)
    return scores.metrics()


def save(engine: Engine, job: Job, s: Settings, manifest: Manifest, loader: TrainLoader, step: int,
         metrics: dict[str, float], rank: Rank) -> str | None:
    """Write the checkpoint of `step`; every rank takes part, rank 0 writes and returns its URL."""
    first = rank.rank == 0
    weights = {n: t.cpu().clone() for n, t in engine.weights() if first}
    moments = {n: t.cpu().clone() for n, t in engine.moments() if first}
    url = None
    if first:
        epoch, within = divmod(step, loader.plan.steps_per_epoch)
        position = Position(
            step=step, epoch=epoch, samples_into_epoch=within * loader.plan.global_batch, run_id=job.run_id,
            fingerprint=manifest.fingerprint, settings=job.settings, data=loader.state_dict(), metrics=metrics,
            groups=[{"label": g.label, "lr_factor": g.lr_factor, "weight_decay": g.weight_decay, "names": g.names}
                    for g in engine.groups])
        card = ModelCard(dict(engine.module.settings),  # type: ignore[arg-type]
                         manifest.classes, preprocessing_of(s.data),
                         job.lineage | {"step": step, **metrics})
        url = checkpoint.save(job.root, position, weights, moments, card)
        checkpoint.prune(job.root, s.training.keep_checkpoints)
    if rank.world > 1:
        dist.barrier()
    return url


def restore(engine: Engine, loader: TrainLoader, root: str, rank: Rank) -> int:
    """Load the newest checkpoint below `root` into engine and loader; returns the steps done (0: there is none).

    Rank 0 removes what a killed save has left, and chooses for all ranks: they may see a listing at different times.
    """
    newest = [""]
    if rank.rank == 0:
        checkpoint.clean(root)
        newest += [f.url for f in checkpoint.list_checkpoints(root)]
    newest = newest[-1:]
    if rank.world > 1:
        dist.broadcast_object_list(newest, src=0)
    [url] = newest
    if not url:
        return 0
    position = checkpoint.read_position(url)
    engine.load_weights(checkpoint.load_tensors(url, checkpoint.MODEL))
    engine.load_moments(checkpoint.load_tensors(url, checkpoint.OPTIMIZER), position.step)
    loader.load_state_dict(position.data)
    if rank.rank == 0:
        print(f"resumed from {url}", flush=True)
    return position.step
