"""Window attention with a relative position bias and region masks in Triton: an operator with all gradients, for CUDA.

The kernels stand in `triton_kernels`. Here they become operators of PyTorch, which torch.compile takes as they are, in
one graph, and which gradient checkpointing runs again. None adds with atomics, so that two runs give the same bits.

This module needs Triton, which the CUDA builds of PyTorch bring; the rest of the package does not import it before it is
asked for. With TRITON_INTERPRET=1 the kernels run on the CPU, for tests. No GPU has run them yet.

Shapes: L = tokens of a window; nWB = windows of all clips; h = heads; d = channels of a head; C = h*d.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .windows import BatchPlan

PROGRAMS = 1024  # of the bias gradient: enough to fill the largest GPU several times over
WARPS, STAGES = 4, 2  # compiled for sm_80 and sm_90, no kernel then spills registers at 32 channels of a head


def tiles(length: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens that a program owns and that it takes at a step; a product takes no fewer than 16."""
    whole = max(16, triton.next_power_of_2(length))
    own, step = (64, 32) if dtype.itemsize == 2 else (32, 32)
    return min(own, whole), min(step, whole)


def _constants(qkv: Tensor, regions: Tensor, heads: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    length, width = qkv.shape[1], qkv.shape[2] // 3 // heads
    own, step = tiles(length, qkv.dtype)
    exact = torch.get_float32_matmul_precision() == "highest"
    return {"L": length, "heads": heads, "d": width, "D": max(16, triton.next_power_of_2(width)), "own": own, "step": step,
            "masked": len(regions) > 1, "precision": "ieee" if exact else "tf32",
            "num_warps": WARPS, "num_stages": STAGES}  # fmt: skip


@torch.library.custom_op("vswin::window_attention", mutates_args=())
def _attend(qkv: Tensor, bias: Tensor, regions: Tensor, pattern: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Output [nWB, L, C] and the log of the softmax's sum, float32 [nWB, h, L]."""
    windows, length, packed = qkv.shape
    constants = _constants(qkv, regions, heads)
    out = qkv.new_empty(windows, length, packed // 3)
    norm = qkv.new_empty(windows, heads, length, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        kernels.forward[(windows * heads * triton.cdiv(length, constants["own"]),)](
            qkv, bias, regions, pattern, out, norm, constants["d"] ** -0.5, **constants
        )
    return out, norm


@torch.library.custom_op("vswin::window_attention_backward", mutates_args=())
def _attend_backward(
    qkv: Tensor, bias: Tensor, regions: Tensor, pattern: Tensor, out: Tensor, norm: Tensor, grad: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Gradient of qkv [nWB, L, 3C], and delta, float32 [nWB, h, L], which the bias gradient takes."""
    windows, length, _ = qkv.shape
    constants = _constants(qkv, regions, heads)
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(norm)
    scale = constants["d"] ** -0.5
    with torch.cuda.device_of(qkv):
        kernels.backward_queries[(windows * heads * triton.cdiv(length, constants["own"]),)](
            qkv, bias, regions, pattern, out, norm, grad, delta, grad_qkv, scale, **constants
        )
        kernels.backward_keys[(windows * heads * triton.cdiv(length, constants["own"]),)](
            qkv, bias, regions, pattern, norm, grad, delta, grad_qkv, scale, **constants
        )
    return grad_qkv, delta


@torch.library.custom_op("vswin::window_attention_bias_backward", mutates_args=())
def _bias_backward(
    qkv: Tensor, bias: Tensor, regions: Tensor, pattern: Tensor, norm: Tensor, grad: Tensor, delta: Tensor, heads: int
) -> Tensor:
    """Gradient of the bias [h, L, L]: as many splits of the windows as fill a GPU, the same on every device."""
    windows, length, _ = qkv.shape
    constants = _constants(qkv, regions, heads)
    programs = heads * triton.cdiv(length, constants["own"]) * triton.cdiv(length, constants["step"])
    share = triton.cdiv(windows, max(1, PROGRAMS // programs))
    splits = triton.cdiv(windows, share)
    partial = bias.new_empty(splits, *bias.shape, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        kernels.backward_bias[(splits * programs,)](
            qkv, bias, regions, pattern, norm, grad, delta, partial, constants["d"] ** -0.5, windows, share, **constants
        )
    return partial.sum(0).to(bias.dtype)


@_attend.register_fake
def _(qkv: Tensor, bias: Tensor, regions: Tensor, pattern: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    windows, length, packed = qkv.shape
    return qkv.new_empty(windows, length, packed // 3), qkv.new_empty(windows, heads, length, dtype=torch.float32)


@_attend_backward.register_fake
def _(qkv: Tensor, bias: Any, regions: Any, pattern: Any, out: Any, norm: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
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
    qkv, bias, regions, pattern, out, norm = ctx.saved_tensors
    grad = grad.contiguous()
    grad_qkv, delta = _attend_backward(qkv, bias, regions, pattern, out, norm, grad, ctx.heads)
    grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_bias = _bias_backward(qkv, bias, regions, pattern, norm, grad, delta, ctx.heads)
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


_gather.register_autograd(lambda ctx, grad: (_gather_backward(grad, *ctx.saved_tensors, ctx.rows), None),
                          setup_context=_save_index)  # fmt: skip


def window_bias(table: Tensor, plan: BatchPlan) -> Tensor:
    """Bias of each pair of tokens of a window, [h, L, L], from the table [rows, h]; its gradient adds without atomics."""
    out: Tensor = _gather(table, plan.index)
    return out.view(-1, plan.length, plan.length)


def attention(qkv: Tensor, bias: Tensor, heads: int, plan: BatchPlan) -> Tensor:
    """Attention inside each window, with gradients: qkv [nWB, L, 3C], bias [h, L, L] -> [nWB, L, C].

    Products are summed in float32, and so is the gradient of the bias over the windows; the bias may be of another type.
    """
    out: Tensor = _attend(qkv.contiguous(), bias.contiguous(), plan.regions, plan.pattern, heads)[0]
    return out
