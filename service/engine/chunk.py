"""How the prompts that are being computed share the tokens of one prefill step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def share_chunk(max_tokens: int, lengths: Sequence[int]) -> list[int]:
    """Tokens of a chunk of `max_tokens` for each prompt, by the tokens that it has left.

    lengths  the oldest prompt's first, then the others' ascending

    The oldest gets half of the chunk, so it is never starved; the other half goes to the others,
    the shortest first, so that they need not wait for a long one; what one side leaves, the other
    takes. Those for whom nothing is left, at the end, are left out.
    """
    oldest, *others = lengths
    wanted = [min(oldest, max_tokens - min(sum(others), max_tokens // 2)), *others]
    left = max_tokens
    chunks = []
    for length in wanted:
        if left:
            chunks.append(min(length, left))
            left -= chunks[-1]
    return chunks
