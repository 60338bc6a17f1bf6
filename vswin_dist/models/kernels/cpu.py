"""Faster paths for the CPU in float32: oneDNN products, attention and MLP in pieces that stay in the cache.

Why, measured on two AVX-512 cores: oneDNN's product ran at about twice the rate of the BLAS that
`F.linear` calls; fresh memory for one [50176, 384] activation costs more than computing it; and the fused
attention of PyTorch gives no gradient to an additive mask, so that training with a bias falls back to one that
writes out every score. Here scores and hidden activations exist for one piece at a time, and the backward pass
recomputes them.

Shapes: R = rows; L = tokens of a window; n = windows; h = heads; d = channels of a head; C = h*d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_BYTES = 2 << 20  # scores or hidden activations at one time
LOG2_E = math.log2(math.e)

Masks = tuple[tuple[int, int, Tensor], ...]  # windows start to stop, and their bias with mask [h, L, L]


def usable(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Say whether x is on the CPU, in one of the dtypes, and run as it is (not compiled, not autocast)."""
    return (
        x.device.type == "cpu"
        and x.dtype in dtypes
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def has_onednn() -> bool:
    """Say whether this build of PyTorch has oneDNN's linear as an operator on plain tensors.

    The operator is a private name, which torch's own compiler writes into its graphs: no public function takes this
    product for plain float32 tensors.
    """
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


HAS_ONEDNN = has_onednn()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., in] by weight [out, in] transposed, plus bias [out]; contiguous float32, no gradient."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows = grad.view(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = product(grad, weight.t().contiguous()) if needs_x else None
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` through oneDNN, with gradients."""
    out: Tensor = _Linear.apply(x.contiguous(), weight, bias)
    return out


class _Mlp(torch.autograd.Function):
    """fc2(gelu(fc1(x))) in pieces of rows; the hidden activations are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        out = torch.empty(x.shape[0], w2.shape[0], dtype=x.dtype)
        for rows in _row_pieces(x.shape[0], w1.shape[0]):
            out[rows] = product(F.gelu(product(x[rows], w1, b1)), w2, b2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_w1, grad_w2 = torch.empty_like(x), torch.zeros_like(w1), torch.zeros_like(w2)
        grad_b1 = torch.zeros_like(b1)
        w1t, w2t = w1.t().contiguous(), w2.t().contiguous()
        for rows in _row_pieces(x.shape[0], w1.shape[0]):
            hidden = product(x[rows], w1, b1)
            grad_w2.addmm_(grad[rows].t(), F.gelu(hidden))
            back = torch.ops.aten.gelu_backward(product(grad[rows], w2t), hidden)
            grad_w1.addmm_(back.t(), x[rows])
            grad_b1 += back.sum(0)
            grad_x[rows] = product(back, w1t)
        return grad_x, grad_w1, grad_b1, grad_w2, grad.sum(0)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Compute linear, exact GELU, linear: x [..., C] -> [..., C], with gradients."""
    out: Tensor = _Mlp.apply(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2)
    return out.view(x.shape)


def _row_pieces(rows: int, width: int) -> Iterator[slice]:
    """Slices of nearly equal size whose [piece, width] float32 activations stay near `PIECE_BYTES`."""
    count = max(1, round(rows * width * 4 / PIECE_BYTES))
    size = -(-rows // count)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _Attention(torch.autograd.Function):
    """Window attention with a bias that has a gradient; scores exist for a few windows and heads at a time."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, heads: int, patterns: Any) -> Tensor:
        count, length, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        out = torch.empty(count, length, channels, dtype=qkv.dtype)
        lse = torch.empty(count, heads, length, dtype=qkv.dtype)
        for start, stop, mask in patterns(bias):
            rows = slice(start, stop)
            # Private, since `F.scaled_dot_product_attention` keeps to itself the logarithms that the backward pass takes.
            part, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[rows], k[rows], v[rows], attn_mask=mask[None]
            )
            out[rows] = part.transpose(1, 2).reshape(-1, length, channels)
            lse[rows] = norm.view(-1, heads, length)
        ctx.save_for_backward(qkv, bias, out, lse)
        ctx.heads, ctx.patterns = heads, patterns
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, out, lse = ctx.saved_tensors
        count, length = qkv.shape[:2]
        split = (count, length, 3, ctx.heads, qkv.shape[2] // 3 // ctx.heads)
        grad_qkv, grad_bias = torch.empty_like(qkv), torch.zeros_like(bias)
        parts = qkv.view(split).permute(2, 0, 3, 1, 4)
        grad_parts = grad_qkv.view(split).permute(2, 0, 3, 1, 4)
        grad = grads[0].view(count, length, ctx.heads, -1).transpose(1, 2)  # [nWB, h, L, d]
        delta = (grad * out.view(count, length, ctx.heads, -1).transpose(1, 2)).sum(-1, keepdim=True)
        lse = lse.unsqueeze(-1) * LOG2_E
        for start, stop, mask in ctx.patterns(bias):
            mask = mask * LOG2_E
            for rows, at in _score_pieces(start, stop, ctx.heads, length, qkv.element_size()):
                piece = (rows, at)
                _attention_piece_backward(
                    tuple(x[piece] for x in parts),
                    tuple(x[piece] for x in grad_parts),
                    grad[piece],
                    lse[piece],
                    delta[piece],
                    mask[at],
                    grad_bias[at],
                )
        return grad_qkv, grad_bias, None, None


def _attention_piece_backward(
    qkv: tuple[Tensor, ...],
    grad_qkv: tuple[Tensor, ...],
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: Tensor,
    grad_bias: Tensor,
) -> None:
    """Gradients of a few windows and heads, written to grad_qkv ([n, h, L, d] each), added to grad_bias [h, L, L].

    `mask` and `lse` are to the base of 2: PyTorch's `exp` takes 40 times as long where its results are too small for a
    normal float32, as they are between the regions of a shifted window (`MASK_VALUE`); its `exp2` does not.
    """
    n, heads, length, width = grad.shape
    q, k, v, g = (x.reshape(n * heads, length, width) for x in (*qkv, grad))
    scale = width**-0.5
    if n == 1:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale * LOG2_E)
    else:
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale * LOG2_E)
        scores.view(n, heads, length, length).add_(mask)
    weights = scores.sub_(lse.reshape(-1, length, 1)).exp2_()  # the softmax, recomputed: [n*h, L, L]
    grad_v = torch.bmm(weights.transpose(1, 2), g)
    back = torch.bmm(g, v.transpose(1, 2)).sub_(delta.reshape(-1, length, 1)).mul_(weights)
    grad_bias += back.view(n, heads, length, length).sum(0) if n > 1 else back
    grad_qkv[0].copy_(torch.bmm(back, k).mul_(scale).view(n, heads, length, width))
    grad_qkv[1].copy_(torch.bmm(back.transpose(1, 2), q).mul_(scale).view(n, heads, length, width))
    grad_qkv[2].copy_(grad_v.view(n, heads, length, width))


def _score_pieces(start: int, stop: int, heads: int, length: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of windows and heads whose scores stay near `PIECE_BYTES`: some heads of one window, or windows."""
    fitting = max(1, PIECE_BYTES // (length * length * size))
    if fitting < heads:
        for window in range(start, stop):
            for head in range(0, heads, fitting):
                yield slice(window, window + 1), slice(head, min(head + fitting, heads))
    else:
        step = fitting // heads
        for window in range(start, stop, step):
            yield slice(window, min(window + step, stop)), slice(0, heads)


def attention(qkv: Tensor, bias: Tensor, heads: int, patterns: Any) -> Tensor:
    """Attend inside each window: qkv [n, L, 3C], bias [h, L, L] -> [n, L, C]; `patterns(bias)` gives `Masks`."""
    out: Tensor = _Attention.apply(qkv, bias, heads, patterns)
    return out
