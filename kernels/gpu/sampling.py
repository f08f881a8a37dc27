"""The next token of every row, chosen on the device, so that only ids cross the bus.

What the engine's sampler computes on the CPU (`gptjet.service.engine.logits`, `.philox`), in the
same numbers: integer weights, exp((logit - max) / temperature) in units of 2**-44 of the likeliest
token's; top-k, top-p and min-p as cuts of those integers; Philox4x32-10 of (seed, position, index);
an inverse CDF over ids in order. Sums of integers are exact, so nothing depends on the order they
are taken in, on the other rows or on the card. What may differ: exp is rounded by another library,
so one weight in some hundreds is one unit larger or smaller (6e-14 of the likeliest token's). A
draw, or a cut, that falls into that unit comes out differently.

No sort: the k-th largest weight, and the smallest of the set that reaches top_p, are found five
bits at a time. Each of nine launches a filter counts (sums) what falls into 32 equal parts of the
interval that is left; integer atomics put the chunks of a row together. Everything about a row is
read from device buffers, so all launches can stand in a CUDA graph; outside of one they cost more
than they compute.

    _best_kernel     largest logit of each chunk of a row, its lowest id, and what is not finite
    _weights_kernel  integer weights of the rows that draw
    _search_kernel   one step of a cut; 9 for top-k, then 9 for top-p
    _kept_kernel     weight that each chunk keeps
    _choose_kernel   the id
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase

MAX_VOCAB_SIZE = 2**19
"""Ids whose weights still sum below 2**63."""

_CHUNK_IDS = 512
_ROWS_AT_ONCE = 64
_NUM_WARPS = 4

_WEIGHT_BITS = 44
_LEVEL_BITS = 5
_LEVELS = 9  # 45 bits: the likeliest token's weight is 2**44 itself

_UNIT = tl.constexpr(2.0**_WEIGHT_BITS)
_LAST_SHIFT = tl.constexpr(_LEVEL_BITS * (_LEVELS - 1))
_BITS = tl.constexpr(_LEVEL_BITS)
_PARTS = tl.constexpr(2**_LEVEL_BITS)
_COUNT = tl.constexpr(_LEVELS)
_ROW_STATE = tl.constexpr(2 * 2 * (_LEVELS + 1))
_ROW_SUMS = tl.constexpr(2 * _LEVELS * 2**_LEVEL_BITS)
# Columns of SamplingParameters.packed.
_FIELDS = tl.constexpr(7)
_TEMPERATURE = tl.constexpr(0)
_TOP_K = tl.constexpr(1)
_TOP_P = tl.constexpr(2)
_MIN_P = tl.constexpr(3)
_SEED = tl.constexpr(4)
_INDEX = tl.constexpr(5)
_POSITION = tl.constexpr(6)


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How each of T rows is sampled: one buffer, so one copy brings it to the device.

    packed [T, 7] int64, contiguous, whose columns the properties name. No value raises: what has no meaning (a
    NaN, a number out of range) turns its filter off, and a temperature that is not above 0 is
    greedy, which ignores all others.
    """

    packed: torch.Tensor

    @classmethod
    def allocate(
        cls, rows: int, device: torch.device | str = "cpu", *, pin_memory: bool = False
    ) -> SamplingParameters:
        """Every row greedy."""
        parameters = cls(
            torch.zeros(
                rows, _FIELDS.value, dtype=torch.int64, device=device, pin_memory=pin_memory
            )
        )
        parameters.top_p.fill_(1.0)
        return parameters

    @property
    def temperature(self) -> torch.Tensor:
        """[T] float64; 0: the likeliest token, of several the one with the lowest id."""
        return self.packed.view(torch.float64)[:, _TEMPERATURE.value]

    @property
    def top_k(self) -> torch.Tensor:
        """[T] int64; 0, or as many as there are ids: off. Ties with the k-th stay."""
        return self.packed[:, _TOP_K.value]

    @property
    def top_p(self) -> torch.Tensor:
        """[T] float64; 1: off. Of equally likely tokens at the edge the lowest ids stay."""
        return self.packed.view(torch.float64)[:, _TOP_P.value]

    @property
    def min_p(self) -> torch.Tensor:
        """[T] float64; 0: off."""
        return self.packed.view(torch.float64)[:, _MIN_P.value]

    @property
    def seed(self) -> torch.Tensor:
        """[T] int64: the 64 bits of the seed."""
        return self.packed[:, _SEED.value]

    @property
    def index(self) -> torch.Tensor:
        """[T] int64: which of its request's continuations a sequence is."""
        return self.packed[:, _INDEX.value]

    @property
    def position(self) -> torch.Tensor:
        """[T] int64: tokens that the sequence has generated so far."""
        return self.packed[:, _POSITION.value]

    def set_row(
        self,
        row: int,
        *,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        index: int = 0,
        position: int = 0,
    ) -> None:
        """Write one row of a buffer on the CPU; seed is 0 to 2**64 - 1."""
        self.temperature[row] = temperature
        self.top_k[row] = top_k
        self.top_p[row] = top_p
        self.min_p[row] = min_p
        self.seed[row] = seed - 2**64 if seed >= 2**63 else seed
        self.index[row] = index
        self.position[row] = position


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """Memory for up to T rows of V logits, in C chunks; whatever is in it may stay.

    weights [T, V] int64; best [T, C] float32, best_ids [T, C] int32 (-1: not usable);
    kept [T, 2, C] int64; sums [T, 2, levels, 32] int64; state [T, 2, levels + 1, 2] int64
    """

    weights: torch.Tensor
    best: torch.Tensor
    best_ids: torch.Tensor
    kept: torch.Tensor
    sums: torch.Tensor
    state: torch.Tensor

    @classmethod
    def allocate(
        cls, rows: int, vocab_size: int, device: torch.device | str = "cpu"
    ) -> SamplingWorkspace:
        """Raises ValueError for a vocabulary over MAX_VOCAB_SIZE."""
        if not 0 < vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be 1 to {MAX_VOCAB_SIZE}, got {vocab_size}")
        chunks = _num_chunks(vocab_size)
        wide = {"dtype": torch.int64, "device": device}
        return cls(
            weights=torch.empty(rows, vocab_size, **wide),
            best=torch.empty(rows, chunks, device=device),
            best_ids=torch.empty(rows, chunks, dtype=torch.int32, device=device),
            kept=torch.empty(rows, 2, chunks, **wide),
            sums=torch.empty(rows, 2, _LEVELS, 2**_LEVEL_BITS, **wide),
            state=torch.empty(rows, 2, _LEVELS + 1, 2, **wide),
        )


def _num_chunks(vocab_size: int) -> int:
    return -(-vocab_size // _CHUNK_IDS)


def sample(
    logits: torch.Tensor,
    parameters: SamplingParameters,
    out: torch.Tensor,
    *,
    num_usable: int | None = None,
    draws: bool = True,
    filters: bool = True,
    advance: bool = False,
    workspace: SamplingWorkspace | None = None,
) -> None:
    """Choose an id a row into out [T] int32; -1 where the logits are not usable.

    logits      [T, V] float32, rows contiguous, not changed. -inf entries are masks. A row with
                NaN, +inf, or nothing but -inf among the usable ids is not usable
    num_usable  ids from there on are never chosen; None: all are
    draws       False where every row is known to be greedy: 2 launches
    filters     False where no row has top_k or top_p: 4 launches, else 22. What a row asks for and
                is not launched is not done
    advance     add 1 to the position of each row that got an id
    workspace   for at least T rows of V logits; None allocates it

    All on one device; nothing is waited for. Raises ValueError for sizes that do not belong
    together.
    """
    rows, vocab = logits.shape
    usable = vocab if num_usable is None else num_usable
    if not 0 < usable <= vocab <= MAX_VOCAB_SIZE:
        raise ValueError(f"num_usable is {usable} and V {vocab}; at most {MAX_VOCAB_SIZE}")
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError("logits must be float32 with contiguous rows")
    if parameters.packed.shape[0] < rows or tuple(out.shape) != (rows,):
        raise ValueError(
            f"{rows} rows of logits, {parameters.packed.shape[0]} of parameters, "
            f"{list(out.shape)} for ids"
        )
    if rows == 0:
        return
    work = workspace or SamplingWorkspace.allocate(rows, vocab, logits.device)
    if work.weights.shape[0] < rows or work.weights.shape[1] != vocab:
        raise ValueError(
            f"the workspace is for {list(work.weights.shape)} logits, not {[rows, vocab]}"
        )
    chunks = _num_chunks(vocab)
    grid = (chunks, rows)
    tables = {"CHUNK": _CHUNK_IDS, "CHUNKS": triton.next_power_of_2(chunks)}
    reals = parameters.packed.view(torch.float64)
    row = (reals, parameters.packed, usable)
    _best_kernel[grid](
        logits,
        logits.stride(0),
        work.best,
        work.best_ids,
        vocab,
        usable,
        CHUNK=_CHUNK_IDS,
        num_warps=_NUM_WARPS,
    )
    if draws:
        _weights_kernel[grid](
            logits,
            logits.stride(0),
            reals,
            usable,
            work.best,
            work.weights,
            work.sums,
            vocab,
            **tables,
            num_warps=_NUM_WARPS,
        )
        for is_top_p in (False, True) if filters else ():
            for level in range(_LEVELS):
                _search_kernel[grid](
                    *row,
                    work.weights,
                    work.sums,
                    work.state,
                    vocab,
                    level,
                    IS_TOP_P=is_top_p,
                    CHUNK=_CHUNK_IDS,
                    AT_ONCE=_ROWS_AT_ONCE,
                    num_warps=_NUM_WARPS,
                )
        _kept_kernel[grid](
            *row,
            work.weights,
            work.sums,
            work.state,
            work.kept,
            vocab,
            CHUNK=_CHUNK_IDS,
            FILTERS=filters,
            num_warps=_NUM_WARPS,
        )
    _choose_kernel[(rows,)](
        *row,
        work.best,
        work.best_ids,
        work.weights,
        work.sums,
        work.state,
        work.kept,
        out,
        vocab,
        chunks,
        **tables,
        DRAWS=draws,
        FILTERS=filters,
        ADVANCE=advance,
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _ceil(x):
    """Of a float64 from 0 to 2**62, as int64."""
    whole = x.to(tl.int64)
    return whole + (whole.to(tl.float64) < x).to(tl.int64)


@triton.jit(do_not_specialize=["num_usable"])
def _best_kernel(logits, logits_stride, best, best_ids, vocab, num_usable, CHUNK: tl.constexpr):
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
def _weights_kernel(
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
    temperature = tl.load(reals + row * _FIELDS + _TEMPERATURE)
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
def _search_kernel(
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
    temperature = tl.load(reals + row * _FIELDS + _TEMPERATURE)
    top_k = tl.load(wholes + row * _FIELDS + _TOP_K)
    top_p = tl.load(reals + row * _FIELDS + _TOP_P)
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
        top_k = tl.load(wholes + row * _FIELDS + _TOP_K)
        top_p = tl.load(reals + row * _FIELDS + _TOP_P)
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
    least_p = tl.load(reals + row * _FIELDS + _MIN_P) * _UNIT
    under = _ceil(tl.where((least_p > 0.0) & (least_p <= _UNIT), least_p, 0.0)) - 1
    return tl.maximum(below, under), tl.where(under > below, 0, ties)


@triton.jit(do_not_specialize=["num_usable"])
def _kept_kernel(
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
    temperature = tl.load(reals + row * _FIELDS + _TEMPERATURE)
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
def _choose_kernel(
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
    position = tl.load(wholes + row * _FIELDS + _POSITION)
    if DRAWS:
        temperature = tl.load(reals + row * _FIELDS + _TEMPERATURE)
        if is_usable & (temperature > 0.0):
            below, ties = _cut(reals, wholes, row, num_usable, sums, state, FILTERS)
            above = tl.load(kept + row * 2 * chunks + lane, mask=inside, other=0)
            tied = tl.load(kept + (row * 2 + 1) * chunks + lane, mask=inside, other=0)
            ties_before = tl.cumsum(tied, 0) - tied
            mass = above + tl.minimum(tl.maximum(ties - ties_before, 0), tied) * below
            summed = tl.cumsum(mass, 0)

            # Philox's number in [0, 1), of 53 bits: see gptjet.service.engine.philox.
            high, low, _, _ = tl.philox(
                tl.load(wholes + row * _FIELDS + _SEED),
                (position & 0xFFFFFFFF).to(tl.uint32),
                (position >> 32).to(tl.uint32),
                tl.load(wholes + row * _FIELDS + _INDEX).to(tl.uint32),
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
        tl.store(wholes + row * _FIELDS + _POSITION, advanced)


def compile_cases() -> tuple[CompileCase, ...]:
    """Of one row of GPT-J-6B's logits, drawn with all filters; and its greedy choice."""
    vocab = GPT_J_6B.vocab_size
    chunks = _num_chunks(vocab)
    width = triton.next_power_of_2(chunks)
    row = {"reals": "*fp64", "wholes": "*i64", "num_usable": "i32"}
    held = {"weights": "*i64", "sums": "*i64", "state": "*i64"}
    scores = {"logits": "*fp32", "logits_stride": "i32"}
    best = {"best": "*fp32", "best_ids": "*i32"}
    read, wide, parts = 4 * vocab, 8 * vocab, 8 * 2**_LEVEL_BITS
    tables: dict[str, object] = {"CHUNK": _CHUNK_IDS, "CHUNKS": width}

    def case(
        name: str,
        kernel: Any,
        signature: dict[str, str],
        constexprs: dict[str, object],
        moved: int,
        programs: int = chunks,
    ) -> CompileCase:
        return CompileCase(
            name=name,
            kernel=kernel,
            signature=signature | dict.fromkeys(constexprs, "constexpr"),
            constexprs=constexprs,
            num_warps=_NUM_WARPS,
            programs=programs,
            bytes_moved=moved,
            bytes_minimum=moved,
            divisible_by_16=frozenset({"logits_stride", "vocab"} & signature.keys()),
        )

    cases = [
        case(
            "best of each chunk",
            _best_kernel,
            scores | best | {"vocab": "i32", "num_usable": "i32"},
            {"CHUNK": _CHUNK_IDS},
            read + 8 * chunks,
        ),
        case(
            "weights",
            _weights_kernel,
            scores
            | {"reals": "*fp64", "num_usable": "i32", "best": "*fp32"}
            | {"weights": "*i64", "sums": "*i64", "vocab": "i32"},
            tables,
            read + wide,
        ),
    ]
    for is_top_p in (False, True):
        cases.append(
            case(
                f"search, {'top_p' if is_top_p else 'top_k'}",
                _search_kernel,
                row | held | {"vocab": "i32", "level": "i32"},
                {"IS_TOP_P": is_top_p, "CHUNK": _CHUNK_IDS, "AT_ONCE": _ROWS_AT_ONCE},
                wide + 2 * chunks * parts,
            )
        )
    cases.append(
        case(
            "kept",
            _kept_kernel,
            row | held | {"kept": "*i64", "vocab": "i32"},
            {"CHUNK": _CHUNK_IDS, "FILTERS": True},
            wide + 16 * chunks,
        )
    )
    for draws in (False, True):
        cases.append(
            case(
                f"choose, {'drawn' if draws else 'greedy'}",
                _choose_kernel,
                row
                | best
                | held
                | {"kept": "*i64", "out": "*i32", "vocab": "i32", "chunks": "i32"},
                tables | {"DRAWS": draws, "FILTERS": draws, "ADVANCE": True},
                (24 if draws else 8) * chunks + (8 * _CHUNK_IDS if draws else 0),
                programs=1,
            )
        )
    return tuple(cases)
