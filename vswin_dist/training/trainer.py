"""The training loop of one rank; read it top to bottom.

Shapes: B micro-batch of a rank, T frames, H x W pixels, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vswin_dist.config import Settings
from vswin_dist.data.loader import Batch, TrainLoader
from vswin_dist.data.plan import Plan, make_plan, validation_set
from vswin_dist.data.quarantine import CorruptSample, Ledger
from vswin_dist.data.transforms.batch_transform import BatchTransform
from vswin_dist.data.transforms.mixing import cross_entropy
from vswin_dist.device import STEPS_LEFT, Rank, peak_memory
from vswin_dist.errors import WorkFailed
from vswin_dist.evaluation.evaluate import Views, evaluate
from vswin_dist.manifest import Manifest, read_manifest
from vswin_dist.model_card import ModelCard, preprocessing_of
from vswin_dist.models.stochastic import sample_keys
from vswin_dist.tracking import Run, RunReference
from vswin_dist.training import checkpoint, run_record, validated
from vswin_dist.training.checkpoint import CheckpointWriter, Position, Saved
from vswin_dist.training.early_stop import EarlyStop
from vswin_dist.training.engine import Engine, be_deterministic
from vswin_dist.training.heartbeat import Heartbeat
from vswin_dist.training.initial_model import initial_model
from vswin_dist.training.optim import learning_rate_factor, parameter_groups
from vswin_dist.training.profiler import StepProfiler, steps_of
from vswin_dist.training.skipped_steps import SkippedSteps
from vswin_dist.training.step_metrics import StepMetrics, average
from vswin_dist.training.step_timer import StepTimer, timed, times
from vswin_dist.training.stop_request import StopRequest, StopWatch
from vswin_dist.training.utilisation import Utilisation

SENT_WITHIN_S = 2.0  # what a checkpoint waits at most for the metrics before it to be sent
LOG_EVERY = 10  # steps whose metrics are fetched from the device and sent together

Report = Callable[[dict[str, float], str | None], None]  # metrics, URL of the checkpoint (None: not the main rank)


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver hands to every rank, so that Ray can ship it."""

    settings: Settings
    checkpoints: str  # URL of the folder of this run's checkpoints
    run: RunReference
    lineage: dict[str, Any] = field(default_factory=dict)
    submission: str = ""  # another for each time that the driver starts the ranks
    classes: int = 0  # of the training set


@dataclass(frozen=True)
class Due:
    """What follows a step."""

    log: bool
    evaluate: bool
    save: bool


@dataclass
class Trainer:
    """A training run on one rank: `Trainer.build(...).run()`. All ranks call the same methods in the same order."""

    config: WorkerConfig
    rank: Rank
    manifest: Manifest
    val: Manifest | None
    plan: Plan
    engine: Engine
    loader: TrainLoader
    transform: BatchTransform
    ledger: Ledger
    tracking: Run  # a null one on all ranks but the main one
    report: Report
    last_step: int
    stop: StopWatch | None = None  # on the main rank: whether the driver was told to stop
    pending: list[StepMetrics] = field(default_factory=list)  # of the steps that are not logged yet
    began: float = 0.0  # when the first of them did
    beside: dict[str, Callable[[], bytes]] = field(default_factory=dict)  # what the next checkpoint holds, too
    timer: StepTimer = field(default_factory=StepTimer)
    profiler: StepProfiler = field(default_factory=StepProfiler)
    utilisation: Utilisation = field(default_factory=Utilisation)
    writer: CheckpointWriter = field(init=False)
    skipped: SkippedSteps = field(init=False)
    early: EarlyStop = field(init=False)

    @classmethod
    def build(cls, config: WorkerConfig, rank: Rank, tracking: Run, report: Report, heartbeat: Heartbeat) -> Trainer:
        """Read the data's manifests and put everything together; nothing is trained yet."""
        s = config.settings
        if s.training.deterministic:
            be_deterministic()
        manifest = read_manifest(s.data.train)
        plan = make_plan(manifest, s.data, s.run.seed, s.training.global_batch)
        total = plan.steps_per_epoch * s.training.epochs
        last_step = min(total, s.training.max_steps or total)
        loader = TrainLoader(manifest, s.data, plan, rank, s.training.micro_batch, last_step)
        heartbeat.beat("start")
        model, _ = initial_model(s, len(manifest.classes), config.run.uri)
        heartbeat.beat("start")
        utilisation = Utilisation.of(model, s, rank)
        groups = parameter_groups(model, s.optim)
        engine = Engine(model, groups, s.training, s.optim, loader.accumulation, rank.device)
        transform = BatchTransform(s.data, plan, len(manifest.classes), rank.device, engine.input_dtype)
        ledger = Ledger(config.checkpoints, manifest, s.data.train)
        val = validation_set(s.data)
        stop = StopWatch(StopRequest(config.checkpoints, config.submission)) if rank.is_main else None
        parts = (manifest, val, plan, engine, loader, transform, ledger)
        timer = StepTimer(rank.device, heartbeat)
        profiled = steps_of(s.training.profile if rank.is_main else None, last_step)
        made = cls(config, rank, *parts, tracking, report, last_step, stop, timer=timer, utilisation=utilisation)
        made.profiler = StepProfiler(profiled, config.checkpoints, tracking)
        return made

    def __post_init__(self) -> None:
        """Begin the counts that a checkpoint goes on with, and make what writes it."""
        s = self.settings
        self.early = EarlyStop(s.evaluation.patience)
        scaled = s.training.precision == "fp16"
        self.skipped = SkippedSteps(s.optim.max_skipped_steps, scaled, self.config.checkpoints, self.plan, self.manifest)
        self.writer = CheckpointWriter(
            self.config.checkpoints,
            self.rank,
            s.training.keep_checkpoints,
            on_saved=self.report_saved,
            # Ranks may end right after a commit, and what resumes logs none of its steps again.
            before_commit=partial(self.tracking.keep, SENT_WITHIN_S),
            fence=self.config.run.fence,
            waiting=lambda: self.timer.heartbeat.beat("checkpoint", self.timer.heartbeat.last.step),
        )

    @property
    def settings(self) -> Settings:
        """The settings of the run, complete."""
        return self.config.settings

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the last step.

        Raises:
            WorkFailed: losses or gradients are not finite. DataError: too many corrupt samples, or shards that changed.
        """
        done = start = self.restore()
        batches = iter(self.loader)
        self.began = time.perf_counter()
        for step in range(start, self.last_step):
            with self.profiler(step + 1):
                self.pending.append(self.train_step(step, batches))
            stopping = self.rank.any(self.stop is not None and self.stop.seen)
            done, due = step + 1, self.due(step + 1, stopping)
            if due.log:
                self.log_steps()
            metrics = self.evaluate(done) if due.evaluate else {}
            if due.save:
                self.save(done, metrics)
            self.writer.progress()
            if stopping and done < self.last_step:
                self.writer.finish()
                self.rank.print(f"stopped after step {done}; the same command goes on from there")
                break
            if done == self.last_step:  # which an evaluation may have brought forward
                break
            if not self.pending:
                self.began = time.perf_counter()
        self.writer.finish()
        self.log_memory(done)

    def due(self, done: int, stopping: bool = False) -> Due:
        """Say what follows when `done` steps are done, and whether the training is `stopping` there."""
        s, last = self.settings, done == self.last_step
        epoch, within = divmod(done, self.plan.steps_per_epoch)
        saves = last or done % (s.training.checkpoint_every or self.plan.steps_per_epoch) == 0
        evaluates = self.val is not None and (last or (within == 0 and epoch % s.evaluation.every_epochs == 0))
        return Due(
            log=stopping or saves or within == 0 or len(self.pending) == LOG_EVERY,
            evaluate=evaluates and (last or not stopping),
            save=stopping or saves or evaluates,
        )

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepMetrics:
        """Take one optimizer step: its micro-batches forward and backward, then the update.

        DeepSpeed adds up the gradients of the micro-batches, averages them over the ranks and clips them; `engine.step`
        updates after the last micro-batch and only counts the others.
        """
        s, engine, device, timer = self.settings, self.engine, self.rank.device, self.timer
        factor = learning_rate_factor(step, self.plan.steps_per_epoch, s.training.epochs, s.optim)
        epoch = step // self.plan.steps_per_epoch
        rates = {f"lr/{g.label}": r for g, r in zip(engine.groups, engine.set_learning_rate(factor, epoch), strict=True)}
        loss_sum = torch.zeros((), device=device)
        corrupt: list[CorruptSample] = []
        micro_batch, accumulation = s.training.micro_batch, self.loader.accumulation
        first = self.rank.rank * accumulation * micro_batch  # position of this rank's first clip in the global batch
        for position in range(first, first + accumulation * micro_batch, micro_batch):
            with timer("data", step + 1):
                batch = next(batches)
            corrupt += batch["corrupt"]
            with timer("forward", step + 1):
                clips, targets = self.transform(batch, step, position)  # [B, 3, T, H, W]; [B] or [B, K]
                keys = sample_keys(s.run.seed, step, batch["occurrences"].to(device, non_blocking=True))
                logits = engine.forward(clips, keys)  # [B, K]
                loss = cross_entropy(logits, targets, s.optim.label_smoothing)
            with timer("backward", step + 1):
                engine.backward(loss)
            with timer("optimizer", step + 1):
                engine.step()
            loss_sum += loss.detach()
        return StepMetrics(step, loss_sum / accumulation, engine.gradient_norm(), rates, corrupt, engine.outcome)

    def log_steps(self) -> None:
        """Log the pending steps, and enter the corrupt samples that were met; stops the run beyond their budget.

        A step alone cannot be timed on a GPU, which is still at work when the host goes on; here the host waits for it.
        Each pending step is given the mean since the first of them began.
        """
        self.timer.heartbeat.beat("log", self.pending[-1].step + 1)
        found, corrupt = average(self.pending, self.rank)
        with self.writer.kept():
            self.skipped.check(self.pending, found, self.rank)
        seconds = (time.perf_counter() - self.began) / len(self.pending)  # of a step
        clips = self.plan.global_batch / seconds
        spent = times(self.timer.take(), len(self.pending))
        wait = spent.get("time/data_s", 0.0) / seconds
        for metrics, (loss, norm) in zip(self.pending, found, strict=True):
            values = {"train/loss": loss, "train/grad_norm": norm, "epoch": (metrics.step + 1) / self.plan.steps_per_epoch}
            speed = {"train/clips_per_second": clips, "train/data_wait_share": wait}
            known = {name: value for name, value in values.items() if math.isfinite(value)}  # not those of a skipped step
            self.tracking.log(metrics.step + 1, known | speed | metrics.rates)
        done, mean = self.pending[-1].step + 1, sum(loss for loss, _ in found) / len(found)
        spent["time/other_s"] = max(0.0, seconds - sum(spent.values()))
        self.tracking.log(done, spent | self.utilisation.metrics(seconds) | self.skipped.metrics | self.loader.metrics)
        self.rank.print(
            f"step {done}/{self.last_step}  loss {mean:.4f}  {clips:.1f} clips/s  data wait {wait:.0%}  "
            f"about {seconds * (self.last_step - done):.0f} s left"
        )
        self.pending.clear()
        self.quarantine(corrupt, done)

    def quarantine(self, corrupt: list[CorruptSample], done: int) -> None:
        """Enter `corrupt` into the ledger, the same on all ranks; the main one writes it.

        Raises:
            DataError: more than `data.max_bad_samples` of the samples read so far are corrupt.
        """
        if corrupt:
            self.ledger.add(corrupt)
            if self.rank.is_main:
                self.config.run.fence.check()
                self.ledger.write()
            count = len(self.ledger.entries)
            self.rank.print(f"step {done}: {count} corrupt samples do not decode and were replaced; see {self.ledger.url}")
            self.rank.barrier()  # a rank that stops ends the others: not before the ledger is written
        self.tracking.log(done, self.ledger.metrics)
        with self.writer.kept():
            self.ledger.check(self.plan, done, self.settings.data.max_bad_samples)

    @timed("evaluation")
    def evaluate(self, done: int) -> dict[str, float]:
        """Score the validation set with the current weights; the same metrics on every rank."""
        s = self.settings
        assert self.val and s.data.val
        views = Views(s.evaluation.clips, s.evaluation.crops, s.evaluation.batch)
        beat = partial(self.timer.heartbeat.beat, "evaluation", done)
        with self.engine.full_module(averaged=s.evaluation.ema) as module:
            found = evaluate(module, self.val, s.data.val, s.data, views, self.rank, self.engine.input_dtype, beat)
        scores = found.scores(self.val)
        self.beside = {validated.FILE: partial(validated.to_parquet, found, self.val, views, done)}
        self.tracking.log(done, scores.metrics())
        self.rank.print(f"step {done}: {scores}")
        self.early.see(scores.metrics())
        self.stop_early(done)
        return scores.metrics()

    def stop_early(self, done: int) -> None:
        """Make `done` the last step where the validation no longer gets better."""
        if self.early.is_due and done < self.last_step:
            best, since = self.early.best, self.early.since
            self.rank.print(f"step {done}: evaluations in a row that were not above {best:.2%}: {since}; the training ends")
            self.last_step = done

    @timed("checkpoint")
    def save(self, done: int, metrics: dict[str, float]) -> None:
        """Begin the checkpoint after `done` steps, which is written while the training goes on."""
        card = ModelCard(
            dict(self.engine.module.settings),  # type: ignore[arg-type]
            self.manifest.classes,
            preprocessing_of(self.settings.data),
            self.config.lineage | {"step": done, **metrics},
        )
        beside, self.beside = self.beside, {}
        stall = self.writer.save(self.position(done, metrics), self.engine.state(), card, beside)
        self.tracking.log(done, {"checkpoint/wait_s": stall.wait_s, "checkpoint/snapshot_s": stall.snapshot_s})

    def report_saved(self, saved: Saved) -> None:
        """Tell Ray of a checkpoint that is committed; every rank takes part."""
        p = saved.position
        self.tracking.log(p.step, {"checkpoint/write_s": saved.write_s})
        epoch = p.step / self.plan.steps_per_epoch
        reported = {"step": p.step, STEPS_LEFT: self.last_step - p.step, "epoch": epoch, **p.metrics}
        self.report(reported, saved.url if self.rank.is_main else None)

    def position(self, done: int, metrics: dict[str, float]) -> Position:
        """Describe where the run stands after `done` steps."""
        epoch, within = divmod(done, self.plan.steps_per_epoch)
        return Position(
            step=done,
            epoch=epoch,
            samples_into_epoch=within * self.plan.global_batch,
            run_id=self.config.run.run_id,
            fingerprint=self.manifest.fingerprint,
            settings=run_record.recorded(self.settings) | {"model.init": self.config.lineage.get("initialised_from")},
            data=self.loader.state_dict(),
            metrics=metrics,
            groups=self.engine.group_records(),
            skipped_steps=self.skipped.total,
            skipped_in_row=self.skipped.in_row,
            loss_scale=self.engine.loss_scale_state(),
            best_top1=self.early.best,
            evaluations_since_best=self.early.since,
        )

    def restore(self) -> int:
        """Load the newest checkpoint, if there is one, and the ledger; returns the steps done.

        The main rank removes what a killed save has left, and chooses for all: they may see a listing at different times.
        """
        url, done = "", 0
        self.timer.heartbeat.beat("start")
        self.writer.claim()
        if self.rank.is_main:
            newest = checkpoint.newest_whole(self.config.checkpoints)
            url = newest.url if newest else ""
            checkpoint.begin(self.config.checkpoints, newest.position.step if newest else 0, self.config.run.fence)
        url = self.rank.broadcast(url)
        if not url and self.config.lineage.get("initialised_from") and not self.settings.model.init:
            raise WorkFailed(
                f"no checkpoint in {self.config.checkpoints} is whole; what is damaged was renamed to damaged-... The same "
                "command begins again with the weights that the training was started from."
            )
        if url:
            position = checkpoint.read_position(url)
            self.engine.load_weights(checkpoint.load_weights(url))
            self.engine.load_moments(checkpoint.load_moments(url), position.step, position.groups)
            self.engine.load_loss_scale(position.loss_scale)
            self.skipped.total, self.skipped.in_row = position.skipped_steps, position.skipped_in_row
            self.early.best, self.early.since = position.best_top1, position.evaluations_since_best
            self.loader.load_state_dict(position.data)
            done = position.step
            self.rank.print(f"resumed from {url}")
        self.stop_early(done)
        self.ledger.load()
        self.ledger.check(self.plan, done, self.settings.data.max_bad_samples)
        self.rank.print(
            f"{self.plan.epoch_samples} samples, {self.plan.steps_per_epoch} steps an epoch, {self.plan.left_out} left out "
            f"of each; {self.rank.world_size} ranks x {self.settings.training.micro_batch} x {self.loader.accumulation}; "
            f"steps {done}..{self.last_step}"
        )
        return done

    def log_memory(self, done: int) -> None:
        """Print and log, after `done` steps, each rank's peak memory: of the device, or of its process on a CPU."""
        peaks = self.rank.gather(peak_memory(self.rank.device) / 2**30)
        self.rank.print(f"peak memory per rank: {', '.join(f'{p:.2f}' for p in peaks)} GiB")
        self.tracking.log(done, {f"system/peak_memory_gib_rank_{r}": p for r, p in enumerate(peaks)})
