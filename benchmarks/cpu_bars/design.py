"""What is raced: models x weight types x contestants, and the cells that each race runs.

FP32 and the quantised weight types are races of their own, so that not every copy of a model has to
fit into memory at once. Inside a race all contestants are alive and take turns.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

from gptjet.benchmarks.cpu_bars.checkpoints import MODELS
from gptjet.benchmarks.peers.contestants import ENGINE, SERVER

LATE_INPUT_TOKENS = 32
"""Of each stream of the cell CHUNKS."""

VARIANTS = ("", "+deterministic", "+torch", "+torch+deterministic")
"""Ours with its kernels, and as it is where no compiler is; each with the promise and without."""

REFERENCE = "huggingface"
"""The backend whose FP32 tokens every other FP32 contestant must give."""

STREAMS = 8
LATE_STREAMS = 4
"""Of the cell CHUNKS."""
PREFIX_TAIL_TOKENS = 16
_BLOCK_TOKENS = 16


class CellKind(enum.StrEnum):
    """decode   one stream, first token excluded
    prefill  a long prompt, one token
    streams  one stream and eight together
    prefix   a prompt, then another that begins with the same 512 tokens
    busy     decode with and without a competing process on each core
    chunks   streams, and a long prompt that comes while they run
    cost     one stream and several, by ours with and without a promise that may cost something
    """

    DECODE = "decode"
    PREFILL = "prefill"
    STREAMS = "streams"
    PREFIX = "prefix"
    BUSY = "busy"
    CHUNKS = "chunks"
    COST = "cost"


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant with a weight type."""

    contestant: str
    weight_type: str

    def __str__(self) -> str:
        return f"{self.contestant}/{self.weight_type}"

    @property
    def is_our_engine(self) -> bool:
        """Whether it runs our engine without a network."""
        return self.contestant.startswith(f"{ENGINE}:")

    @property
    def is_ours(self) -> bool:
        """Whether it is ours, through the server or without it."""
        return self.is_our_engine or self.contestant.startswith(f"{SERVER}:")


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of measurement with its lengths. For PREFIX, `input_tokens` are the shared ones, for
    CHUNKS those of the long prompt, and `output_tokens` are the streams'.
    """

    kind: CellKind
    input_tokens: int
    output_tokens: int
    rounds: int

    @property
    def key(self) -> str:
        """What names it in a result file: other lengths are another cell."""
        return f"{self.kind}-{self.input_tokens}-{self.output_tokens}"

    @property
    def kv_tokens(self) -> int:
        """Tokens that all its sequences hold at once, in whole blocks."""
        match self.kind:
            case CellKind.STREAMS | CellKind.COST:
                return STREAMS * _blocks(self.input_tokens + self.output_tokens)
            case CellKind.PREFIX:
                return _blocks(self.input_tokens + PREFIX_TAIL_TOKENS + self.output_tokens)
            case CellKind.CHUNKS:
                streams = LATE_STREAMS * _blocks(LATE_INPUT_TOKENS + self.output_tokens)
                return _blocks(self.input_tokens + 1) + streams
            case _:
                return _blocks(self.input_tokens + self.output_tokens)

    def prompt(self, model: str, number: int, vocab_size: int, name: str = "") -> tuple[int, ...]:
        """The prompt of a round; round -1 is the warm-up's.

        Seeded by everything that tells runs apart: two prompts that began alike would be answered
        from a prefix cache. Only PREFIX wants that, and builds it from two of these.
        """
        seeded = random.Random(f"bars/{model}/{self.key}/{number}/{name}")
        return tuple(seeded.choices(range(vocab_size), k=self.input_tokens))


def _blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Race:
    """Contestants that are alive together on one model, and the cells they run."""

    model: str
    name: str
    entries: tuple[Entry, ...]
    cells: tuple[Cell, ...]

    @property
    def key(self) -> str:
        """What names it in a result file."""
        return f"{self.model}/{self.name}"

    @property
    def kv_cache_tokens(self) -> int:
        """What ours may hold: as the peers do, no more than the largest of the cells needs."""
        return max(cell.kv_tokens for cell in self.cells)

    def runs_cell(self, entry: Entry, cell: Cell) -> bool:
        """Whether this contestant takes part in that cell."""
        match cell.kind:
            case CellKind.DECODE | CellKind.PREFILL:
                return True
            case CellKind.STREAMS | CellKind.PREFIX:
                return entry.is_our_engine and not _is_reference(entry, self.entries)
            case CellKind.CHUNKS | CellKind.COST:
                return entry.is_our_engine
            case CellKind.BUSY:
                return not entry.contestant.startswith("transformers")


def _is_reference(entry: Entry, entries: Sequence[Entry]) -> bool:
    """The baseline has neither batches nor a prefix cache, unless it is what is being looked at."""
    is_only_one = all(e.contestant == entry.contestant for e in entries if e.is_our_engine)
    return entry.contestant == f"{ENGINE}:{REFERENCE}" and not is_only_one


FULL = {
    CellKind.DECODE: {"S": (32, 256, 8), "M": (32, 64, 8), "W": (32, 48, 8)},
    CellKind.PREFILL: {"S": (1000, 1, 6), "M": (1000, 1, 4), "W": (1000, 1, 4)},
    CellKind.STREAMS: {"S": (32, 128, 5), "M": (32, 32, 5)},
    CellKind.PREFIX: {"S": (512, 1, 5), "M": (512, 1, 4), "W": (512, 1, 3)},
    CellKind.BUSY: {"S": (32, 128, 5)},
    CellKind.CHUNKS: {"M": (2000, 96, 4)},
    CellKind.COST: {"S": (32, 64, 4), "M": (32, 16, 3)},
}
"""(input tokens, output tokens, rounds) of each cell, by model."""

QUICK = {
    CellKind.DECODE: {"S": (16, 32, 2), "M": (16, 8, 1), "W": (16, 4, 1)},
    CellKind.PREFILL: {"S": (200, 1, 2), "M": (64, 1, 1), "W": (64, 1, 1)},
    CellKind.STREAMS: {"S": (16, 16, 2), "M": (16, 4, 1)},
    CellKind.PREFIX: {"S": (256, 1, 2), "M": (64, 1, 1), "W": (64, 1, 1)},
    CellKind.BUSY: {"S": (16, 16, 1)},
    CellKind.CHUNKS: {"M": (200, 64, 1)},
    CellKind.COST: {"S": (16, 8, 1), "M": (16, 4, 1)},
}
"""A look at whether everything runs, not at how fast it is."""


def make_races(
    models: Sequence[str], backend: str = "fused", *, quick: bool = False
) -> tuple[Race, ...]:
    """Every race of these models, with `backend` as ours.

    Raises ValueError for a model that is not one of S, M and W.
    """
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise ValueError(f"no model {unknown[0]!r}: {', '.join(MODELS)}")
    table = QUICK if quick else FULL
    races = []
    for model in models:
        cells = {
            kind: Cell(kind, *lengths[model]) for kind, lengths in table.items() if model in lengths
        }
        chunks, cost = (cells.pop(kind, None) for kind in (CellKind.CHUNKS, CellKind.COST))
        races.append(Race(model, "fp32", _fp32_entries(model, backend), tuple(cells.values())))
        # Load beside INT8 says nothing that load beside FP32 does not.
        cells.pop(CellKind.BUSY, None)
        races.append(Race(model, "quantised", _quantised_entries(backend), tuple(cells.values())))
        # Races of their own: they hold another KV cache, and other variants of ours.
        if chunks is not None:
            entries = tuple(Entry(f"{ENGINE}:{backend}", kind) for kind in ("fp32", "int8", "int4"))
            races.append(Race(model, "chunks", entries, (chunks,)))
        if cost is not None:
            names = [f"{ENGINE}:{backend}{option}" for option in VARIANTS]
            entries = tuple(Entry(name, "fp32") for name in names)
            races.append(Race(model, "deterministic", entries, (cost,)))
    return tuple(races)


def _fp32_entries(model: str, backend: str) -> tuple[Entry, ...]:
    names = [f"{ENGINE}:{backend}", f"{SERVER}:{backend}", f"{ENGINE}:{REFERENCE}", "ctranslate2"]
    # Not at W: two layers give a compiler nothing to do, and it is 3.3 GB more.
    names += [] if model == "W" else ["transformers-compiled"]
    names += ["transformers"] if model == "S" else []
    return tuple(Entry(name, "fp32") for name in dict.fromkeys(names))


def _quantised_entries(backend: str) -> tuple[Entry, ...]:
    ours = [
        Entry(f"{room}:{backend}", weight_type)
        for weight_type in ("int8", "int4")
        for room in (ENGINE, SERVER)
    ]
    return (*ours, Entry("ctranslate2", "int8"), Entry("openvino", "int8"))
