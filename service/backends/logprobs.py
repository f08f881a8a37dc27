"""Log-probabilities of given tokens, as every backend's `score` makes them from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.inference_mode()
def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Natural log-probability of one token a row: logits [N, V] -> [N] float32 in host memory.

    Row i is the distribution that token i was drawn from, unmodified. Accumulates in float32
    whatever the logits are: over 50,400 ids float16 would lose the third digit.
    """
    if logits.shape[0] != len(token_ids):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(token_ids)} tokens")
    rows = logits.float()
    ids = torch.tensor(list(token_ids), device=rows.device)
    chosen = rows.gather(1, ids[:, None])[:, 0]
    return (chosen - rows.logsumexp(-1)).cpu()
