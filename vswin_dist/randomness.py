"""Every stream of random numbers of the project, and what each is keyed by.

A stream's numbers depend on its key alone: never on rank, world size, worker processes, restarts or the order of calls.
Whoever needs a new kind of random number adds a stream here, so that no two kinds share their numbers. The shuffled
frames are older than that rule, and their scores are on record.

| stream | decides | keyed by | made by |
|---|---|---|---|
| `Stream.AUGMENTATION` | frames, crop and flip of a training clip | seed, epoch, sample, then its copy where not 0 | `rng` |
| `Stream.SUBSTITUTION` | what replaces a corrupt sample, and its frames, crop, flip | seed, epoch, step, position | `rng` |
| `Stream.PIXELS` | RandAugment and erasing of a training clip | seed, epoch, sample, copy | `rng` |
| `Stream.MIXING` | mixup or cutmix of a pair, and how much | seed, step, pair of the global batch | `rng` |
| order of an epoch | samples of its global batches | "fingerprint/seed/epoch" | `named_rng` |
| subset | samples that a `data.subset` keeps | "fingerprint/seed/subset" | `named_rng` |
| shuffled frames | evaluation's control: the order of a clip's frames | sample, in `Stream.AUGMENTATION` | `rng` |
| drop path, dropout | what the model drops | seed, step, sample's occurrence, layer of the model | `models.stochastic` |
| initial weights | weights that no checkpoint gives | `run.seed` | `torch.manual_seed`, `training.initial_model` |
| broken symmetry | noise on inflated patch embeddings | `run.seed` | `models.weights.inflate` |
| resampled videos | the draws behind intervals of scores and comparisons | a constant | `evaluation.analysis` |
| clips of a check | the clips that an exported model is checked with | a constant | `export.subject` |
| order of the shards | samples of a dataset, once for all | hash of (seed, source id): no numbers | `data_prep.order` |

Seed is `run.seed`, but data_prep's own in the last. Not keyed, because nothing that is kept depends on it: the wait
before a request is retried (`storage`), and drop path of a model that is trained without keys (`models.swin.model`).
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The first word of a stream's key; see the module for the others. The numbers are part of every recorded result."""

    AUGMENTATION = 1
    SUBSTITUTION = 2
    PIXELS = 4
    MIXING = 5


def rng(stream: Stream, *coordinates: int) -> np.random.Generator:
    """Make the generator of `stream` at `coordinates`, non-negative integers as the module's table names them."""
    return np.random.default_rng([stream, *coordinates])


def named_rng(name: str) -> np.random.Generator:
    """Make the generator that the text `name` keys."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
