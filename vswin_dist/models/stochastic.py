"""Randomness of the model: a function of the sample and the layer of the model, never of rank or call order.

Drop path and dropout draw from a counter-based hash (the finaliser of SplitMix64: Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", 2014), in wrapping int64 arithmetic, so that the same sample
meets the same masks on any number of ranks, in any micro-batch and when activations are recomputed. The project's
other streams of random numbers are listed in `vswin_dist.randomness`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB

HEAD_LAYER = 1 << 32  # no block has this number


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> on int64 copies the sign


def splitmix64(x: Tensor) -> Tensor:
    """Hash each element: int64 in, int64 out."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLY_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLY_2)
    return x ^ _shift_right(x, 31)


def splitmix64_int(x: int) -> int:
    """Hash one Python integer as `splitmix64` does."""
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * _MULTIPLY_1) & _MASK64
    x = ((x ^ (x >> 27)) * _MULTIPLY_2) & _MASK64
    return _signed(x ^ (x >> 31))


def sample_keys(seed: int, step: int, occurrences: Tensor) -> Tensor:
    """Make one key per sample, int64 [B], of the run's seed, the step and the samples' occurrences int64 [B]."""
    return splitmix64(occurrences.to(torch.int64) ^ splitmix64_int(splitmix64_int(seed) ^ step))


def uniform(keys: Tensor, layer: int) -> Tensor:
    """Draw uniform float32 in [0, 1) of the shape of `keys` for one layer of the model (24 random bits)."""
    return _uniform(keys ^ splitmix64_int(layer))


def _uniform(keys: Tensor) -> Tensor:
    return (splitmix64(keys) & 0xFFFFFF).to(torch.float32) * (1.0 / (1 << 24))


def drop_path_scales(keys: Tensor, rates: tuple[float, ...]) -> Tensor:
    """Draw stochastic depth (Huang et al. 2016) for all layers at once: 0 for a dropped sample, else 1 / (1 - rate).

    Args:
        keys: int64 [B].
        rates: of layer 0, 1, ...

    Returns:
        float32 [layers, B]: a few kernels, where twenty for each layer would take a GPU's host longer than the layer.
    """
    layers, thresholds, factors = _layers(rates, keys.device)
    return (_uniform(keys ^ layers) >= thresholds).to(torch.float32) * factors


@lru_cache(maxsize=32)
def _layers(rates: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hash of each layer's number, its rate, and 1 / (1 - rate): [layers, 1] each; cached, so that a step copies nothing."""
    hashes = torch.tensor([splitmix64_int(layer) for layer in range(len(rates))])
    factors = torch.tensor([1.0 / (1.0 - rate) for rate in rates])
    return tuple(x[:, None].to(device) for x in (hashes, torch.tensor(rates), factors))  # type: ignore[return-value]


def dropout(x: Tensor, keys: Tensor, layer: int, rate: float) -> Tensor:
    """Drop elements of x [B, C]: element c of a sample as its key, the layer and c say."""
    element = torch.arange(x.shape[1], device=x.device)
    keep = uniform(splitmix64(keys)[:, None] ^ element, layer) >= rate  # [B, C]
    return x * (keep.to(x.dtype) * (1.0 / (1.0 - rate)))
