"""Who holds which KV block. A block is `block_size` tokens; paged backends index by its id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class BlockHolder(Protocol):
    """Who can hold blocks: a sequence, or a score job. Their ids come from one counter."""

    sequence_id: int
    block_table: list[int]


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a score job was given: its blocks, and how many leading tokens are computed already."""

    block_table: list[int]
    num_cached_tokens: int


class BlockManager:
    """Hands out KV blocks and takes them back.

    A sequence gets, at admission, the blocks of the longest it can become, so a running sequence
    never waits for memory and never runs out of it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """`num_blocks` blocks of `block_size` tokens; raises ValueError if either is below 1."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks ({num_blocks}) and block_size ({block_size}) must be 1 or more"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is the one whose memory is warmest.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: dict[int, BlockHolder] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether `allocate` would succeed now."""
        return self.blocks_for(num_tokens) <= len(self._free)

    def allocate(self, sequence: BlockHolder, num_tokens: int) -> None:
        """Give `sequence` the blocks of `num_tokens` tokens.

        Raises ValueError where it holds blocks already or too few are free: the scheduler asks
        first, so either is a bug.
        """
        count = self.blocks_for(num_tokens)
        if sequence.sequence_id in self._held:
            raise ValueError(f"sequence {sequence.sequence_id} already holds blocks")
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        sequence.block_table = [self._free.pop() for _ in range(count)]
        self._held[sequence.sequence_id] = sequence

    def free(self, sequence: BlockHolder) -> None:
        """Take the sequence's blocks back; one that holds none is fine."""
        if self._held.pop(sequence.sequence_id, None) is not None:
            self._free.extend(reversed(sequence.block_table))
            sequence.block_table = []

    def check_invariants(self) -> None:
        """Raise RuntimeError unless every block is free or held by exactly one sequence."""
        owned = [block for sequence in self._held.values() for block in sequence.block_table]
        if sorted(self._free + owned) != list(range(self.num_blocks)):
            raise RuntimeError(
                f"KV blocks leaked or shared: {len(self._free)} free + {len(owned)} held "
                f"of {self.num_blocks}"
            )
