"""The Triton kernels of window attention, forward and backward; `triton_attention` makes an operator of them.

The scores of a window exist in registers, one tile at a time, and are computed again in the backward pass; kept are the
output and, for each row, the logarithm of the softmax's sum (FlashAttention-2, arXiv 2307.08691). Masks are compared
from the region of each token. No kernel adds with atomics: a program owns what it writes, so that two runs give the
same bits. That holds for the bias too, whose tile sums over the windows in a fixed number of splits.

q, k and v are read from the packed projection, and their gradients written to one, without a copy. Whatever decides
addresses is a constant of the compilation, so that rows of 392 tokens are read as vectors, which no argument of the
kernel that 16 does not divide would allow.

Shapes: L = tokens of a window; nWB = windows of all clips; h = heads; d = channels of a head, D = d up to a power of two;
C = h*d; M, N = tokens of a tile, queries (rows ``m``) and keys (rows ``n``): a program owns some and steps over the others.
Pointers: qkv [nWB, L, 3C] and grad_qkv; bias [h, L, L]; regions int32 [patterns, L] and pattern int32 [nWB] of a
`BatchPlan`; out and grad [nWB, L, C]; norm (the logarithms) and delta float32 [nWB, h, L].
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from .windows import MASK_VALUE

MASK = tl.constexpr(MASK_VALUE)


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
def forward(
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
def backward_queries(
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
def backward_keys(
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
def backward_bias(
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
