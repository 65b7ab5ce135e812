"""The kernels of a program on a GPU, in Triton: a block of one robot's batch is one or two of them.

At a batch of 1 the time of a step is that of its launches and of waiting for memory, so each kernel does all that its
inputs allow, normalisation and residual sums included, and divides its outputs among many small programs. A product of
few rows is divided along its sum as well, into slices that different warps add up.

Rows [M, D] are the tokens of all batch entries. `PRECISION` is how Triton multiplies single precision; `PDL` lets a
kernel start, and load its weights, while the one before it ends (programmatic dependent launch, compute capability 9).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NO_ACTIVATION, GELU, RELU, GELU_TANH = range(4)
# a kernel sees constants as such alone
_RELU, _GELU, _GELU_TANH = tl.constexpr(RELU), tl.constexpr(GELU), tl.constexpr(GELU_TANH)


_kernel = triton.jit(do_not_specialize=["count"])  # of which programs have many: one compiled kernel serves all


@triton.jit
def _started(PDL: tl.constexpr) -> None:
    """What comes after this may read what the kernel before wrote."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _normalised(x, is_valid, gamma, beta, eps, width):  # type: ignore[no-untyped-def]
    """Layer normalisation of x [S, rows, K], whose rows are divided into S slices; no numbers where it overflows."""
    mean = tl.sum(tl.sum(x, 2), 0) / width
    centred = tl.where(is_valid, x - mean[None, :, None], 0.0)
    variance = tl.sum(tl.sum(centred * centred, 2), 0) / width
    scale = tl.where(variance < float("inf"), tl.rsqrt(variance + eps), float("nan"))
    return centred * scale[None, :, None] * gamma[:, None, :] + beta[:, None, :]


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == _RELU:
        x = tl.where(x < 0, 0.0, x)  # which leaves NaN
    elif ACTIVATION == _GELU:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == _GELU_TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1 + tl.exp(-2 * inner))
    return x


@triton.jit
def _add_to_stream(x, value, residuals, count, stride, at, mask):  # type: ignore[no-untyped-def]
    """x += value, the residual of a block, and the stored ones of the `count` blocks after it, at the places `at`."""
    tl.store(residuals + at, value, mask)
    value = value.to(tl.float32)
    for block in range(1, count + 1):
        value += tl.load(residuals + block * stride + at, mask, 0.0).to(tl.float32)
    tl.store(x + at, tl.load(x + at, mask, 0.0).to(tl.float32) + value, mask)


@_kernel
def norm_linear(  # type: ignore[no-untyped-def]
    x, gamma, beta, eps, weight, bias, out, num_rows, width, num_outputs,
    ACTIVATION: tl.constexpr, SLICES: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, O] = activation(norm(x) @ weight [D, O] + bias)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, SLICES)[:, None] * K + tl.arange(0, K)[None, :]
    in_width, in_columns = k < width, columns < num_outputs
    tile = tl.load(
        weight + k[:, :, None] * num_outputs + columns[None, None, :],
        in_width[:, :, None] & in_columns[None, None, :],
        0.0,
    )
    gamma, beta = tl.load(gamma + k, in_width, 0.0).to(tl.float32), tl.load(beta + k, in_width, 0.0).to(tl.float32)
    offset = tl.load(bias + columns, in_columns, 0.0).to(tl.float32)
    _started(PDL)
    is_valid = (rows < num_rows)[None, :, None] & in_width[:, None, :]
    tokens = tl.load(x + rows[None, :, None] * width + k[:, None, :], is_valid, 0.0).to(tl.float32)
    tokens = _normalised(tokens, is_valid, gamma, beta, eps, width)
    product = tl.sum(tl.dot(tokens.to(tile.dtype), tile, input_precision=PRECISION), 0)
    result = _activated(product + offset[None, :], ACTIVATION)
    mask = (rows < num_rows)[:, None] & in_columns[None, :]
    tl.store(out + rows[:, None] * num_outputs + columns[None, :], result, mask)


@_kernel
def linear(  # type: ignore[no-untyped-def]
    hidden, weight, bias, x, residuals, num_rows, width, count, stride,
    INPUTS: tl.constexpr, SLICES: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The residual of a block [M, D] = hidden [M, I] @ weight [I, D] + bias; x += it and the `count` ones after it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slices = tl.arange(0, SLICES)[:, None] * K + tl.arange(0, K)[None, :]
    in_rows, in_columns = rows < num_rows, columns < width
    offset = tl.load(bias + columns, in_columns, 0.0).to(tl.float32)
    total = tl.zeros((SLICES, ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, INPUTS, SLICES * K):
        k = first + slices
        tile = tl.load(
            weight + k[:, :, None] * width + columns[None, None, :],
            (k < INPUTS)[:, :, None] & in_columns[None, None, :],
            0.0,
        )
        if first == 0:
            _started(PDL)
        tokens = tl.load(
            hidden + rows[None, :, None] * INPUTS + k[:, None, :],
            in_rows[None, :, None] & (k < INPUTS)[:, None, :],
            0.0,
        )
        total += tl.dot(tokens.to(tile.dtype), tile, input_precision=PRECISION)
    result = (tl.sum(total, 0) + offset[None, :]).to(residuals.dtype.element_ty)
    at, mask = rows[:, None] * width + columns[None, :], in_rows[:, None] & in_columns[None, :]
    _add_to_stream(x, result, residuals, count, stride, at, mask)


@_kernel
def attend(  # type: ignore[no-untyped-def]
    qkv, attention_mask, weight, bias, x, residuals, num_tokens, head_width, width, count, stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The residual of a self-attention block from its queries, keys and values [M, 3 D]; x += it and `count` more.

    Every program attends with all heads, `GROUP` at a time, since that is little work, and projects some columns.
    """
    tokens, d = tl.arange(0, TOKENS), tl.arange(0, K)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_tokens, in_head, in_columns = tokens < num_tokens, d < head_width, columns < width
    rows = tl.program_id(0) * num_tokens + tokens
    offset = tl.load(bias + columns, in_columns, 0.0).to(tl.float32)
    hidden = tl.where(in_tokens, 0.0, float("-inf"))[None, :] + tl.zeros((TOKENS, TOKENS), tl.float32)
    if MASKED:
        both = in_tokens[:, None] & in_tokens[None, :]
        hidden += tl.load(attention_mask + tokens[:, None] * num_tokens + tokens[None, :], both, 0.0).to(tl.float32)
    total = tl.zeros((GROUP, TOKENS, COLUMNS), tl.float32)
    for first in tl.static_range(0, HEADS, GROUP):
        head = (first + tl.arange(0, GROUP)) * head_width
        tile = tl.load(
            weight + (head[:, None] + d[None, :])[:, :, None] * width + columns[None, None, :],
            in_head[None, :, None] & in_columns[None, None, :],
            0.0,
        )
        if first == 0:
            _started(PDL)
        at = qkv + rows[None, :, None] * (3 * width) + head[:, None, None] + d[None, None, :]
        mask = in_tokens[None, :, None] & in_head[None, None, :]
        queries, keys = tl.load(at, mask, 0.0), tl.load(at + width, mask, 0.0)
        values = tl.load(at + 2 * width, mask, 0.0)
        logits = tl.dot(queries, tl.permute(keys, (0, 2, 1)), input_precision=PRECISION) * scale + hidden[None, :, :]
        weights = tl.exp(logits - tl.max(logits, 2)[:, :, None])
        weights = weights / tl.sum(weights, 2)[:, :, None]
        mixed = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        total += tl.dot(mixed.to(values.dtype).to(tile.dtype), tile, input_precision=PRECISION)
    result = (tl.sum(total, 0) + offset[None, :]).to(residuals.dtype.element_ty)
    at, mask = rows[:, None] * width + columns[None, :], in_tokens[:, None] & in_columns[None, :]
    _add_to_stream(x, result, residuals, count, stride, at, mask)


@_kernel
def cross_attend(  # type: ignore[no-untyped-def]
    x, gamma, beta, eps, vectors, time_vectors, offset, time_offset, condition_mask, bias, residuals,
    num_tokens, num_seen, num_heads, width, count, stride, seen_stride, time_stride,
    SEEN: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, SLICES: tl.constexpr, K: tl.constexpr,
    TIMED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The residual of a cross-attention block from its folded condition (see `FoldedTokens`); x += it and `count` more.

    `TIMED`: the first token is that of the timestep, from `time_vectors`. A program sees one batch entry.
    """
    entry = tl.program_id(0)
    tokens, pairs = tl.arange(0, TOKENS), tl.arange(0, SEEN * HEADS)
    seen, head = pairs // HEADS, pairs % HEADS  # of each pair of a condition's token and a head
    in_tokens, in_pairs = tokens < num_tokens, (seen < num_seen) & (head < num_heads)
    from_time = in_pairs & (seen == 0) & TIMED
    of_call = in_pairs & ((seen > 0) | (not TIMED))
    k = tl.arange(0, SLICES)[:, None] * K + tl.arange(0, K)[None, :]
    in_width = k < width
    gamma, beta = tl.load(gamma + k, in_width, 0.0).to(tl.float32), tl.load(beta + k, in_width, 0.0).to(tl.float32)
    add = tl.load(bias + k, in_width, 0.0).to(tl.float32)
    pair_at = entry * (num_seen * num_heads) + seen * num_heads + head
    call_at, call_mask = pair_at[None, :, None] * width + k[:, None, :], of_call[None, :, None] & in_width[:, None, :]
    time_at, time_mask = head[None, :, None] * width + k[:, None, :], from_time[None, :, None] & in_width[:, None, :]
    logits_of = tl.load(time_vectors + time_at, time_mask, 0.0)
    values_of = tl.load(time_vectors + time_stride + time_at, time_mask, 0.0)
    time_logits = tl.load(time_offset + head, from_time, 0.0).to(tl.float32)[None, :] + tl.load(
        condition_mask + tokens[:, None] * num_seen, in_tokens[:, None] & from_time[None, :], 0.0
    ).to(tl.float32)
    _started(PDL)
    logits_of += tl.load(vectors + call_at, call_mask, 0.0)
    values_of += tl.load(vectors + seen_stride + call_at, call_mask, 0.0)
    offset_at = (
        (entry * num_tokens + tokens[:, None]) * (num_seen * num_heads) + seen[None, :] * num_heads + head[None, :]
    )
    constant = time_logits + tl.load(offset + offset_at, in_tokens[:, None] & of_call[None, :], 0.0).to(tl.float32)
    rows = entry * num_tokens + tokens
    is_valid = in_tokens[None, :, None] & in_width[:, None, :]
    at = rows[None, :, None] * width + k[:, None, :]
    stream = _normalised(tl.load(x + at, is_valid, 0.0).to(tl.float32), is_valid, gamma, beta, eps, width)
    products = tl.dot(stream.to(logits_of.dtype), tl.permute(logits_of, (0, 2, 1)), input_precision=PRECISION)
    logits = tl.where((seen < num_seen)[None, :], tl.sum(products, 0) + constant, float("-inf"))
    logits = tl.reshape(logits, (TOKENS, SEEN, HEADS))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None, :])
    weights = tl.reshape(weights / tl.sum(weights, 1)[:, None, :], (TOKENS, SEEN * HEADS)).to(values_of.dtype)
    weights = tl.broadcast_to(weights[None, :, :], (SLICES, TOKENS, SEEN * HEADS))
    result = (tl.dot(weights, values_of, input_precision=PRECISION) + add[:, None, :]).to(residuals.dtype.element_ty)
    _add_to_stream(x, result, residuals, count, stride, at, is_valid)


@_kernel
def between_steps(  # type: ignore[no-untyped-def]
    x, stack_gamma, stack_beta, stack_eps, gamma, beta, eps, head, head_bias,
    trajectory, last_x0, noise, given, is_given, input_weight, embedded, addends,
    num_rows, width, size, a, b, s, c, d, e, f, clip, count, stride,
    SLICES: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    STACK_NORM: tl.constexpr, NORM: tl.constexpr, PREDICTS: tl.constexpr, CLIPS: tl.constexpr, DRAWS: tl.constexpr,
    FOLLOWS: tl.constexpr, PAINTS: tl.constexpr, EMBEDS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """From a step's x [M, D] through the model's output and the scheduler's step to the trajectory [M, A], and on to
    the next step's x, with the first `count` stored residuals of `addends`."""
    rows, numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    in_rows, in_size = rows < num_rows, numbers < size
    k = tl.arange(0, SLICES)[:, None] * K + tl.arange(0, K)[None, :]
    in_width = k < width
    small_at, small = rows[:, None] * size + numbers[None, :], in_rows[:, None] & in_size[None, :]
    at, is_valid = rows[None, :, None] * width + k[:, None, :], in_rows[None, :, None] & in_width[:, None, :]
    _started(PDL)
    current = tl.load(trajectory + small_at, small, 0.0).to(tl.float32)
    if PREDICTS:
        stream = tl.load(x + at, is_valid, 0.0).to(tl.float32)
        if STACK_NORM:
            scale, shift = tl.load(stack_gamma + k, in_width, 0.0), tl.load(stack_beta + k, in_width, 0.0)
            stream = _normalised(stream, is_valid, scale.to(tl.float32), shift.to(tl.float32), stack_eps, width)
        if NORM:
            scale, shift = tl.load(gamma + k, in_width, 0.0), tl.load(beta + k, in_width, 0.0)
            stream = _normalised(stream, is_valid, scale.to(tl.float32), shift.to(tl.float32), eps, width)
        tile = tl.load(
            head + numbers[None, :, None] * width + k[:, None, :], in_size[None, :, None] & in_width[:, None, :], 0.0
        )
        product = tl.dot(stream.to(tile.dtype), tl.permute(tile, (0, 2, 1)), input_precision=PRECISION)
        output = tl.sum(product, 0) + tl.load(head_bias + numbers, in_size, 0.0).to(tl.float32)[None, :]
        output = output.to(tile.dtype).to(tl.float32)
        clean = (current * a + output * b) / s
        if CLIPS:  # as clamping does, these leave NaN
            clean = tl.where(clean > clip, clip, clean)
            clean = tl.where(clean < -clip, -clip, clean)
        current = current * d + clean * c + output * e
        if FOLLOWS:  # the step before, of which it needs x0
            current += tl.load(last_x0 + small_at, small, 0.0).to(tl.float32) * f
        tl.store(last_x0 + small_at, clean, small)
        if DRAWS:
            current += tl.load(noise + small_at, small, 0.0).to(tl.float32)
    if PAINTS:
        painted = tl.load(is_given + small_at, small, 0)
        current = tl.where(painted != 0, tl.load(given + small_at, small, 0.0).to(tl.float32), current)
    tl.store(trajectory + small_at, current, small)
    if EMBEDS:
        tile = tl.load(
            input_weight + numbers[None, :, None] * width + k[:, None, :],
            in_size[None, :, None] & in_width[:, None, :],
            0.0,
        )
        same = tl.broadcast_to(current[None, :, :], (SLICES, ROWS, SIZE))
        stream = tl.dot(same.to(tile.dtype), tile, input_precision=PRECISION)
        stream += tl.load(embedded + at, is_valid, 0.0).to(tl.float32)
        for block in range(count):
            stream += tl.load(addends + block * stride + at, is_valid, 0.0).to(tl.float32)
        tl.store(x + at, stream, is_valid)
