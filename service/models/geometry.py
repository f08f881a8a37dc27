"""Sizes that a server needs, read from a transformers configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptjet.service.engine.errors import BackendLoadError

# The spellings of "most positions" over transformers' model families, commonest first.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def context_length(config: Any) -> int | None:
    """Most tokens of one sequence, prompt and output together; None where nothing says (ALiBi)."""
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def eos_token_ids(
    config: Any, generation_config: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """Ids that end a sequence, ascending: of generation_config.json, else of the configuration.

    Both hold one id, a list of them, or nothing. Ids from `vocab_size` on, which the default of a
    small random GPT-J is, can never be sampled and are left out.
    """
    for value in (generation_config.get("eos_token_id"), getattr(config, "eos_token_id", None)):
        ids = value if isinstance(value, list) else [value]
        found = sorted({i for i in ids if isinstance(i, int) and 0 <= i < vocab_size})
        if found:
            return tuple(found)
    return ()


def check_geometry(config: Any, where: str) -> None:
    """Refuse sizes of GPT-J and CodeGen that would only fail in the first forward.

    Raises BackendLoadError naming the field; `where` is the file the configuration came from.
    """
    if config.model_type not in {"gptj", "codegen"}:
        return
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    if heads < 1 or hidden % heads:
        raise BackendLoadError(f"{where}: n_embd {hidden} is not a multiple of n_head {heads}")
    width, rotary_dim = hidden // heads, int(config.rotary_dim)
    if not 2 <= rotary_dim <= width or rotary_dim % 2:
        raise BackendLoadError(
            f"{where}: rotary_dim {rotary_dim} must be even and 2 to {width}, the width of a head "
            f"(a file without rotary_dim means 64)"
        )
