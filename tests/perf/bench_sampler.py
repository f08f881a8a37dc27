"""The sampler a parameter at GPT-J's vocabulary, and the detokenizer a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptjet.service.engine.detokenizer import Detokenizer
from gptjet.service.engine.request import SamplingParams, new_request
from gptjet.service.engine.sampler import Sampler
from gptjet.service.engine.tokenizer import ByteTokenizer

_VOCAB = 50400
_PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "typical_p": {"temperature": 0.8, "typical_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "no_repeat_ngram": {"no_repeat_ngram_size": 3},
    "logit_bias": {"logit_bias": {7: 2.0}},
    "logprobs": {"logprobs": 5},
}


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("name", _PARAMETERS)
def bench_sample(bench: Any, read_gb_s: float, name: str, rows: int) -> None:
    """[rows, 50400] logits to ids. The states grow by a token a call, as a decode's do.

    The share of bandwidth is of reading the logits once; a few rows of them fit a cache, so it may
    exceed 1.
    """
    logits = torch.randn(rows, _VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    sampler = Sampler(_VOCAB)
    params = SamplingParams(**_PARAMETERS[name], seed=1, max_new_tokens=10**6)

    def new_states(count: int) -> list[Any]:
        return [
            sampler.new_state(new_request((1, 2, 3, 1, 2), params), index) for index in range(count)
        ]

    states = new_states(rows)

    def check() -> None:
        """A row's token is the one it has alone; greedy without penalties is the argmax."""
        together = sampler.sample(logits, new_states(rows)).token_ids
        alone = [
            sampler.sample(logits[i : i + 1], [state]).token_ids[0]
            for i, state in enumerate(new_states(rows))
        ]
        assert together == alone
        if name in {"greedy", "logprobs"}:
            assert together == logits.argmax(dim=-1).tolist()

    bench(
        lambda: sampler.sample(logits, states),
        check,
        bytes_moved=4.0 * rows * _VOCAB,
        read_gb_s=read_gb_s,
    )


@pytest.mark.parametrize("stop", [(), ("never", "this either")], ids=["plain", "stop strings"])
def bench_detokenize_a_thousand_tokens(bench: Any, stop: tuple[str, ...]) -> None:
    tokenizer = ByteTokenizer()
    ids = (list("naïve café, 雪 ".encode()) * 50)[:1000]

    def run() -> str:
        detokenizer = Detokenizer(tokenizer, stop)
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()])

    def check() -> None:
        assert run() == tokenizer.decode(ids)

    bench(run, check)
