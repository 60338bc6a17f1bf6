"""The typed settings of a training. A recipe is one value for each field, written ``group.field: value``.

Units: lengths in frames or pixels, rates per step, times in seconds. Every field is read somewhere; a field whose
default is None is derived where the comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunSettings:
    name: str  # identifies the training: submitted again it resumes
    seed: int = 0  # of initialisation, order, augmentation, dropout
    fresh: bool = False  # start over, although a training of this name exists


@dataclass(frozen=True)
class ModelSettings:
    name: str  # preset of vswin_dist.models
    init: str | None = None  # models:/NAME@alias, a checkpoint file or URL; None starts from random weights
    inflate_embedding: str = "inflate"  # 2D patch embedding: inflate over time | centre: in the middle slice (table 8)
    inflate_bias: str = "duplicate"  # 2D bias tables: duplicate over time | centre: for the same frame (table 9)
    inflate_noise: float = 0.0  # in the patch embedding, so that it tells time's direction; 0: as published
    patch_size: tuple[int, ...] | None = None  # (T, H, W); None: the preset's
    window_size: tuple[int, ...] | None = None  # (T, H, W) in patches; None: the preset's
    drop_path_rate: float = 0.1  # of the last block; rises linearly from 0
    head_dropout: float = 0.5
    attention_design: str = "joint"  # joint | split | factorized
    shift: str = "3d"  # 3d | spatial | none
    bias_index: str = "offset"  # offset | official
    gradient_checkpointing: str = "none"  # none | block | stage | selective
    compile: bool = False  # forward and backward of training by torch.compile; ZeRO stages 0 to 2
    attention_kernel: str = "plain"  # of the windowed attention: plain | triton, on CUDA devices alone


@dataclass(frozen=True)
class DataSettings:
    train: str  # URL of the shards' folder or manifest
    val: str | None = None  # evaluated during training; None: no evaluation, the last checkpoint is registered
    sampling: str | None = None  # dense: `frames` frames `stride` apart | uniform: one frame of each equal segment;
    # None: as the training set's manifest says
    frames: int = 32  # of a clip
    stride: int = 2  # frames from one to the next (dense)
    size: int = 224  # pixels of the square crop
    short_side: int = 256  # of a test frame cut to one crop: `size` of so many pixels; training and several crops do without
    crop_scale: tuple[float, ...] = (0.08, 1.0)  # share of the frame's area that a training crop takes
    crop_ratio: tuple[float, ...] = (0.75, 1.3333)  # width / height of a training crop
    flip: float = 0.5  # probability of a horizontal flip in training
    flip_labels: str = "mirror"  # mirror: a flipped left/right class becomes its counterpart, or is not flipped | keep
    rand_augment_ops: int = 0  # RandAugment: operations on each clip; 0: none
    rand_augment_magnitude: int = 7  # of each operation, 0 to 30, as in the published code
    erasing: float = 0.0  # probability that a box of a training clip is erased
    mixup: float = 0.0  # alpha of the Beta distribution; 0: none
    cutmix: float = 0.0  # alpha of the Beta distribution; 0: none. With mixup, each pair takes one or the other
    subset: float = 1.0  # share of the training samples that is used, the same in every epoch
    classes: tuple[str, ...] | None = None  # train and validate on these classes of the sets alone; None: all
    balance: str = "none"  # none: each sample once an epoch | class: classes equally often
    repeats: int = 1  # repeated augmentation: times that each sample stands in its global batch
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)  # of RGB in 0..255, subtracted
    std: tuple[float, ...] = (58.395, 57.12, 57.375)  # divided by
    workers: int = 2  # decoding processes of each rank; 0 decodes in the training process
    prefetch: int = 4  # batches that each of them prepares ahead
    pixel_format: str = "rgb"  # rgb | yuv: planes go to the device (half the bytes) and become RGB there, in batches
    cache_gb: float = 0.0  # of whole shards kept on each node's local disk; 0: samples are read by their offsets
    max_bad_samples: float = 0.01  # share of the samples read that may fail to decode before the training stops


@dataclass(frozen=True)
class TrainingSettings:
    workers: int = 2  # ranks
    min_workers: int | None = None  # elastic: any number of ranks from here to `workers` that the batch divides by; None: no
    use_gpu: bool = False  # one GPU for each rank
    cpus_per_worker: float = 1.0  # reserved by Ray; also the threads of a CPU rank
    epochs: int = 30
    max_steps: int | None = None  # stop after so many steps; the schedule is still that of `epochs`
    global_batch: int = 64  # samples in one optimizer step, over all ranks
    micro_batch: int = 1  # samples of one forward pass of one rank; the accumulation follows
    zero_stage: int = 1  # 0 | 1 | 2 | 3
    precision: str = "bf16"  # bf16 | fp32
    deterministic: bool = False  # the same bits from run to run on a GPU, too: no sums by atomics
    checkpoint_every: int | None = None  # steps; None: once an epoch
    keep_checkpoints: int = 2  # newest that stay, beside the best
    max_failures: int = 3  # restarts after a lost worker within one submission


@dataclass(frozen=True)
class OptimSettings:
    lr: float = 1e-3  # of the head, at its peak
    backbone_ratio: float = 0.1  # the backbone's learning rate / the head's
    param_groups: str = "clean"  # clean | official | mmaction2: which tensors are decayed and slowed
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_epochs: float = 2.5
    warmup_start: float = 0.1  # first learning rate / peak
    schedule: str = "step"  # cosine goes down at every step | epoch: at every epoch, as published
    gradient_clipping: float = 0.0  # of the global norm; 0: none
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class EvaluationSettings:
    every_epochs: int = 1  # the last epoch is always evaluated
    clips: int = 1  # views of a video in time during training
    crops: int = 1  # and in space
    batch: int = 8  # views in one forward pass of a rank


@dataclass(frozen=True)
class TrackingSettings:
    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else sqlite in the data root
    experiment: str = "vswin"
    register_as: str | None = None  # name of the registered model; None: the run's name


@dataclass(frozen=True)
class StorageSettings:
    root: str | None = None  # checkpoints go to ROOT/RUN; None: runs/ in the data root
    s3_endpoint: str | None = None  # None: AWS, or AWS_ENDPOINT_URL_S3


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
