"""What both weight passes share on the device: a tile of weights times up to 8 rows of activations.

A program keeps its rows' activations in registers, in the order in which weights arrive, and walks
over outputs: each tile is BLOCK_N outputs of BLOCK_K features, read once in loads of up to 16
bytes, multiplied and summed. So what comes before the product (LayerNorm, gelu) is done once a
program and not once a tile, and a tile costs no traffic but its weights.

Where K does not fit one program, split_k programs share an output. Each writes its sums to a
workspace; the one that arrives last adds them in the order of the splits, so that the result is
the same whoever that is. Only the count of arrivals is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP16 = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)

# 2^23: a float32 with this exponent holds an integer below 2^23 in its mantissa as it is, so that
# `bits | EXPONENT` makes a number of a byte or nibble that is where it was in its word, without a
# shift and without an integer conversion (which has a quarter of the rate, or less). The kernels
# get EXPONENT as an argument and add `n >> 31` to it, which is zero: of two constants an
# instruction takes one, and `word & mask | EXPONENT` is one instruction only where the latter is in
# a register and not among the arguments, which are constants to the assembler.
_TWO_TO_23 = tl.constexpr(8388608.0)

# Outputs that the last program of a split adds up at once.
_CHUNK = tl.constexpr(128)


@triton.constexpr_function
def padded_rows(rows):
    """1, 2, 4 or 8: Triton's shapes are powers of two."""
    return 1 << (rows - 1).bit_length()


@triton.jit
def sums_over(values, AXIS: tl.constexpr, ROWS: tl.constexpr):
    """tl.sum of each of up to 8 tensors of one shape, joined to one of [..., padded_rows].

    Joined, they go through shared memory together, behind the same two barriers. What pads is the
    last row again.
    """
    LAST: tl.constexpr = ROWS - 1
    if ROWS == 1:
        return tl.expand_dims(tl.sum(values[0], axis=AXIS), -1)
    elif ROWS == 2:
        return tl.sum(tl.join(values[0], values[1]), axis=AXIS)
    elif ROWS <= 4:
        # A join appends a dimension, so that what differs by 1 is joined last.
        joined = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[LAST]))
        total = tl.sum(joined, axis=AXIS)
        return tl.reshape(total, total.shape[:-2] + [4])
    else:
        even = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[min(6, LAST)]))
        odd = tl.join(tl.join(values[1], values[min(5, LAST)]), tl.join(values[3], values[LAST]))
        total = tl.sum(tl.join(even, odd), axis=AXIS)
        return tl.reshape(total, total.shape[:-3] + [8])


@triton.jit
def scalars(values, ROWS: tl.constexpr):
    """The values of a tensor [padded_rows] as a tuple of scalars."""
    if ROWS == 1:
        return (tl.sum(values, axis=0),)
    elif ROWS == 2:
        value0, value1 = tl.split(values)
        return (value0, value1)
    elif ROWS <= 4:
        even, odd = tl.split(tl.reshape(values, [2, 2]))
        value0, value2 = tl.split(even)
        value1, value3 = tl.split(odd)
        return (value0, value1, value2, value3)
    else:
        even, odd = tl.split(tl.reshape(values, [2, 2, 2]))
        value04, value26 = tl.split(even)
        value15, value37 = tl.split(odd)
        value0, value4 = tl.split(value04)
        value2, value6 = tl.split(value26)
        value1, value5 = tl.split(value15)
        value3, value7 = tl.split(value37)
        return (value0, value1, value2, value3, value4, value5, value6, value7)


@triton.jit
def by_place(x, KIND: tl.constexpr):
    """Features [BLOCK_K] float32 as a tuple, one tensor for each place in a column of weights.

    A column is a float16, or a word of four int8 or eight int4 weights. Each tensor holds what the
    weights of its place are multiplied with, over the power of two that `at_place` leaves in them.
    """
    if KIND == FP16:
        return (x,)
    elif KIND == INT8:
        even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return (x0, x1 * (1 / 256), x2, x3 * (1 / 256))
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0] // 8, 2, 2, 2]))
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        low = (x0, x1 * (1 / 16), x2 * (1 / 256), x3 * (1 / 4096))
        return low + (x4, x5 * (1 / 16), x6 * (1 / 256), x7 * (1 / 4096))


@triton.jit
def at_place(tile, exponent, PLACE: tl.constexpr, KIND: tl.constexpr):
    """The weights of one place of each column, float32, times the power of two of their bits."""
    UNIT: tl.constexpr = 256 ** (PLACE % 2) if KIND == INT8 else 16 ** (PLACE % 4)
    if KIND == FP16:
        return tile.to(tl.float32)
    elif KIND == INT8:
        # Exclusive or with 128 is plus 128 for a two's complement byte read as unsigned.
        word = (tile ^ 0x80808080) >> (PLACE // 2 * 16)
        bits = (word & (255 * UNIT)) | exponent.to(tl.uint32)
        return bits.to(tl.float32, bitcast=True) - (_TWO_TO_23 + 128 * UNIT)
    else:
        word = tile >> (PLACE // 4 * 16)
        bits = (word & (15 * UNIT)) | exponent.to(tl.uint32)
        return bits.to(tl.float32, bitcast=True) - (_TWO_TO_23 + 8 * UNIT)


@triton.jit
def load_tile(
    weights,
    first_output,
    end_output,
    first_feature,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """(tile [BLOCK_N, columns], scales, bias [BLOCK_N] float32) of the outputs from first_output.

    scales are [BLOCK_N, groups] for INT4 and [BLOCK_N] otherwise. Weights are read once: they are
    the first that a cache may drop.
    """
    weight_ptr, scale_ptr, bias_ptr, k, row_stride, scale_stride, _ = weights
    PLACES: tl.constexpr = 1 if KIND == FP16 else (4 if KIND == INT8 else 8)
    outputs = first_output + tl.arange(0, BLOCK_N)
    is_output = outputs < end_output
    column = tl.max_contiguous(tl.arange(0, BLOCK_K // PLACES), VECTOR)
    rows = outputs.to(tl.int64)
    columns_ptr = weight_ptr if KIND == FP16 else weight_ptr.to(tl.pointer_type(tl.uint32))
    where = columns_ptr + (rows * row_stride)[:, None] + (first_feature // PLACES + column)[None, :]
    mask = is_output[:, None]
    if not EVEN_K:
        mask = mask & (first_feature + column * PLACES < k)[None, :]
    tile = tl.load(where, mask=mask, other=0, eviction_policy="evict_first")
    if KIND == INT4:
        group = first_feature // GROUP + tl.arange(0, BLOCK_K // GROUP)
        inside = is_output[:, None] & (group * GROUP < k)[None, :]
        where = scale_ptr + (rows * scale_stride)[:, None] + group[None, :]
        scales = tl.load(where, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32)
    elif KIND == INT8:
        scales = tl.load(scale_ptr + outputs, mask=is_output, other=0).to(tl.float32)
    else:
        scales = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=is_output, other=0).to(tl.float32)
    else:
        bias = tl.zeros([BLOCK_N], tl.float32)
    return tile, scales, bias


@triton.jit
def multiply(
    tile,
    scales,
    rows,
    exponent,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sums [BLOCK_N, padded_rows] float32 of a tile with each of `rows` (of `by_place`).

    INT4 sums are scaled, a group at a time; INT8 sums are not: one scale holds for all splits.
    """
    PLACES: tl.constexpr = 1 if KIND == FP16 else (4 if KIND == INT8 else 8)
    GROUPS: tl.constexpr = tile.shape[1] * PLACES // GROUP
    # Place by place, all rows: a place's weights are unpacked once and then forgotten.
    weights = at_place(tile, exponent, 0, KIND)
    products = ()
    for row in tl.static_range(ROWS):
        products = products + (weights * rows[row][0][None, :],)
    for place in tl.static_range(1, PLACES):
        weights = at_place(tile, exponent, place, KIND)
        added = ()
        for row in tl.static_range(ROWS):
            added = added + (products[row] + weights * rows[row][place][None, :],)
        products = added
    if KIND == INT4:
        grouped = ()
        for row in tl.static_range(ROWS):
            product = tl.reshape(products[row], [tile.shape[0], GROUPS, GROUP // PLACES])
            grouped = grouped + (tl.sum(product, axis=2) * scales,)
        products = grouped
    return sums_over(products, 1, ROWS)


@triton.jit
def arrived_last(arrivals_ptr, SPLIT_K: tl.constexpr):
    """Whether all other splits of these outputs have written their sums. Call it once a program.

    The barrier orders the stores of all threads before the count of one of them, and the count's
    acquire and release order them before the loads of the program that is last (PTX ISA, memory
    consistency model). The last one leaves the count at zero for the next launch.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
    tl.debug_barrier()
    return is_last


@triton.jit
def combine(
    weights,
    out_ptr,
    out_stride,
    partial_ptr,
    first_output,
    end_output,
    n,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Put outputs first_output to end_output together from the splits' sums, _CHUNK at a time.

    partial [SPLIT_K, ROWS, n], added in the order of the splits and read past the first-level
    cache, which may hold a line of the launch before.
    """
    scale_ptr, bias_ptr = weights[1], weights[2]
    row = tl.arange(0, padded_rows(ROWS))[:, None]
    for first in range(first_output, end_output, _CHUNK):
        outputs = first + tl.arange(0, _CHUNK)[None, :]
        is_output = outputs < end_output
        mask = is_output & (row < ROWS)
        total = tl.zeros([padded_rows(ROWS), _CHUNK], tl.float32)
        for split in tl.static_range(SPLIT_K):
            where = partial_ptr + (split * ROWS + row) * n + outputs
            total += tl.load(where, mask=mask, other=0, cache_modifier=".cg")
        if KIND == INT8:
            total *= tl.load(scale_ptr + outputs, mask=is_output, other=0).to(tl.float32)
        if HAS_BIAS:
            total += tl.load(bias_ptr + outputs, mask=is_output, other=0).to(tl.float32)
        where = out_ptr + row * out_stride + outputs
        if ADD:
            total += tl.load(where, mask=mask, other=0)
        tl.store(where, total.to(out_ptr.dtype.element_ty), mask=mask)


# A tile is asked for before the one at hand is multiplied (STAGES 2), so that the memory always has
# something to do; the first one, `ahead`, before the activations are made.
@triton.jit
def walk(
    weights,
    ahead,
    rows,
    out_ptr,
    out_stride,
    partial_ptr,
    first_output,
    end_output,
    split,
    n,
    tiles,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
):
    """Multiply `tiles` tiles with `rows`, for outputs first_output to end_output.

    With one split the outputs go to `out` (added to it, where ADD), otherwise to the partial sums.
    """
    if STAGES == 2:
        ahead_tile, ahead_scales, ahead_bias = ahead
    for step in tl.range(0, tiles, num_stages=STAGES if STAGES > 2 else 1):
        first = first_output + step * BLOCK_N
        wanted = first + BLOCK_N if STAGES == 2 else first
        if STAGES == 2:
            tile, scales, bias = ahead_tile, ahead_scales, ahead_bias
        asked, asked_scales, asked_bias = load_tile(
            weights,
            wanted,
            end_output,
            split * BLOCK_K,
            KIND,
            BLOCK_N,
            BLOCK_K,
            GROUP,
            EVEN_K,
            VECTOR,
            HAS_BIAS,
        )
        if STAGES == 2:
            ahead_tile, ahead_scales, ahead_bias = asked, asked_scales, asked_bias
        else:
            tile, scales, bias = asked, asked_scales, asked_bias
        sums = multiply(tile, scales, rows, weights[6], ROWS, KIND, GROUP)
        row = tl.arange(0, padded_rows(ROWS))[None, :]
        outputs = first + tl.arange(0, BLOCK_N)[:, None]
        mask = (outputs < end_output) & (row < ROWS)
        if SPLIT_K == 1:
            if KIND == INT8:
                sums *= scales[:, None]
            where = out_ptr + row * out_stride + outputs
            sums += bias[:, None]
            if ADD:
                sums += tl.load(where, mask=mask, other=0)
            tl.store(where, sums.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(partial_ptr + (split * ROWS + row) * n + outputs, sums, mask=mask)
