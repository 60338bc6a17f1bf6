"""The settings of a training run: of each its name, its rule (the type), its default and its meaning.

A recipe states what differs from the defaults, one `group.field: value` a line. `Mutable` settings may differ when a
run is resumed; any other makes it another run.
Units: lengths in frames or pixels, rates per step, times in seconds. Every field is read somewhere; a field whose
default is None is derived where the comment says so.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from vswin_dist.choices import AttentionDesign, AttentionKernel, BiasIndex, GradientCheckpointing, Shift
from vswin_dist.config.rules import (
    Count,
    CountOrZero,
    FolderName,
    Fraction,
    Group,
    Magnitude,
    Mutable,
    Names,
    NonNegativeFloat,
    Ordered,
    Patterns,
    PositiveFloat,
    PositiveFraction,
    Rate,
    StepRange,
)
from vswin_dist.errors import ConfigError


@dataclass(frozen=True)
class RunSettings(Group):
    name: FolderName  # identifies the training: submitted again it resumes
    seed: CountOrZero = 0  # of initialisation, order, augmentation, dropout
    fresh: Mutable[bool] = False  # start over, although a training of this name exists
    take_over: Mutable[bool] = False  # from a driver of this name that is dead or cut off, without waiting for its lease


@dataclass(frozen=True)
class ModelSettings(Group):
    name: str  # preset of vswin_dist.models
    init: Mutable[str | None] = None  # models:/NAME@alias, a checkpoint file or URL; None starts from random weights
    init_ema: bool = False  # of a checkpoint that holds one, take the EMA copy of the weights
    inflate_embedding: Literal["inflate", "centre"] = "inflate"  # 2D patch embedding: over time | in its middle (table 8)
    inflate_bias: Literal["duplicate", "centre"] = "duplicate"  # 2D bias tables: over time | for the same frame (table 9)
    inflate_noise: NonNegativeFloat = 0.0  # in the patch embedding, so that it tells time's direction; 0: as published
    patch_size: tuple[Count, Count, Count] | None = None  # (T, H, W); None: the preset's
    window_size: tuple[Count, Count, Count] | None = None  # (T, H, W) in patches; None: the preset's
    drop_path_rate: Rate = 0.1  # of the last block; rises linearly from 0
    head_dropout: Rate = 0.5  # of the features before the classifier
    attention_design: AttentionDesign = "joint"  # attention over space and time (table 4)
    shift: Shift = "3d"  # of the windows (table 6)
    bias_index: BiasIndex = "offset"  # in a clamped window: by the true offset | as the published code counts
    gradient_checkpointing: Mutable[GradientCheckpointing] = "none"  # what is computed twice to hold less
    compile: Mutable[bool] = False  # forward and backward of training by torch.compile; ZeRO stages 0 to 2
    attention_kernel: Mutable[AttentionKernel] = "auto"  # of the windowed attention; auto: triton on CUDA


@dataclass(frozen=True)
class DataSettings(Group):
    train: Mutable[str]  # URL of the shards' folder or manifest
    val: Mutable[str | None] = None  # evaluated during training; None: no evaluation, the last checkpoint is registered
    sampling: Literal["dense", "uniform"] | None = None  # dense: `frames` frames `stride` apart | uniform: one frame of each
    # equal segment; None: as the training set's manifest says
    frames: Count = 32  # of a clip
    stride: Count = 2  # frames from one to the next (dense)
    size: Count = 224  # pixels of the square crop
    short_side: Count = 256  # of a test frame cut to one crop, in the scale of `size`; training and several crops do without
    crop_scale: Ordered[tuple[PositiveFraction, PositiveFraction]] = (0.08, 1.0)  # of a frame's area in a training crop
    crop_ratio: Ordered[tuple[PositiveFloat, PositiveFloat]] = (0.75, 1.3333)  # width / height of a training crop
    flip: Fraction = 0.5  # probability of a horizontal flip in training
    flip_labels: Literal["mirror", "keep"] = "mirror"  # mirror: a flipped left/right class becomes its counterpart, or is
    # not flipped
    rand_augment_ops: CountOrZero = 0  # RandAugment: operations on each clip; 0: none
    rand_augment_magnitude: Magnitude = 7  # of each operation, as in the published code
    erasing: Fraction = 0.0  # probability that a box of a training clip is erased
    mixup: NonNegativeFloat = 0.0  # alpha of the Beta distribution; 0: none
    cutmix: NonNegativeFloat = 0.0  # alpha of the Beta distribution; 0: none. With mixup, each pair takes one or the other
    subset: PositiveFraction = 1.0  # fraction of the training samples that is used, the same in every epoch
    classes: Names | None = None  # train and validate on these classes of the sets alone; None: all
    balance: Literal["none", "class"] = "none"  # none: each sample once an epoch | class: classes equally often
    repeats: Count = 1  # repeated augmentation: times that each sample stands in its global batch
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # of RGB in 0..255, subtracted
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)  # divided by
    workers: Mutable[CountOrZero] = 2  # decoding processes of each rank; 0 decodes in the training process
    prefetch: Mutable[Count] = 4  # batches that each of them prepares ahead
    test_views: Mutable[tuple[Count, Count]] = (4, 3)  # clips x crops that a trained model is scored on unless told
    pixel_format: Literal["rgb", "yuv", "native"] = "rgb"  # yuv: planes become RGB on the device; native: resized there too
    cache_gb: Mutable[NonNegativeFloat] = 0.0  # of whole shards kept on each node's disk; 0: samples are read by offset
    max_bad_samples: Mutable[Fraction] = 0.01  # of the samples read: so many may fail to decode


@dataclass(frozen=True)
class TrainingSettings(Group):
    workers: Mutable[Count] = 2  # ranks
    min_workers: Mutable[Count | None] = None  # elastic: ranks from here to `workers` that the batch divides by; None: no
    use_gpu: Mutable[bool] = False  # one GPU for each rank
    cpus_per_worker: Mutable[PositiveFloat] = 1.0  # reserved by Ray; also the threads of a CPU rank
    epochs: Count = 30  # passes over the training samples
    max_steps: Mutable[Count | None] = None  # stop after so many steps; the schedule is still that of `epochs`
    global_batch: Count = 64  # samples in one optimizer step, over all ranks
    micro_batch: Mutable[Count] = 1  # samples of one forward pass of one rank; the accumulation follows
    zero_stage: Mutable[Literal[0, 1, 2, 3]] = 1  # what is split over the ranks: optimizer states, gradients, weights
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of forward and backward; the master weights are fp32
    offload: Mutable[bool] = False  # master weights and moments in the host's memory, updated there; ZeRO stages 1 to 3
    ema_decay: Rate = 0.0  # of an average of the weights, in each step; 0: none
    deterministic: Mutable[bool] = False  # the same bits from run to run on a GPU, too: no sums by atomics
    checkpoint_every: Mutable[Count | None] = None  # steps; None: once an epoch
    keep_checkpoints: Mutable[Count] = 2  # newest that stay, beside the best
    max_failures: Mutable[CountOrZero] = 3  # restarts after a lost worker within one submission
    hang_s: Mutable[PositiveFloat] = 300.0  # silence after which a rank is ended and replaced; five times the slowest of the
    # last 50 steps where that is longer
    profile: Mutable[StepRange | None] = None  # FIRST..LAST: a trace of these steps of the main rank
    grace_s: Mutable[PositiveFloat] = 30.0  # from SIGTERM to the end; the step in hand and a checkpoint must fit


@dataclass(frozen=True)
class OptimSettings(Group):
    lr: PositiveFloat = 1e-3  # of the head, at its peak
    backbone_ratio: NonNegativeFloat = 0.1  # the backbone's learning rate / the head's
    layer_decay: PositiveFraction = 1.0  # learning rate of a block / that of the next, from the head down; 1: none
    param_groups: Literal["clean", "official", "mmaction2"] = "clean"  # which tensors are decayed and slowed
    freeze: Patterns | None = None  # parameters or modules that are not trained, by names in which * stands for anything
    freeze_epochs: Count | None = None  # how long; None: to the end
    weight_decay: NonNegativeFloat = 0.05  # decoupled, as in AdamW
    betas: tuple[Rate, Rate] = (0.9, 0.999)  # of the gradient's mean and of its square's
    eps: PositiveFloat = 1e-8  # added to the root of the second moment
    warmup_epochs: NonNegativeFloat = 2.5  # the learning rate rises linearly
    warmup_start: Fraction = 0.1  # first learning rate / peak
    schedule: Literal["step", "epoch"] = "step"  # cosine goes down at every step | epoch: at every epoch, as published
    gradient_clipping: NonNegativeFloat = 0.0  # of the global norm; 0: none
    label_smoothing: Rate = 0.0  # probability that is spread over all classes
    max_skipped_steps: Mutable[CountOrZero] = 0  # in a row, of a loss or gradient that is not finite; 0: the first ends it


@dataclass(frozen=True)
class EvaluationSettings(Group):
    every_epochs: Mutable[Count] = 1  # the last epoch is always evaluated
    clips: Mutable[Count] = 1  # views of a video in time during training
    crops: Mutable[Count] = 1  # and in space
    batch: Mutable[Count] = 8  # views in one forward pass of a rank
    ema: Mutable[bool] = False  # evaluate and register the averaged weights (training.ema_decay) in place of the last ones
    report: Mutable[bool] = True  # a page with pictures at each new best and at the end, in MLflow and beside checkpoints
    patience: Mutable[Count | None] = None  # evaluations without a better val/top1 that end the training; None: no end


@dataclass(frozen=True)
class TrackingSettings(Group):
    uri: Mutable[str | None] = None  # None: MLFLOW_TRACKING_URI, else sqlite in the data root
    experiment: Mutable[str] = "vswin"  # of MLflow; its runs are compared side by side
    parent: Mutable[str | None] = None  # id of the MLflow run that this is shown below, as a row of an ablation is
    register_as: Mutable[str | None] = None  # name of the registered model; None: the run's name


@dataclass(frozen=True)
class StorageSettings(Group):
    root: Mutable[str | None] = None  # checkpoints go to ROOT/RUN; None: runs/ in the data root
    s3_endpoint: Mutable[str | None] = None  # None: AWS, or AWS_ENDPOINT_URL_S3


@dataclass(frozen=True)
class Settings:
    run: RunSettings
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings = field(default_factory=TrainingSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    recipe: str = ""  # the recipe's name, for the record

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        """Refuse values that are right alone and wrong together."""
        if self.optim.warmup_epochs > self.training.epochs:
            raise ConfigError(
                f"optim.warmup_epochs={self.optim.warmup_epochs:g} is longer than the training of "
                f"training.epochs={self.training.epochs}: lower the one or raise the other"
            )
        if self.training.min_workers and self.training.min_workers > self.training.workers:
            raise ConfigError(
                f"training.min_workers={self.training.min_workers} is more than "
                f"training.workers={self.training.workers}: lower the one or raise the other"
            )
        if self.optim.freeze_epochs and not self.optim.freeze:
            raise ConfigError(
                f"optim.freeze_epochs={self.optim.freeze_epochs} with optim.freeze=null: nothing is frozen; name what "
                "is, as in optim.freeze=[patch_embed]"
            )
        if self.evaluation.ema and not self.training.ema_decay:
            raise ConfigError(
                "evaluation.ema=true with training.ema_decay=0: no average is kept; take a decay such as 0.9999"
            )
        if self.evaluation.patience and not self.data.val:
            raise ConfigError(
                f"evaluation.patience={self.evaluation.patience} with data.val=null: there is no val/top1; name a set, or "
                "evaluation.patience=null"
            )
        if self.training.precision == "fp16" and self.training.zero_stage and not self.training.use_gpu:
            raise ConfigError(
                f"training.precision=fp16 with training.zero_stage={self.training.zero_stage} on CPUs: DeepSpeed has none "
                "there; take training.use_gpu=true, training.precision=bf16 or training.zero_stage=0"
            )
        if self.training.offload and not self.training.zero_stage:
            raise ConfigError(
                "training.offload=true with training.zero_stage=0: what is not split is not moved; take stage 1, 2 or 3"
            )
        if self.model.compile and self.training.zero_stage == 3:
            raise ConfigError(
                "model.compile=true with training.zero_stage=3: the graph cannot hold weights that come and go; "
                "take stage 2 or model.compile=false"
            )
        if self.model.attention_kernel == "triton" and not self.training.use_gpu:
            raise ConfigError(
                "model.attention_kernel=triton with training.use_gpu=false: the kernel computes on CUDA devices; "
                "take training.use_gpu=true or model.attention_kernel=auto"
            )
        if self.data.pixel_format != "rgb" and self.data.size % 2:
            raise ConfigError(
                f"data.pixel_format={self.data.pixel_format} needs an even data.size, not {self.data.size}: "
                "chroma planes have half of it"
            )
        return self
