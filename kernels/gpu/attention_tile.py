"""How decode attention divides a context over programs, and the workspace that this takes."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from gptjet.kernels.batch import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """How the context is divided.

    tokens        that a program has in registers at once; a power of two
    split_tokens  of a program in all; a multiple of `tokens`
    """

    tokens: int
    split_tokens: int
    num_warps: int

    def __post_init__(self) -> None:
        if self.tokens & (self.tokens - 1) or self.split_tokens % self.tokens or self.tokens < 1:
            raise ValueError(
                f"tokens is {self.tokens} and split_tokens {self.split_tokens}: one must be a "
                f"power of two, the other a multiple of it"
            )


def default_tile(head_dim: int, capability: int) -> AttentionTile:
    """A tile by calculation; nothing is measured in it.

    A tile is 8,192 values: in 128 threads 64 registers of sums and as many for what is being
    loaded. Splits are of 64 tokens, so that a short context fills a large card too (4 per
    head at 256 tokens: 64 programs of GPT-J-6B); before sm_80, with 40 (T4) and 80 (V100)
    processors, of 128, which halves what passes through the workspace.
    """
    tokens = max(16, min(64, 8192 // triton.next_power_of_2(head_dim)))
    return AttentionTile(tokens, 64 if capability >= 80 else 128, num_warps=4)


def workspace_elements(
    tokens: int, heads: int, head_dim: int, table_width: int, tile: AttentionTile
) -> int:
    """float32 that the parts of rows take whose block tables are `table_width` blocks wide.

    Weighted values [tokens, heads, splits, features], features being head_dim rounded up to a power
    of two, then maximum and sum [tokens, heads, splits, 2].
    """
    features: int = triton.next_power_of_2(head_dim)
    return tokens * heads * splits_of(table_width, tile) * (features + 2)


def splits_of(table_width: int, tile: AttentionTile) -> int:
    """Programs that share the context of block tables `table_width` blocks wide."""
    return -(-table_width * BLOCK_SIZE // tile.split_tokens)
