"""What one pass over the model computes, and where the keys and values of its tokens are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BLOCK_SIZE = 16
"""Tokens of a KV block."""

INT8_KV_ROWS = BLOCK_SIZE + 1
"""Rows of head_dim bytes of a head in an INT8 KV block: a token each, and one of their scales."""

MIN_INT8_HEAD_DIM = 4 * BLOCK_SIZE
"""Features of a head whose row of bytes holds the float32 scales of a block's tokens."""


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """Sizes of a GPT-J-class model.

    rotary_dim  leading features of each head that turn with the position, in interleaved pairs; 0
                for none
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    rotary_dim: int
    inner_size: int
    vocab_size: int
    max_context: int
    layer_norm_eps: float = 1e-5

    @property
    def kv_block_shape(self) -> tuple[int, int, int, int, int]:
        """Of one KV block: [layers, 2 (keys, values), heads, BLOCK_SIZE, head_dim]."""
        return (self.num_layers, 2, self.num_heads, BLOCK_SIZE, self.head_dim)

    @property
    def int8_kv_block_shape(self) -> tuple[int, int, int, int, int]:
        """The same of INT8 KV: [layers, 2, heads, INT8_KV_ROWS, head_dim].

        Row t of a head is token t's; the last row's leading 64 bytes are the float32 scales of its
        16 tokens: value = int8 * scale. So one tensor is the whole cache, and copying a block
        copies its scales. Raises ValueError where a head is too small for that.
        """
        if self.head_dim < MIN_INT8_HEAD_DIM or self.head_dim % 4:
            raise ValueError(
                f"an INT8 KV cache needs heads of {MIN_INT8_HEAD_DIM} features or more, in fours; "
                f"this model's have {self.head_dim}"
            )
        return (self.num_layers, 2, self.num_heads, INT8_KV_ROWS, self.head_dim)

    def kv_cache_shape(self, num_blocks: int, dtype: torch.dtype) -> tuple[int, ...]:
        """Of a KV cache: [layers, 2, num_blocks, heads, rows, head_dim].

        Raises ValueError where the dtype is int8 and a head too small for it.
        """
        is_int8 = dtype.itemsize == 1
        layers, two, *block = self.int8_kv_block_shape if is_int8 else self.kv_block_shape
        return (layers, two, num_blocks, *block)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T tokens of S sequences in one pass: decode tokens, drafts and prompt chunks alike.

    token_ids       [T] int32; the tokens of a sequence stand together, in order
    positions       [T] int32, of each token in its sequence
    sequence_index  [T] int32, row of block_tables
    block_tables    [S, W] int32; token p of a sequence is in slot p % BLOCK_SIZE of block
                    block_tables[s, p // BLOCK_SIZE]; entries past the sequence's end are not read
    logits_rows     [R] int32, indices of the tokens whose logits are wanted
    All on the CPU; a GPU model copies them at once.

    The pass writes each token's key and value to its slot, and each token attends to the slots of
    positions 0 to its own. KV cache: [layers, 2, num_blocks, heads, BLOCK_SIZE, head_dim], or that
    of INT8 KV with INT8_KV_ROWS rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sequence_index: torch.Tensor
    block_tables: torch.Tensor
    logits_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the next token of each of T rows is chosen where the device does it. On the CPU.

    sources        [T] int32, the row of the pass before whose sampled id this row computes, so that
                   the host need not know it yet; -1 where ForwardBatch.token_ids has it
    temperature    [T] float64, 0 for the likeliest token
    top_k          [T] int64, 0 for every token; so are 1 of top_p and 0 of min_p, [T] float64
    seed           [T] uint64, index [T] and position [T] int64: the random stream, the sequence's
                   index in its request, and tokens that it has generated so far
    """

    sources: NDArray[np.int32]
    temperature: NDArray[np.float64]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    index: NDArray[np.int64]
    position: NDArray[np.int64]

    @property
    def draws(self) -> bool:
        """Whether any row is not simply its likeliest token."""
        return bool((self.temperature > 0).any())

    @property
    def filters(self) -> bool:
        """Whether any row that draws has a top_k or top_p."""
        cut = (self.top_k > 0) | (self.top_p < 1)
        return bool((cut & (self.temperature > 0)).any())
