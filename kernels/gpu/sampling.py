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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase
from gptjet.kernels.gpu.sampling_kernels import (
    FIELDS,
    INDEX,
    LEVEL_BITS,
    LEVELS,
    MIN_P,
    POSITION,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    best_kernel,
    choose_kernel,
    kept_kernel,
    search_kernel,
    weights_kernel,
)

MAX_VOCAB_SIZE = 2**19
"""Ids whose weights still sum below 2**63."""

_CHUNK_IDS = 512
_ROWS_AT_ONCE = 64
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How each of T rows is sampled: one buffer, so one copy brings it to the device.

    packed [T, 7] int64, contiguous, whose columns the properties name. No value raises: what has no
    meaning (a NaN, a number out of range) turns its filter off, and a temperature that is not above
    0 is greedy, which ignores all others.
    """

    packed: torch.Tensor

    @classmethod
    def allocate(
        cls, rows: int, device: torch.device | str = "cpu", *, pin_memory: bool = False
    ) -> SamplingParameters:
        """Every row greedy."""
        parameters = cls(
            torch.zeros(rows, FIELDS.value, dtype=torch.int64, device=device, pin_memory=pin_memory)
        )
        parameters.top_p.fill_(1.0)
        return parameters

    @property
    def temperature(self) -> torch.Tensor:
        """[T] float64; 0: the likeliest token, of several the one with the lowest id."""
        return self.packed.view(torch.float64)[:, TEMPERATURE.value]

    @property
    def top_k(self) -> torch.Tensor:
        """[T] int64; 0, or as many as there are ids: off. Ties with the k-th stay."""
        return self.packed[:, TOP_K.value]

    @property
    def top_p(self) -> torch.Tensor:
        """[T] float64; 1: off. Of equally likely tokens at the edge the lowest ids stay."""
        return self.packed.view(torch.float64)[:, TOP_P.value]

    @property
    def min_p(self) -> torch.Tensor:
        """[T] float64; 0: off."""
        return self.packed.view(torch.float64)[:, MIN_P.value]

    @property
    def seed(self) -> torch.Tensor:
        """[T] int64: the 64 bits of the seed."""
        return self.packed[:, SEED.value]

    @property
    def index(self) -> torch.Tensor:
        """[T] int64: which of its request's continuations a sequence is."""
        return self.packed[:, INDEX.value]

    @property
    def position(self) -> torch.Tensor:
        """[T] int64: tokens that the sequence has generated so far."""
        return self.packed[:, POSITION.value]

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

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            weights=empty(rows, vocab_size),
            best=empty(rows, chunks, dtype=torch.float32),
            best_ids=empty(rows, chunks, dtype=torch.int32),
            kept=empty(rows, 2, chunks),
            sums=empty(rows, 2, LEVELS, 2**LEVEL_BITS),
            state=empty(rows, 2, LEVELS + 1, 2),
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
    best_kernel[grid](
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
        weights_kernel[grid](
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
            for level in range(LEVELS):
                search_kernel[grid](
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
        kept_kernel[grid](
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
    choose_kernel[(rows,)](
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


def compile_cases() -> tuple[CompileCase, ...]:
    """Of one row of GPT-J-6B's logits, drawn with all filters; and its greedy choice."""
    vocab = GPT_J_6B.vocab_size
    chunks = _num_chunks(vocab)
    width = triton.next_power_of_2(chunks)
    row = {"reals": "*fp64", "wholes": "*i64", "num_usable": "i32"}
    held = {"weights": "*i64", "sums": "*i64", "state": "*i64"}
    scores = {"logits": "*fp32", "logits_stride": "i32"}
    best = {"best": "*fp32", "best_ids": "*i32"}
    read, wide, parts = 4 * vocab, 8 * vocab, 8 * 2**LEVEL_BITS
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
            best_kernel,
            scores | best | {"vocab": "i32", "num_usable": "i32"},
            {"CHUNK": _CHUNK_IDS},
            read + 8 * chunks,
        ),
        case(
            "weights",
            weights_kernel,
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
                search_kernel,
                row | held | {"vocab": "i32", "level": "i32"},
                {"IS_TOP_P": is_top_p, "CHUNK": _CHUNK_IDS, "AT_ONCE": _ROWS_AT_ONCE},
                wide + 2 * chunks * parts,
            )
        )
    cases.append(
        case(
            "kept",
            kept_kernel,
            row | held | {"kept": "*i64", "vocab": "i32"},
            {"CHUNK": _CHUNK_IDS, "FILTERS": True},
            wide + 16 * chunks,
        )
    )
    for draws in (False, True):
        cases.append(
            case(
                f"choose, {'drawn' if draws else 'greedy'}",
                choose_kernel,
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
