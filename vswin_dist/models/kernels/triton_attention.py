"""Window attention with a relative position bias and region masks in Triton: an operator with all gradients, for CUDA.

The kernels stand in `triton_kernels`. Here they become operators of PyTorch, which torch.compile takes as they are, in
one graph, and which gradient checkpointing recomputes. None adds with atomics, so that two runs give the same bits.

This module needs Triton, which the CUDA builds of PyTorch bring; the rest of the package does not import it before it is
asked for. With TRITON_INTERPRET=1 the kernels run on the CPU, for tests.

Shapes: L = tokens of a window; nWB = windows of all clips; h = heads; d = channels of a head; C = h*d.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vswin_dist.models.kernels import triton_kernels as kernels
from vswin_dist.models.swin.windows import MASK_VALUE, BatchGeometry

PROGRAMS = 1024  # of the bias gradient: enough to fill the largest GPU several times over
# Kernel -> tokens that a program owns, tokens that it takes at a step, warps, stages of its pipeline: the
# fastest of 43 on an H200 at the first and third stage of swin_l, or within 1% of it where that one spills registers.
TILES = {
    "forward": (64, 64, 4, 3),
    "backward_queries": (64, 32, 4, 3),
    "backward_keys": (64, 32, 4, 3),
    "backward_bias": (64, 32, 4, 3),
}
WIDEST = 128  # tile


def tiles(kernel: str, length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Choose the tokens that a program owns and that it takes at a step; a product takes no fewer than 16."""
    whole = max(16, triton.next_power_of_2(length))
    own, step = TILES[kernel][:2] if dtype.itemsize == 2 else (32, 32)
    return min(own, whole), min(step, whole)


def _padded(bias: Tensor, size: int) -> Tensor:
    """Pad the bias [h, L, L] to [h, size, size] with -inf, so that the kernels load whole tiles."""
    return F.pad(bias, (0, size - bias.shape[2], 0, size - bias.shape[1]), value=-math.inf).contiguous()


@cache
def _mask(width: int) -> tuple[float, float]:
    """Return the mask's value over the scale of heads of `width` channels, as the sum of two bfloat16."""
    mask = MASK_VALUE * width**0.5
    high = torch.tensor(mask).to(torch.bfloat16).item()
    return high, torch.tensor(mask - high).to(torch.bfloat16).item()


def _constants(kernel: str, qkv: Tensor, codes: Tensor, heads: int) -> dict[str, Any]:
    """Return what a kernel is compiled for, and the scale."""
    length, width = qkv.shape[1], qkv.shape[2] // 3 // heads
    own, step = tiles(kernel, length, qkv.dtype)
    warps, stages = TILES[kernel][2:]
    high, low = _mask(width)
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "scale": width**-0.5,
        "L": length,
        "heads": heads,
        "d": width,
        "D": max(16, triton.next_power_of_2(width)),
        "own": own,
        "step": step,
        "P": triton.cdiv(length, WIDEST) * WIDEST,
        "masked": len(codes) > 1,
        "high": high,
        "low": low,
        "precision": "ieee" if exact else "tf32",
        "num_warps": warps,
        "num_stages": stages,
    }


@torch.library.custom_op("vswin::window_attention", mutates_args=())
def _attend(qkv: Tensor, bias: Tensor, codes: Tensor, pattern: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Output [nWB, L, C] and the log of the softmax's sum, float32 [nWB, h, L]."""
    windows, length, packed = qkv.shape
    constants = _constants("forward", qkv, codes, heads)
    out = qkv.new_empty(windows, length, packed // 3)
    norm = qkv.new_empty(windows, heads, length, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        kernels.forward[(windows * heads * triton.cdiv(length, constants["own"]),)](
            qkv, _padded(bias, constants["P"]), codes, pattern, out, norm, **constants
        )
    return out, norm


@torch.library.custom_op("vswin::window_attention_backward", mutates_args=())
def _attend_backward(
    qkv: Tensor, bias: Tensor, codes: Tensor, pattern: Tensor, out: Tensor, norm: Tensor, grad: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Gradient of qkv [nWB, L, 3C], and delta, float32 [nWB, h, L], which the bias gradient takes."""
    windows, length, _ = qkv.shape
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(norm)
    for name, more in (("backward_queries", (out,)), ("backward_keys", ())):
        constants = _constants(name, qkv, codes, heads)
        grid = (windows * heads * triton.cdiv(length, constants["own"]),)
        with torch.cuda.device_of(qkv):
            getattr(kernels, name)[grid](
                qkv, _padded(bias, constants["P"]), codes, pattern, *more, norm, grad, delta, grad_qkv, **constants
            )
    return grad_qkv, delta


@torch.library.custom_op("vswin::window_attention_bias_backward", mutates_args=())
def _bias_backward(
    qkv: Tensor, bias: Tensor, codes: Tensor, pattern: Tensor, norm: Tensor, grad: Tensor, delta: Tensor, heads: int
) -> Tensor:
    """Gradient of the bias [h, L, L]: as many splits of the windows as fill a GPU, the same on every device."""
    windows, length, _ = qkv.shape
    constants = _constants("backward_bias", qkv, codes, heads)
    programs = heads * triton.cdiv(length, constants["own"]) * triton.cdiv(length, constants["step"])
    per_split = triton.cdiv(windows, max(1, PROGRAMS // programs))
    splits = triton.cdiv(windows, per_split)
    partial = bias.new_empty(splits, *bias.shape, dtype=torch.float32)
    padded = _padded(bias, constants["P"])
    others = 1 - codes
    others[..., ::2] *= constants.pop("high")
    others[..., 1::2] *= constants.pop("low")
    with torch.cuda.device_of(qkv):
        kernels.backward_bias[(splits * programs,)](
            qkv,
            padded,
            codes,
            others,
            pattern,
            norm,
            grad,
            delta,
            partial,
            windows=windows,
            per_split=per_split,
            **constants,
        )
    return partial.sum(0).to(bias.dtype)


@_attend.register_fake
def _(qkv: Tensor, bias: Tensor, codes: Tensor, pattern: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    windows, length, packed = qkv.shape
    return qkv.new_empty(windows, length, packed // 3), qkv.new_empty(windows, heads, length, dtype=torch.float32)


@_attend_backward.register_fake
def _(qkv: Tensor, bias: Any, codes: Any, pattern: Any, out: Any, norm: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(norm)


@_bias_backward.register_fake
def _(qkv: Tensor, bias: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    qkv, bias, codes, pattern, out, norm = ctx.saved_tensors
    grad = grad.contiguous()
    grad_qkv, delta = _attend_backward(qkv, bias, codes, pattern, out, norm, grad, ctx.heads)
    grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_bias = _bias_backward(qkv, bias, codes, pattern, norm, grad, delta, ctx.heads)
    return grad_qkv, grad_bias, None, None, None


_attend.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("vswin::window_bias", mutates_args=())
def _gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows of the table [rows, h] by index [L*L], transposed: [h, L*L]."""
    return table.t().index_select(1, index)


@torch.library.custom_op("vswin::window_bias_backward", mutates_args=())
def _gather_backward(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """Gradient of the table [rows, h]: that of an embedding, which sorts on CUDA where index_select adds with atomics."""
    out: Tensor = torch.ops.aten.embedding_dense_backward(grad.t().contiguous(), index, rows, -1, False)
    return out


@_gather.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty(table.shape[1], len(index))


@_gather_backward.register_fake
def _(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, len(grad))


def _save_index(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rows = len(inputs[0])


def _gather_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _gather_backward(grad, *ctx.saved_tensors, ctx.rows), None


_gather.register_autograd(_gather_gradients, setup_context=_save_index)


def window_bias(table: Tensor, geometry: BatchGeometry) -> Tensor:
    """Gather the bias of each pair of tokens of a window, [h, L, L], from the table [rows, h], without atomics."""
    out: Tensor = _gather(table, geometry.index)
    return out.view(-1, geometry.length, geometry.length)


def attention(qkv: Tensor, bias: Tensor, heads: int, geometry: BatchGeometry) -> Tensor:
    """Attend inside each window, with gradients: qkv [nWB, L, 3C], bias [h, L, L] -> [nWB, L, C].

    Products are summed in float32, and so is the gradient of the bias over the windows; the bias may be of another type.
    """
    out: Tensor = _attend(qkv.contiguous(), bias.contiguous(), geometry.codes, geometry.pattern, heads)[0]
    return out
