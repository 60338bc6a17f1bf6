"""Window attention with a relative position bias and region masks as Triton kernels: forward and all gradients.

The scores of a window exist in registers, one tile at a time, and are computed again in the backward pass; kept are the
output and, for each row, the logarithm of the softmax's sum (FlashAttention-2, arXiv 2307.08691). Masks are compared
from the region of each token. No kernel adds with atomics: a program owns what it writes, so that two runs give the
same bits. That holds for the bias too, whose tile sums over the windows in a fixed number of splits.

q, k and v are read from the packed projection, and their gradients written to one, without a copy.

This module needs Triton, which the CUDA builds of PyTorch bring; the rest of the package does not import it before it is
asked for. With TRITON_INTERPRET=1 the kernels run on the CPU, for tests.

Shapes: L = tokens of a window; nWB = windows of all clips; h = heads; d = channels of a head, D = d up to a power of two;
C = h*d; M, N = tokens of a tile, queries (rows ``m``) and keys (rows ``n``): a program owns some and steps over the others.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .windows import MASK_VALUE, BatchPlan

MASK = tl.constexpr(MASK_VALUE)
PROGRAMS = 1024  # of the bias gradient: enough to fill the largest GPU several times over
WARPS, STAGES = 4, 2  # compiled for sm_80 and sm_90, no kernel then spills registers at 32 channels of a head


@triton.jit
def _place(blocks, heads):
    """Block, head and window of this program; blocks run fastest, so that a window's keys stay in the cache."""
    number = tl.program_id(0)
    return number % blocks, number // blocks % heads, (number // blocks // heads).to(tl.int64)


@triton.jit
def _rows(matrix, rows, stride: tl.constexpr, L: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    """Rows of one head, [rows, D]; zero past L and d."""
    channel = tl.arange(0, D)
    inside = (rows[:, None] < L) & (channel[None, :] < d)
    return tl.load(matrix + rows[:, None] * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(matrix, rows, value, stride: tl.constexpr, L: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    channel = tl.arange(0, D)
    inside = (rows[:, None] < L) & (channel[None, :] < d)
    tl.store(matrix + rows[:, None] * stride + channel[None, :], value.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _pairs(bias, m, n, L: tl.constexpr):
    """Bias of the pairs of queries m and keys n, [M, N]; -inf past L, where no softmax weight may fall."""
    inside = (m[:, None] < L) & (n[None, :] < L)
    return tl.load(bias + m[:, None] * L + n[None, :], mask=inside, other=float("-inf"))


@triton.jit
def _scores(product, pairs, scale, regions, a, b, L: tl.constexpr, masked: tl.constexpr):
    """What the softmax takes, of a tile of products of queries and keys; the same seen from either side."""
    scores = product * scale + pairs
    if masked:
        of_a = tl.load(regions + a, mask=a < L, other=0)
        of_b = tl.load(regions + b, mask=b < L, other=0)
        scores += tl.where(of_a[:, None] == of_b[None, :], 0.0, MASK)
    return scores


@triton.jit
def _forward(
    qkv, bias, regions, pattern, out, norm, scale,
    L: tl.constexpr, heads: tl.constexpr, d: tl.constexpr, D: tl.constexpr, own: tl.constexpr, step: tl.constexpr,
    masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Output of a block of queries: softmax(q k^T * scale + bias + mask) v, and the log of the softmax's sum."""
    C: tl.constexpr = heads * d
    block, head, window = _place(tl.cdiv(L, own), heads)
    qkv += window * (L * 3 * C) + head * d
    bias += head * (L * L)
    if masked:
        regions += tl.load(pattern + window) * L
    m = block * own + tl.arange(0, own)
    q = _rows(qkv, m, 3 * C, L, d, D)
    top = tl.full([own], -1e30, tl.float32)  # finite: a row past L has no score above -inf
    total = tl.zeros([own], tl.float32)
    sums = tl.zeros([own, D], tl.float32)
    for start in range(0, L, step):
        n = start + tl.arange(0, step)
        k = _rows(qkv + C, n, 3 * C, L, d, D)
        product = tl.dot(q, tl.trans(k), input_precision=precision)
        scores = _scores(product, _pairs(bias, m, n, L), scale, regions, m, n, L, masked)
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        v = _rows(qkv + 2 * C, n, 3 * C, L, d, D)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=precision)
        top = higher
    total = tl.where(m < L, total, 1.0)
    _store_rows(out + window * (L * C) + head * d, m, sums / total[:, None], C, L, d, D)
    tl.store(norm + (window * heads + head) * L + m, top + tl.log(total), mask=m < L)


@triton.jit
def _backward_queries(
    qkv, bias, regions, pattern, out, norm, grad, delta, grad_qkv, scale,
    L: tl.constexpr, heads: tl.constexpr, d: tl.constexpr, D: tl.constexpr, own: tl.constexpr, step: tl.constexpr,
    masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries; leaves delta = sum of out * grad of each row for the other kernels."""
    C: tl.constexpr = heads * d
    block, head, window = _place(tl.cdiv(L, own), heads)
    qkv += window * (L * 3 * C) + head * d
    bias += head * (L * L)
    if masked:
        regions += tl.load(pattern + window) * L
    m = block * own + tl.arange(0, own)
    q = _rows(qkv, m, 3 * C, L, d, D)
    g = _rows(grad + window * (L * C) + head * d, m, C, L, d, D)
    o = _rows(out + window * (L * C) + head * d, m, C, L, d, D)
    row = (window * heads + head) * L + m
    inner = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row, inner, mask=m < L)
    log_sum = tl.load(norm + row, mask=m < L, other=0.0)
    sums = tl.zeros([own, D], tl.float32)
    for start in range(0, L, step):
        n = start + tl.arange(0, step)
        k = _rows(qkv + C, n, 3 * C, L, d, D)
        v = _rows(qkv + 2 * C, n, 3 * C, L, d, D)
        product = tl.dot(q, tl.trans(k), input_precision=precision)
        scores = _scores(product, _pairs(bias, m, n, L), scale, regions, m, n, L, masked)
        weights = tl.exp(scores - log_sum[:, None])
        back = weights * (tl.dot(g, tl.trans(v), input_precision=precision) - inner[:, None])
        sums = tl.dot(back.to(k.dtype), k, sums, input_precision=precision)
    _store_rows(grad_qkv + window * (L * 3 * C) + head * d, m, sums * scale, 3 * C, L, d, D)


@triton.jit
def _backward_keys(
    qkv, bias, regions, pattern, norm, grad, delta, grad_qkv, scale,
    L: tl.constexpr, heads: tl.constexpr, d: tl.constexpr, D: tl.constexpr, own: tl.constexpr, step: tl.constexpr,
    masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values; tiles are [keys, queries], so that products take them as they are."""
    C: tl.constexpr = heads * d
    block, head, window = _place(tl.cdiv(L, own), heads)
    qkv += window * (L * 3 * C) + head * d
    grad += window * (L * C) + head * d
    bias += head * (L * L)
    if masked:
        regions += tl.load(pattern + window) * L
    n = block * own + tl.arange(0, own)
    k = _rows(qkv + C, n, 3 * C, L, d, D)
    v = _rows(qkv + 2 * C, n, 3 * C, L, d, D)
    sums_k = tl.zeros([own, D], tl.float32)
    sums_v = tl.zeros([own, D], tl.float32)
    for start in range(0, L, step):
        m = start + tl.arange(0, step)
        q = _rows(qkv, m, 3 * C, L, d, D)
        g = _rows(grad, m, C, L, d, D)
        row = (window * heads + head) * L + m
        log_sum = tl.load(norm + row, mask=m < L, other=0.0)
        inner = tl.load(delta + row, mask=m < L, other=0.0)
        product = tl.dot(k, tl.trans(q), input_precision=precision)
        scores = _scores(product, tl.trans(_pairs(bias, m, n, L)), scale, regions, n, m, L, masked)
        weights = tl.exp(scores - log_sum[None, :])
        sums_v = tl.dot(weights.to(g.dtype), g, sums_v, input_precision=precision)
        back = weights * (tl.dot(v, tl.trans(g), input_precision=precision) - inner[None, :])
        sums_k = tl.dot(back.to(q.dtype), q, sums_k, input_precision=precision)
    grad_qkv += window * (L * 3 * C) + head * d
    _store_rows(grad_qkv + C, n, sums_k * scale, 3 * C, L, d, D)
    _store_rows(grad_qkv + 2 * C, n, sums_v, 3 * C, L, d, D)


@triton.jit(do_not_specialize=["windows", "share"])
def _backward_bias(
    qkv, bias, regions, pattern, norm, grad, delta, partial, scale, windows, share,
    L: tl.constexpr, heads: tl.constexpr, d: tl.constexpr, D: tl.constexpr, own: tl.constexpr, step: tl.constexpr,
    masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of the bias, summed over one split: ``share`` windows. partial: float32 [splits, h, L, L]."""
    C: tl.constexpr = heads * d
    across: tl.constexpr = tl.cdiv(L, step)
    block, head, split = _place(tl.cdiv(L, own) * across, heads)
    m = block // across * own + tl.arange(0, own)
    n = block % across * step + tl.arange(0, step)
    pairs = _pairs(bias + head * (L * L), m, n, L)
    sums = tl.zeros([own, step], tl.float32)
    for window in range(split * share, tl.minimum(split * share + share, windows)):
        packed = qkv + window * (L * 3 * C) + head * d
        q = _rows(packed, m, 3 * C, L, d, D)
        k = _rows(packed + C, n, 3 * C, L, d, D)
        v = _rows(packed + 2 * C, n, 3 * C, L, d, D)
        g = _rows(grad + window * (L * C) + head * d, m, C, L, d, D)
        row = (window * heads + head) * L + m
        log_sum = tl.load(norm + row, mask=m < L, other=0.0)
        inner = tl.load(delta + row, mask=m < L, other=0.0)
        held = regions
        if masked:
            held += tl.load(pattern + window) * L
        product = tl.dot(q, tl.trans(k), input_precision=precision)
        weights = tl.exp(_scores(product, pairs, scale, held, m, n, L, masked) - log_sum[:, None])
        sums += weights * (tl.dot(g, tl.trans(v), input_precision=precision) - inner[:, None])
    inside = (m[:, None] < L) & (n[None, :] < L)
    tl.store(partial + (split * heads + head) * (L * L) + m[:, None] * L + n[None, :], sums, mask=inside)


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
        _forward[(windows * heads * triton.cdiv(length, constants["own"]),)](
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
        _backward_queries[(windows * heads * triton.cdiv(length, constants["own"]),)](
            qkv, bias, regions, pattern, out, norm, grad, delta, grad_qkv, scale, **constants
        )
        _backward_keys[(windows * heads * triton.cdiv(length, constants["own"]),)](
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
        _backward_bias[(splits * programs,)](
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


def attention(qkv: Tensor, bias: Tensor, heads: int, plan: BatchPlan) -> Tensor:
    """Attention inside each window, with gradients: qkv [nWB, L, 3C], bias [h, L, L] -> [nWB, L, C].

    Products are summed in float32, and so is the gradient of the bias over the windows; the bias may be of another type.
    """
    out: Tensor = _attend(qkv.contiguous(), bias.contiguous(), plan.regions, plan.pattern, heads)[0]
    return out
