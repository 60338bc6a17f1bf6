"""Randomness as a function of the sample and the place, never of rank, world size or call order.

Drop path and dropout draw from a counter-based hash (the finaliser of SplitMix64: Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", 2014), in wrapping int64 arithmetic, so that the same sample
meets the same masks on any number of ranks, in any micro-batch and when activations are recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB

HEAD_PLACE = 1 << 32  # no block has this number


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> on int64 copies the sign


def mix(x: Tensor) -> Tensor:
    """SplitMix64 of each element: int64 in, int64 out."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLY_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLY_2)
    return x ^ _shift_right(x, 31)


def mix_int(x: int) -> int:
    """`mix` of one Python integer."""
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * _MULTIPLY_1) & _MASK64
    x = ((x ^ (x >> 27)) * _MULTIPLY_2) & _MASK64
    return _signed(x ^ (x >> 31))


def sample_keys(seed: int, step: int, indices: Tensor) -> Tensor:
    """One key per sample, int64 [B], from the run's seed, the step and the samples' global indices int64 [B]."""
    return mix(indices.to(torch.int64) ^ mix_int(mix_int(seed) ^ step))


def uniform(keys: Tensor, place: int) -> Tensor:
    """Uniform float32 in [0, 1) of the shape of ``keys`` for one place in the model (24 random bits)."""
    return (mix(keys ^ mix_int(place)) & 0xFFFFFF).to(torch.float32) * (1.0 / (1 << 24))


def drop_path_scale(keys: Tensor, place: int, rate: float) -> Tensor:
    """Stochastic depth (Huang et al. 2016): float32 [B], 0 for a dropped sample, else 1 / (1 - rate)."""
    return (uniform(keys, place) >= rate).to(torch.float32) * (1.0 / (1.0 - rate))


def dropout(x: Tensor, keys: Tensor, place: int, rate: float) -> Tensor:
    """Dropout of x [B, C]: element c of a sample is dropped as its key, the place and c say."""
    element = torch.arange(x.shape[1], device=x.device)
    keep = uniform(mix(keys)[:, None] ^ element, place) >= rate  # [B, C]
    return x * (keep.to(x.dtype) * (1.0 / (1.0 - rate)))
