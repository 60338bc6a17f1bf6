"""The three operations that speed depends on: linear, permutation of tokens, attention within windows.

Shapes: B = clips, L = tokens of a window, nWB = windows of all clips, h = heads, d = channels of a head, C = h*d.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vswin_dist.errors import ConfigError
from vswin_dist.models.kernels import cpu
from vswin_dist.models.swin.windows import BatchGeometry


class _Permute(torch.autograd.Function):
    """Rows by index; the gradient reads them by the inverse index instead of adding with collisions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, zero_rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, zero_rows)
        out = F.embedding(index, x)  # the fastest gather of rows on CPU
        if zero_rows is not None:
            out.index_fill_(0, zero_rows, 0)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inverse, _ = ctx.saved_tensors
        return F.embedding(inverse, grads[0].contiguous()), None, None, None


class _Unpermute(torch.autograd.Function):
    """Inverse of `_Permute`: leaves the padding out; its gradient there is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, zero_rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, zero_rows)
        return F.embedding(index, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inverse, zero_rows = ctx.saved_tensors
        grad = F.embedding(inverse, grads[0].contiguous())
        if zero_rows is not None:
            grad.index_fill_(0, zero_rows, 0)
        return grad, None, None, None


def to_windows(x: Tensor, geometry: BatchGeometry) -> Tensor:
    """Permute tokens [B, N, C] -> windows [nWB, L, C]: padding, shift and partition at once; padding is zero."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Permute.apply(rows, geometry.gather, geometry.scatter, geometry.padding)
    return out.view(-1, geometry.length, x.shape[-1])


def from_windows(x: Tensor, geometry: BatchGeometry) -> Tensor:
    """Permute windows [nWB, L, C] -> tokens [B, N, C]: the inverse of `to_windows`."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Unpermute.apply(rows, geometry.scatter, geometry.gather, geometry.padding)
    return out.view(geometry.batch, geometry.tokens, x.shape[-1])


class Linear(nn.Linear):
    """`nn.Linear` on the fastest path of the device."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] -> [..., out]."""
        if cpu.HAS_ONEDNN and cpu.usable(x, torch.float32) and self.weight.dtype == torch.float32:
            return cpu.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def mlp(x: Tensor, fc1: Linear, fc2: Linear) -> Tensor:
    """Compute fc2(gelu(fc1(x))), exact GELU; [B, N, C] -> [B, N, C]."""
    # A parameter that DeepSpeed partitions is whole only inside of its own module's forward. It is known by `ds_id`, a
    # private name of DeepSpeed: no public one says it of a tensor, and the model must not import DeepSpeed to ask.
    whole = not any(hasattr(p, "ds_id") for p in (fc1.weight, fc2.weight))
    if whole and cpu.HAS_ONEDNN and cpu.usable(x, torch.float32) and fc1.weight.dtype == torch.float32:
        return cpu.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    out: Tensor = fc2(F.gelu(fc1(x)))
    return out


def _runs_triton(device: torch.device) -> bool:
    """Say whether Triton is installed and multiplies bfloat16 on this device (compute capability 8.0)."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# What `torch.compiler.assume_constant_result` does, which imports the compiler first: 2.4 s in every process.
_runs_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_kernel(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """Say what computes the attention, plain or triton: on CUDA devices `auto` is triton, the faster one, where it runs."""
    if kernel != "auto":
        return kernel
    return "triton" if dtype != torch.float64 and _runs_triton(device) else "plain"


def check_kernel(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the attention kernel can compute for this device and dtype.

    Raises:
        ConfigError: it cannot; names the remedy.
    """
    if kernel != "triton":
        return
    remedy = "take attention_kernel=auto"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"attention_kernel=triton computes on CUDA devices, not on {device}: {remedy}")
    try:
        importlib.import_module(f"{__package__}.triton_attention")
    except ImportError as error:
        raise ConfigError(
            f"attention_kernel=triton needs the package triton, which CUDA builds of PyTorch bring; here: {error}. "
            f"Install it, or {remedy}"
        ) from error
    if dtype == torch.float64:
        raise ConfigError(f"attention_kernel=triton computes in float32 and less, not in float64: {remedy}")


def window_bias(table: Tensor, geometry: BatchGeometry, kernel: str = "plain") -> Tensor:
    """Gather the bias of each pair of tokens of a window, [h, L, L], from the table [rows, h]."""
    if kernel == "triton":
        from vswin_dist.models.kernels import triton_attention

        return triton_attention.window_bias(table, geometry)
    return table.t().index_select(1, geometry.index).view(-1, geometry.length, geometry.length)


def window_attention(qkv: Tensor, bias: Tensor, heads: int, geometry: BatchGeometry, kernel: str = "plain") -> Tensor:
    """Attend inside each window: qkv [nWB, L, 3C], bias [h, L, L] -> [nWB, L, C].

    Plain: windows of one mask pattern are neighbours, so each pattern takes one call with one [h, L, L] mask. On CUDA,
    PyTorch then writes the mask's gradient out for every window before it is summed, [n, h, L, L] with rows padded to
    multiples of 16: 1.9 GB in all for the first stage of swin_l at 8 clips in bf16 (read in its sources, not measured).
    `kernel` triton writes none and takes all windows at once, see `triton_attention`; `check_kernel` says whether it
    can. flex_attention is no third way: it has no backward on the CPU (PyTorch 2.13), where it could be tested.
    """
    if kernel == "triton":
        from vswin_dist.models.kernels import triton_attention

        return triton_attention.attention(qkv, bias, heads, geometry)
    if cpu.usable(qkv, torch.float32, torch.float64) and bias.dtype == qkv.dtype:
        return cpu.attention(qkv, bias, heads, geometry.masked)
    count, length, channels = qkv.shape
    q, k, v = qkv.view(count, length, 3, heads, channels // 3 // heads).permute(2, 0, 3, 1, 4)
    parts = []
    for start, stop, mask in geometry.masked(bias):
        rows = slice(start, stop)
        out = F.scaled_dot_product_attention(q[rows], k[rows], v[rows], attn_mask=mask[None])
        parts.append(out.transpose(1, 2))  # [n, L, h, d]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.reshape(count, length, channels // 3)
