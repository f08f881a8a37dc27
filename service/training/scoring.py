"""The label decision, shared by validation during training and by the evaluation.

The model answers `Text: ...\\nSentiment:` with one of three single tokens. The decision compares
their log-probabilities at that one position; no prior is subtracted and nothing is calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptjet.service.embedded import LABELS, Label, build_prompt
from gptjet.service.training.tokenizer import CONTEXT_TOKENS

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM, PreTrainedTokenizerBase


# Maps right-padded ids [B, S] to next-token logits [B, S, V].
LogitsFunction = Callable[[Tensor], Tensor]
# Room for the answer: the longest one in training has about 40 tokens.
ANSWER_TOKENS = 64


def label_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of each of LABELS with its leading space; raises ValueError if one is several."""
    ids = []
    for label in LABELS:
        tokens = tokenizer.encode(f" {label}", add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(f"' {label}' is {len(tokens)} tokens; the decision needs one")
        ids.append(int(tokens[0]))
    return ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of the prompt for `text`, whose end is cut so that prompt and answer fit."""
    ids = tokenizer.encode(build_prompt(text), add_special_tokens=False)
    tail = tokenizer.encode(build_prompt("\0").split(" \0")[1], add_special_tokens=False)
    room = CONTEXT_TOKENS - ANSWER_TOKENS
    return ids if len(ids) <= room else [*ids[: room - len(tail)], *tail]


def label_log_probs(
    logits_of: LogitsFunction,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 64,
) -> Tensor:
    """Log-probabilities of LABELS after the prompt of each text: float32 [len(texts), 3]."""
    label_ids = torch.tensor(label_token_ids(tokenizer))
    encoded = [prompt_ids(tokenizer, text) for text in texts]
    by_length = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    result = torch.empty(len(texts), len(LABELS))
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        input_ids = pad_right([encoded[index] for index in indices])
        last = torch.tensor([len(encoded[index]) - 1 for index in indices])
        with torch.no_grad():
            logits = logits_of(input_ids)[torch.arange(len(indices)), last].float()
        result[indices] = logits.log_softmax(-1)[:, label_ids]
    return result


def decide(log_probs: Tensor) -> list[Label]:
    """The most probable label of each row of log_probs [N, 3]."""
    return [LABELS[int(index)] for index in log_probs.argmax(-1)]


def model_logits(model: GPTJForCausalLM) -> LogitsFunction:
    """The transformers forward as a LogitsFunction, without building a cache."""

    def logits_of(input_ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
        return logits

    return logits_of


def pad_right(sequences: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, longest], padded with 0; a causal model's earlier positions ignore padding."""
    longest = max(len(ids) for ids in sequences)
    padded = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for index, ids in enumerate(sequences):
        padded[index, : len(ids)] = torch.tensor(ids)
    return padded
