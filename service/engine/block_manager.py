"""Who holds which KV block, and which blocks still hold what a new prompt begins with.

A block is `block_size` tokens; paged backends index by its id. Holders are named by an integer: a
`sequence_id` or a `job_id`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a holder was given.

    block_table        its blocks in token order; the list that the manager itself keeps, so it
                       grows when the holder does. Not to be changed by anyone else.
    num_cached_tokens  leading tokens that are computed already: a multiple of the block size, and
                       fewer than the prompt has
    """

    block_table: list[int]
    num_cached_tokens: int


class BlockManager:
    """Hands out KV blocks by count and by content, and takes them back.

    A block is free (it holds nothing of use), cached (nobody holds it, but it has tokens that a
    prompt may begin with) or held, by as many holders as its reference count says. Free blocks are
    handed out first, then cached ones, the least recently used first.

    Prefix cache: a full block has the key SHA-256(key of the block before it, its token ids), so
    equal keys mean equal tokens from the first on. `commit` makes full blocks findable once their
    tokens are computed, `allocate` finds them. The blocks of one chain are given back last block
    first, so that a chain is evicted from its end.

    A block that several hold is read-only; `make_writable` copies it for whoever must write.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = False) -> None:
        """`num_blocks` blocks of `block_size` tokens; raises ValueError if either is below 1."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks ({num_blocks}) and block_size ({block_size}) must be 1 or more"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        # A stack: the block freed last is the one whose memory is warmest.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._tables: dict[int, list[int]] = {}
        # Of a holder's leading full blocks, as far as anyone has asked; kept until `free`.
        self._keys: dict[int, list[bytes]] = {}
        self._num_committed: dict[int, int] = {}  # blocks of a holder that `commit` has seen
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody holds and a prompt may find."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def allocate(
        self, holder_id: int, num_blocks: int, token_ids: Seq[int] = (), *, headroom: int = 0
    ) -> Allocation | None:
        """Give a new holder `num_blocks` blocks, or None if that leaves fewer than `headroom` free.

        token_ids  the prompt, if its beginning may be shared: its leading blocks are then cached
                   ones as far as there are any, all but the last token of it at most (somebody
                   has to compute the logits). The other blocks are the holder's own.

        Raises ValueError where it holds blocks already.
        """
        if holder_id in self._tables:
            raise ValueError(f"holder {holder_id} already holds blocks")
        shared = self._find(holder_id, token_ids)[:num_blocks]
        idle = sum(self._references[block] == 0 for block in shared)
        if num_blocks - len(shared) + idle + headroom > self.num_free_blocks:
            return None
        for block in shared:
            self._hold(block)
        table = shared + [self._take() for _ in range(num_blocks - len(shared))]
        self._tables[holder_id] = table
        self._num_committed[holder_id] = len(shared)
        return Allocation(table, len(shared) * self.block_size)

    def find_more(self, holder_id: int) -> int:
        """Share what others have computed of a holder's prompt since it was allocated.

        Returns how many of its leading tokens are computed now, in whole blocks that others find.
        """
        table, keys = self._tables[holder_id], self._keys.get(holder_id, [])
        index = self._num_committed[holder_id]
        while index < len(keys) and (block := self._block_of.get(keys[index])) is not None:
            if block != table[index]:
                self._hold(block)
                self._release(table[index])
                table[index] = block
            index += 1
        self._num_committed[holder_id] = index
        return index * self.block_size

    def is_writable(self, block_table: list[int], start: int, end: int) -> bool:
        """Whether a holder may write the tokens [start, end), `start` being its first unwritten."""
        index = start // self.block_size
        return end <= len(block_table) * self.block_size and (
            self._references[block_table[index]] == 1
        )

    def make_writable(
        self, holder_id: int, start: int, end: int
    ) -> tuple[tuple[int, int], ...] | None:
        """Grow and unshare a holder's blocks so that it may write the tokens [start, end).

        Returns the (source, destination) pairs to copy before that, or None, with nothing changed,
        where too few blocks are free.
        """
        table = self._tables[holder_id]
        held = range(start // self.block_size, min(self.blocks_for(end), len(table)))
        shared = [index for index in held if self._references[table[index]] > 1]
        missing = max(0, self.blocks_for(end) - len(table))
        if len(shared) + missing > self.num_free_blocks:
            return None
        copies = []
        for index in shared:
            source, table[index] = table[index], self._take()
            self._references[source] -= 1
            copies.append((source, table[index]))
        table += [self._take() for _ in range(missing)]
        return tuple(copies)

    def fork(self, holder_id: int, new_holder_id: int) -> list[int]:
        """Let a new holder share every block of another; returns its block_table.

        Raises ValueError where the new one holds blocks already.
        """
        if new_holder_id in self._tables:
            raise ValueError(f"holder {new_holder_id} already holds blocks")
        table = list(self._tables[holder_id])
        for block in table:
            self._references[block] += 1
        self._tables[new_holder_id] = table
        self._keys[new_holder_id] = list(self._keys.get(holder_id, ()))
        self._num_committed[new_holder_id] = self._num_committed[holder_id]
        return table

    def commit(self, holder_id: int, token_ids: Seq[int]) -> None:
        """Let others find the full blocks of `token_ids`, the holder's leading tokens.

        All of them must be computed. Does nothing without the prefix cache.
        """
        if not self.prefix_cache:
            return
        table, num_full = self._tables[holder_id], len(token_ids) // self.block_size
        keys = self._chain(holder_id, token_ids, num_full)
        for index in range(self._num_committed[holder_id], num_full):
            block, key = table[index], keys[index]
            # Where two computed the same tokens at once, the first one's block stays.
            if block not in self._key_of and key not in self._block_of:
                self._key_of[block] = key
                self._block_of[key] = block
        self._num_committed[holder_id] = max(self._num_committed[holder_id], num_full)

    def free(self, holder_id: int, *, forget: bool = False) -> None:
        """Take a holder's blocks back, and forget it; one that holds none is fine.

        forget  what is in them may be wrong (its step failed): nobody may find them again
        """
        self._keys.pop(holder_id, None)
        self._num_committed.pop(holder_id, None)
        for block in reversed(self._tables.pop(holder_id, ())):
            if forget:
                self._forget(block)
            self._release(block)

    def check_invariants(self) -> None:
        """Raise RuntimeError unless every block is free, cached or held, with the right count."""
        held = Counter(block for table in self._tables.values() for block in table)
        places = Counter([*self._free, *self._cached, *held])
        counts = [held[block] for block in range(self.num_blocks)]
        twice = [i for i, table in self._tables.items() if len(set(table)) != len(table)]
        if (
            places != Counter(range(self.num_blocks))
            or counts != self._references
            or twice
            or {key: block for block, key in self._key_of.items()} != self._block_of
            or not self._key_of.keys() >= self._cached.keys()
            or not self._key_of.keys().isdisjoint(self._free)
        ):
            raise RuntimeError(
                f"KV blocks leaked or shared: {len(self._free)} free + {len(self._cached)} cached "
                f"+ {len(held)} held of {self.num_blocks}"
            )

    def _find(self, holder_id: int, token_ids: Seq[int]) -> list[int]:
        """Blocks that have the leading tokens, never all of the tokens."""
        if not self.prefix_cache or not token_ids:
            return []
        found: list[int] = []
        num_blocks = (len(token_ids) - 1) // self.block_size
        for key in self._chain(holder_id, token_ids, num_blocks)[:num_blocks]:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def _chain(self, holder_id: int, token_ids: Seq[int], num_blocks: int) -> list[bytes]:
        """Keys of at least the first `num_blocks` blocks of the holder's tokens."""
        keys = self._keys.setdefault(holder_id, [])
        for start in range(
            len(keys) * self.block_size, num_blocks * self.block_size, self.block_size
        ):
            tokens = array("q", token_ids[start : start + self.block_size])
            parent = keys[-1] if keys else b""
            keys.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return keys

    def _hold(self, block: int) -> None:
        """One more holder for a block that may be cached."""
        self._cached.pop(block, None)
        self._references[block] += 1

    def _release(self, block: int) -> None:
        """One holder less."""
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _take(self) -> int:
        """A block of one's own, its content forgotten. There must be one."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
