"""The five kernels of `gptjet.kernels.gpu.sampling`, in the order of their launches.

    best_kernel     largest logit of each chunk of a row, its lowest id, and what is not finite
    weights_kernel  integer weights of the rows that draw
    search_kernel   one step of a cut: 9 for top-k, then 9 for top-p
    kept_kernel     weight that each chunk keeps
    choose_kernel   the id

`reals` and `wholes` are SamplingParameters.packed, as float64 and as int64. Ids from num_usable on
are never chosen. Of a row that is greedy, the kernels between the first and the last do nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

WEIGHT_BITS = 44
LEVEL_BITS = 5
LEVELS = 9  # 45 bits: the likeliest token's weight is 2**44 itself

_UNIT = tl.constexpr(2.0**WEIGHT_BITS)
_LAST_SHIFT = tl.constexpr(LEVEL_BITS * (LEVELS - 1))
_BITS = tl.constexpr(LEVEL_BITS)
_PARTS = tl.constexpr(2**LEVEL_BITS)
_COUNT = tl.constexpr(LEVELS)
_ROW_STATE = tl.constexpr(2 * 2 * (LEVELS + 1))
_ROW_SUMS = tl.constexpr(2 * LEVELS * 2**LEVEL_BITS)
# Columns of SamplingParameters.packed.
FIELDS = tl.constexpr(7)
TEMPERATURE = tl.constexpr(0)
TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(3)
SEED = tl.constexpr(4)
INDEX = tl.constexpr(5)
POSITION = tl.constexpr(6)


@triton.jit
def _ceil(x):
    """Of a float64 from 0 to 2**62, as int64."""
    whole = x.to(tl.int64)
    return whole + (whole.to(tl.float64) < x).to(tl.int64)


@triton.jit(do_not_specialize=["num_usable"])
def best_kernel(logits, logits_stride, best, best_ids, vocab, num_usable, CHUNK: tl.constexpr):
    """Program (chunk, row)."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * logits_stride + ids, mask=ids < vocab, other=float("-inf"))
    is_bad = (x != x) | (x == float("inf"))
    usable = tl.where(is_bad | (ids >= num_usable), float("-inf"), x)
    value, where = tl.max(usable, 0, return_indices=True)
    chosen = tl.where(tl.max(is_bad.to(tl.int32), 0) > 0, -1, chunk * CHUNK + where)
    at = row * tl.num_programs(0) + chunk
    tl.store(best + at, value)
    tl.store(best_ids + at, chosen)


@triton.jit(do_not_specialize=["num_usable"])
def weights_kernel(
    logits,
    logits_stride,
    reals,
    num_usable,
    best,
    weights,
    sums,
    vocab,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Program (chunk, row): weights of the ids, 0 of what cannot be chosen."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(reals + row * FIELDS + TEMPERATURE)
    if temperature > 0.0:  # NaN is not
        chunks = tl.num_programs(0)
        lane = tl.arange(0, CHUNKS)
        held = tl.load(best + row * chunks + lane, mask=lane < chunks, other=float("-inf"))
        largest = tl.max(held, 0)
        # Of a row that is not usable nothing is read but that; its weights must be numbers.
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * logits_stride + ids, mask=ids < num_usable, other=float("-inf"))
        x = tl.where((x != x) | (x > largest), float("-inf"), x)
        below = (x.to(tl.float64) - largest.to(tl.float64)) / temperature
        weight = (tl.exp(below) * _UNIT).to(tl.int64)
        tl.store(weights + row * vocab + ids, weight, mask=ids < vocab)
        if chunk == 0:
            place = tl.arange(0, 1024)
            tl.store(sums + row * _ROW_SUMS + place, place.to(tl.int64) * 0, place < _ROW_SUMS)


@triton.jit
def _narrow(sums, state, level, top_p, IS_TOP_P: tl.constexpr):
    """(least, need) of a filter's row before step `level`, from those before the step before it.

    The threshold is in [least, least + 2**(bits left)), and it is the largest one at which what
    lies there, at it or above, counts (weighs) `need` or more. sums, state: of the filter and row.
    """
    least = tl.load(state + (level - 1) * 2)
    need = tl.load(state + (level - 1) * 2 + 1)
    part = tl.arange(0, _PARTS)
    held = tl.load(sums + (level - 1) * _PARTS + part)
    total = tl.sum(held, 0)
    if IS_TOP_P:
        # How much top_p of the mass is, is known once the first step has summed it.
        need = tl.where(level == 1, _ceil(total.to(tl.float64) * top_p), need)
    above = total - tl.cumsum(held, 0)
    # The lowest part, where rounding has it that even all of the mass is less than `need`.
    chosen = tl.max(tl.where(above + held >= need, part, 0), 0)
    need -= tl.sum(tl.where(part == chosen, above, 0), 0)
    return least + (chosen.to(tl.int64) << (_LAST_SHIFT - _BITS * (level - 1))), need


@triton.jit(do_not_specialize=["num_usable", "level"])
def search_kernel(
    reals,
    wholes,
    num_usable,
    weights,
    sums,
    state,
    vocab,
    level,
    IS_TOP_P: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Program (chunk, row): what of the chunk falls into each part of the row's interval."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(reals + row * FIELDS + TEMPERATURE)
    top_k = tl.load(wholes + row * FIELDS + TOP_K)
    top_p = tl.load(reals + row * FIELDS + TOP_P)
    cuts_k = (top_k > 0) & (top_k < num_usable)
    asked = cuts_k
    if IS_TOP_P:
        asked = (top_p > 0.0) & (top_p < 1.0)
    if (temperature > 0.0) & asked:
        sums_k = sums + row * _ROW_SUMS
        state_k = state + row * _ROW_STATE
        # Only what the top k weigh is top_p's to cut.
        dropped = tl.full([], 0, tl.int64)
        own_sums = sums_k
        own_state = state_k
        if IS_TOP_P:
            own_sums += _COUNT * _PARTS
            own_state += (_COUNT + 1) * 2
            if cuts_k:
                if level == 0:
                    dropped, _ = _narrow(sums_k, state_k, _COUNT, 0.0, False)
                    if chunk == 0:
                        tl.store(state_k + _COUNT * 2, dropped)
                else:
                    dropped = tl.load(state_k + _COUNT * 2)
        least = tl.full([], 0, tl.int64)
        need = top_k
        if level > 0:
            least, need = _narrow(own_sums, own_state, level, top_p, IS_TOP_P)
        if chunk == 0:
            tl.store(own_state + level * 2, least)
            tl.store(own_state + level * 2 + 1, need)
        lowest = tl.maximum(least, dropped)
        shift = _LAST_SHIFT - _BITS * level
        part = tl.arange(0, _PARTS)
        total = tl.zeros([AT_ONCE, _PARTS], tl.int64)
        for first in range(0, CHUNK, AT_ONCE):
            ids = chunk * CHUNK + first + tl.arange(0, AT_ONCE)
            inside = ids < num_usable
            weight = tl.load(weights + row * vocab + ids, mask=inside, other=-1)
            # Below the interval it is in no part; above it, in none of these.
            which = tl.where(weight >= lowest, (weight - least) >> shift, -1)
            if IS_TOP_P:
                total += tl.where(which[:, None] == part[None, :], weight[:, None], 0)
            else:
                total += (which[:, None] == part[None, :]).to(tl.int64)
        found = tl.sum(total, 0)
        tl.atomic_add(own_sums + level * _PARTS + part, found, mask=found != 0)


@triton.jit
def _cut(reals, wholes, row, num_usable, sums, state, FILTERS: tl.constexpr):
    """(below, ties): weights above `below` stay, and of those equal to it the first `ties`."""
    below = tl.full([], -1, tl.int64)
    ties = tl.full([], 0, tl.int64)
    if FILTERS:
        top_k = tl.load(wholes + row * FIELDS + TOP_K)
        top_p = tl.load(reals + row * FIELDS + TOP_P)
        sums_k = sums + row * _ROW_SUMS
        state_k = state + row * _ROW_STATE
        if (top_p > 0.0) & (top_p < 1.0):
            below, need = _narrow(
                sums_k + _COUNT * _PARTS, state_k + (_COUNT + 1) * 2, _COUNT, top_p, True
            )
            # As many as `need` takes of them. Weights of 0 are nothing, however many.
            ties = tl.where(below > 0, (need + below - 1) // tl.maximum(below, 1), 0)
        elif (top_k > 0) & (top_k < num_usable):
            least, _ = _narrow(sums_k, state_k, _COUNT, 0.0, False)
            below = least - 1
    least_p = tl.load(reals + row * FIELDS + MIN_P) * _UNIT
    under = _ceil(tl.where((least_p > 0.0) & (least_p <= _UNIT), least_p, 0.0)) - 1
    return tl.maximum(below, under), tl.where(under > below, 0, ties)


@triton.jit(do_not_specialize=["num_usable"])
def kept_kernel(
    reals,
    wholes,
    num_usable,
    weights,
    sums,
    state,
    kept,
    vocab,
    CHUNK: tl.constexpr,
    FILTERS: tl.constexpr,
):
    """Program (chunk, row): the weight above the cut, and how many ids are at it."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(reals + row * FIELDS + TEMPERATURE)
    if temperature > 0.0:
        below, _ = _cut(reals, wholes, row, num_usable, sums, state, FILTERS)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        weight = tl.load(weights + row * vocab + ids, mask=ids < num_usable, other=-1)
        chunks = tl.num_programs(0)
        at = kept + row * 2 * chunks + chunk
        tl.store(at, tl.sum(tl.where(weight > below, weight, 0), 0))
        is_tie = (weight == below) & (weight > 0)
        tl.store(at + chunks, tl.sum(is_tie.to(tl.int64), 0))


@triton.jit(do_not_specialize=["num_usable", "chunks"])
def choose_kernel(
    reals,
    wholes,
    num_usable,
    best,
    best_ids,
    weights,
    sums,
    state,
    kept,
    out,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DRAWS: tl.constexpr,
    FILTERS: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNKS)
    inside = lane < chunks
    held = tl.load(best + row * chunks + lane, mask=inside, other=float("-inf"))
    held_ids = tl.load(best_ids + row * chunks + lane, mask=inside, other=0)
    largest, where = tl.max(held, 0, return_indices=True)
    is_usable = (tl.min(held_ids, 0) >= 0) & (largest > float("-inf"))
    chosen = tl.sum(tl.where(lane == where, held_ids, 0), 0)
    position = tl.load(wholes + row * FIELDS + POSITION)
    if DRAWS:
        temperature = tl.load(reals + row * FIELDS + TEMPERATURE)
        if is_usable & (temperature > 0.0):
            below, ties = _cut(reals, wholes, row, num_usable, sums, state, FILTERS)
            above = tl.load(kept + row * 2 * chunks + lane, mask=inside, other=0)
            tied = tl.load(kept + (row * 2 + 1) * chunks + lane, mask=inside, other=0)
            ties_before = tl.cumsum(tied, 0) - tied
            mass = above + tl.minimum(tl.maximum(ties - ties_before, 0), tied) * below
            summed = tl.cumsum(mass, 0)

            # Philox's number in [0, 1), of 53 bits: see gptjet.service.engine.philox.
            high, low, _, _ = tl.philox(
                tl.load(wholes + row * FIELDS + SEED),
                (position & 0xFFFFFFFF).to(tl.uint32),
                (position >> 32).to(tl.uint32),
                tl.load(wholes + row * FIELDS + INDEX).to(tl.uint32),
                (position * 0).to(tl.uint32),
            )
            mantissa = ((high.to(tl.int64) >> 5) << 26) | (low.to(tl.int64) >> 6)
            uniform = mantissa.to(tl.float64) * (2.0**-53)
            target = (tl.sum(mass, 0).to(tl.float64) * uniform).to(tl.int64)

            chunk = tl.sum((inside & (summed <= target)).to(tl.int32), 0)
            is_chunk = lane == chunk
            mass_before = tl.sum(tl.where(is_chunk, summed - mass, 0), 0)
            first_tie = tl.sum(tl.where(is_chunk, ties_before, 0), 0)
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            weight = tl.load(weights + row * vocab + ids, mask=ids < num_usable, other=-1)
            is_tie = (weight == below) & (weight > 0)
            rank = first_tie + tl.cumsum(is_tie.to(tl.int64), 0)
            stays = (weight > below) | (is_tie & (rank <= ties))
            reached = mass_before + tl.cumsum(tl.where(stays, weight, 0), 0)
            chosen = chunk * CHUNK + tl.sum((reached <= target).to(tl.int32), 0)
    tl.store(out + row, tl.where(is_usable, chosen, -1))
    if ADVANCE:
        advanced = position + is_usable.to(tl.int64)
        tl.store(wholes + row * FIELDS + POSITION, advanced)
