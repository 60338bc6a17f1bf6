"""The Triton kernels of window attention, forward and backward; `triton_attention` makes an operator of them.

The scores of a window exist in registers, one tile at a time, and are recomputed in the backward pass; kept are the
output and, for each row, the logarithm of the softmax's sum (FlashAttention-2, arXiv 2307.08691). Masks are compared
from the region of each token. No kernel adds with atomics: a program owns what it writes, so that two runs give the
same bits. That holds for the bias too, whose tile sums over the windows in a fixed number of splits.

What bounds them on an H200 is the number of instructions for each score, so these are few: powers of two that flush
denormals instead of exponentials, a bias that is padded beforehand instead of masked at every load,
and region masks that come out of one more product on the tensor cores. There a region is a one-hot code; the code of one
side is turned into the mask's value for each *other* region, in two parts, since bfloat16 holds no 100 / scale.

q, k and v are read from the packed projection, and their gradients written to one, without a copy. Whatever decides
addresses is a constant of the compilation, so that rows of 392 tokens are read as vectors, which no argument of the
kernel that 16 does not divide would allow.

Shapes: L = tokens of a window; nWB = windows of all clips; h = heads; d = channels of a head, D = d up to a power of two;
C = h*d; M, N = tokens of a tile, queries (rows `m`) and keys (rows `n`): a program owns some and steps over the others.
Pointers: qkv [nWB, L, 3C] and grad_qkv; bias [h, P, P], -inf from L to P, which both sizes of a tile divide; codes
[patterns, L, 16] and pattern int32 [nWB] of a `BatchGeometry`; out and grad [nWB, L, C]; norm (the logarithms) and delta
float32 [nWB, h, L]. `high` and `low` are the two parts of the mask's value.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2 ** (x * LOG2E)


@triton.jit
def _position(blocks, heads):
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
def _codes(codes, rows, L: tl.constexpr):
    """Region codes of tokens, [rows, 16]; zero past L."""
    channel = tl.arange(0, 16)
    return tl.load(codes + rows[:, None] * 16 + channel[None, :], mask=rows[:, None] < L, other=0.0)


@triton.jit
def _of_others(codes, high: tl.constexpr, low: tl.constexpr):
    """Return what gives, times a code, the mask's value over the scale for another region and 0 for the same."""
    value = tl.where(tl.arange(0, 16) % 2 == 0, high, low)
    return ((1.0 - codes.to(tl.float32)) * value[None, :]).to(codes.dtype)


@triton.jit
def _pairs(bias, m, n, P: tl.constexpr):
    """Bias of the pairs of queries m and keys n, float32 [M, N]; -inf past L, where no softmax weight may fall."""
    return tl.load(bias + m[:, None] * P + n[None, :]).to(tl.float32)


@triton.jit
def forward(
    qkv, bias, codes, pattern, out, norm, scale,
    L: tl.constexpr, heads: tl.constexpr, d: tl.constexpr, D: tl.constexpr, own: tl.constexpr, step: tl.constexpr,
    P: tl.constexpr, masked: tl.constexpr, high: tl.constexpr, low: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Output of a block of queries: softmax(q k^T * scale + bias + mask) v, and the log of the softmax's sum."""
    C: tl.constexpr = heads * d
    block, head, window = _position(tl.cdiv(L, own), heads)
    qkv += window * (L * 3 * C) + head * d
    bias += head * (P * P)
    m = block * own + tl.arange(0, own)
    q = _rows(qkv, m, 3 * C, L, d, D)
    if masked:
        codes += tl.load(pattern + window) * (L * 16)
        of_m = _of_others(_codes(codes, m, L).to(q.dtype), high, low)
    top = tl.full([own], -1e30, tl.float32)  # finite: a row past L has no score above -inf
    total = tl.zeros([own], tl.float32)
    sums = tl.zeros([own, D], tl.float32)
    for start in range(0, L, step):
        n = start + tl.arange(0, step)
        k = _rows(qkv + C, n, 3 * C, L, d, D)
        product = tl.dot(q, tl.trans(k), input_precision=precision)
        if masked:
            of_n = _codes(codes, n, L).to(q.dtype)
            product = tl.dot(of_m, tl.trans(of_n), product, input_precision=precision)
        scores = product * scale + _pairs(bias, m, n, P)
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2((top - higher) * LOG2E)
        weights = tl.exp2(scores * LOG2E - (higher * LOG2E)[:, None])
        v = _rows(qkv + 2 * C, n, 3 * C, L, d, D)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=precision)
        top = higher
    total = tl.where(m < L, total, 1.0)
    _store_rows(out + window * (L * C) + head * d, m, sums / total[:, None], C, L, d, D)
    tl.store(norm + (window * heads + head) * L + m, top + tl.log(total), mask=m < L)


@triton.jit
def backward_queries(
    qkv, bias, codes, pattern, out, norm, grad, delta, grad_qkv, scale,
    L: tl.constexpr, heads: tl.constexpr, d: tl.constexpr, D: tl.constexpr, own: tl.constexpr, step: tl.constexpr,
    P: tl.constexpr, masked: tl.constexpr, high: tl.constexpr, low: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries; leaves delta = sum of out * grad of each row for the other kernels."""
    C: tl.constexpr = heads * d
    block, head, window = _position(tl.cdiv(L, own), heads)
    qkv += window * (L * 3 * C) + head * d
    bias += head * (P * P)
    m = block * own + tl.arange(0, own)
    q = _rows(qkv, m, 3 * C, L, d, D)
    if masked:
        codes += tl.load(pattern + window) * (L * 16)
        of_m = _of_others(_codes(codes, m, L).to(q.dtype), high, low)
    g = _rows(grad + window * (L * C) + head * d, m, C, L, d, D)
    o = _rows(out + window * (L * C) + head * d, m, C, L, d, D)
    row = (window * heads + head) * L + m
    inner = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row, inner, mask=m < L)
    minus_log = tl.load(norm + row, mask=m < L, other=0.0) * -LOG2E
    sums = tl.zeros([own, D], tl.float32)
    for start in range(0, L, step):
        n = start + tl.arange(0, step)
        k = _rows(qkv + C, n, 3 * C, L, d, D)
        v = _rows(qkv + 2 * C, n, 3 * C, L, d, D)
        product = tl.dot(q, tl.trans(k), input_precision=precision)
        if masked:
            of_n = _codes(codes, n, L).to(q.dtype)
            product = tl.dot(of_m, tl.trans(of_n), product, input_precision=precision)
        scores = product * scale + _pairs(bias, m, n, P)
        weights = tl.exp2(scores * LOG2E + minus_log[:, None])
        back = weights * (tl.dot(g, tl.trans(v), input_precision=precision) - inner[:, None])
        sums = tl.dot(back.to(k.dtype), k, sums, input_precision=precision)
    _store_rows(grad_qkv + window * (L * 3 * C) + head * d, m, sums * scale, 3 * C, L, d, D)


@triton.jit
def backward_keys(
    qkv, bias, codes, pattern, norm, grad, delta, grad_qkv, scale,
    L: tl.constexpr, heads: tl.constexpr, d: tl.constexpr, D: tl.constexpr, own: tl.constexpr, step: tl.constexpr,
    P: tl.constexpr, masked: tl.constexpr, high: tl.constexpr, low: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values; tiles are [keys, queries], so that products take them as they are."""
    C: tl.constexpr = heads * d
    block, head, window = _position(tl.cdiv(L, own), heads)
    qkv += window * (L * 3 * C) + head * d
    grad += window * (L * C) + head * d
    bias += head * (P * P)
    n = block * own + tl.arange(0, own)
    k = _rows(qkv + C, n, 3 * C, L, d, D)
    v = _rows(qkv + 2 * C, n, 3 * C, L, d, D)
    if masked:
        codes += tl.load(pattern + window) * (L * 16)
        of_n = _of_others(_codes(codes, n, L).to(k.dtype), high, low)
    sums_k = tl.zeros([own, D], tl.float32)
    sums_v = tl.zeros([own, D], tl.float32)
    for start in range(0, L, step):
        m = start + tl.arange(0, step)
        q = _rows(qkv, m, 3 * C, L, d, D)
        g = _rows(grad, m, C, L, d, D)
        row = (window * heads + head) * L + m
        minus_log = tl.load(norm + row, mask=m < L, other=0.0) * -LOG2E
        inner = tl.load(delta + row, mask=m < L, other=0.0)
        product = tl.dot(k, tl.trans(q), input_precision=precision)
        if masked:
            of_m = _codes(codes, m, L).to(k.dtype)
            product = tl.dot(of_n, tl.trans(of_m), product, input_precision=precision)
        scores = product * scale + tl.trans(_pairs(bias, m, n, P))
        weights = tl.exp2(scores * LOG2E + minus_log[None, :])
        sums_v = tl.dot(weights.to(g.dtype), g, sums_v, input_precision=precision)
        back = weights * (tl.dot(v, tl.trans(g), input_precision=precision) - inner[None, :])
        sums_k = tl.dot(back.to(q.dtype), q, sums_k, input_precision=precision)
    grad_qkv += window * (L * 3 * C) + head * d
    _store_rows(grad_qkv + C, n, sums_k * scale, 3 * C, L, d, D)
    _store_rows(grad_qkv + 2 * C, n, sums_v, 3 * C, L, d, D)


@triton.jit(do_not_specialize=["windows", "per_split"])
def backward_bias(
    qkv, bias, codes, others, pattern, norm, grad, delta, partial, scale, windows, per_split,
    L: tl.constexpr, heads: tl.constexpr, d: tl.constexpr, D: tl.constexpr, own: tl.constexpr, step: tl.constexpr,
    P: tl.constexpr, masked: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of the bias, summed over one split: `per_split` windows.

    others: what `_of_others` makes of the codes, made beforehand. partial: float32 [splits, h, L, L].
    """
    C: tl.constexpr = heads * d
    across: tl.constexpr = tl.cdiv(L, step)
    block, head, split = _position(tl.cdiv(L, own) * across, heads)
    m = block // across * own + tl.arange(0, own)
    n = block % across * step + tl.arange(0, step)
    pairs = _pairs(bias + head * (P * P), m, n, P)
    sums = tl.zeros([own, step], tl.float32)
    for window in range(split * per_split, tl.minimum(split * per_split + per_split, windows)):
        packed = qkv + window * (L * 3 * C) + head * d
        q = _rows(packed, m, 3 * C, L, d, D)
        k = _rows(packed + C, n, 3 * C, L, d, D)
        v = _rows(packed + 2 * C, n, 3 * C, L, d, D)
        g = _rows(grad + window * (L * C) + head * d, m, C, L, d, D)
        row = (window * heads + head) * L + m
        minus_log = tl.load(norm + row, mask=m < L, other=0.0) * -LOG2E
        inner = tl.load(delta + row, mask=m < L, other=0.0)
        product = tl.dot(q, tl.trans(k), input_precision=precision)
        if masked:
            first = tl.load(pattern + window) * (L * 16)
            of_m, of_n = _codes(others + first, m, L), _codes(codes + first, n, L)
            product = tl.dot(of_m.to(q.dtype), tl.trans(of_n.to(q.dtype)), product, input_precision=precision)
        weights = tl.exp2((product * scale + pairs) * LOG2E + minus_log[:, None])
        sums += weights * (tl.dot(g, tl.trans(v), input_precision=precision) - inner[:, None])
    inside = (m[:, None] < L) & (n[None, :] < L)
    tl.store(partial + (split * heads + head) * (L * L) + m[:, None] * L + n[None, :], sums, mask=inside)
