"""Log-probabilities: of the unmodified distribution, for the tokens and for the prompt."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptjet.service.engine.request import SamplingParams, TokenLogprob
from gptjet.service.engine.sampler import NonFiniteLogitsError, Sampler

from .conftest import PROMPT, VOCAB, random_logits, state_of


def test_logprobs_are_of_the_unmodified_distribution(sampler):
    logits = random_logits(1, seed=4)
    expected = logits.log_softmax(-1)[0]
    params = SamplingParams(
        temperature=0.3, top_k=4, repetition_penalty=1.8, logit_bias={5: 50.0}, logprobs=5
    )
    result = sampler.sample(logits, [state_of(sampler, params)])
    [token] = result.token_ids
    [entry] = result.logprobs
    assert token == 5
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(expected[token].item())
    values, ids = expected.topk(5)
    assert [i for i, _ in entry.top] == ids.tolist()
    assert [v for _, v in entry.top] == pytest.approx(values.tolist())


def test_logprobs_are_given_to_the_rows_that_ask(sampler):
    wants = [None, 0, 3, None, 20]
    states = [state_of(sampler, SamplingParams(logprobs=want)) for want in wants]
    result = sampler.sample(random_logits(5), states)
    got = [None if entry is None else len(entry.top) for entry in result.logprobs]
    assert got == wants


def test_equally_likely_alternatives_come_lowest_id_first(sampler):
    logits = torch.zeros(1, VOCAB)
    logits[0, 200], logits[0, 100] = 1.0, -0.0
    result = sampler.sample(logits, [state_of(sampler, SamplingParams(logprobs=20))])
    assert [token for token, _ in result.logprobs[0].top] == [200, *range(19)]


def test_alternatives_beyond_a_mask_have_minus_infinity(sampler):
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 8] = -3.0
    result = sampler.sample(logits, [state_of(sampler, SamplingParams(logprobs=2))])
    assert result.logprobs == [TokenLogprob(8, 0.0, ((8, 0.0), (0, -math.inf)))]


@given(values=st.lists(st.floats(-50, 50, width=32), min_size=8, max_size=30))
def test_alternatives_are_sorted_by_value_then_id(values):
    sampler = Sampler(len(values))
    state = state_of(sampler, SamplingParams(logprobs=5), prompt=(0,))
    [entry] = sampler.sample(torch.tensor([values]), [state]).logprobs
    expected = sorted(range(len(values)), key=lambda token: (-values[token], token))[:5]
    assert [token for token, _ in entry.top] == expected


def test_prompt_logprobs_give_each_prompt_token_the_distribution_before_it(sampler):
    prompt = tuple(1 + i % 200 for i in range(1499))
    logits = random_logits(len(prompt) - 1, seed=2)
    state = state_of(sampler, SamplingParams(echo=True, logprobs=2), prompt=prompt)
    entries = sampler.prompt_logprobs(logits, state)
    expected = logits.log_softmax(-1)
    assert entries[0] == TokenLogprob(1, None)
    assert len(entries) == len(prompt)
    for position in (1, 2, 1020, 1021, 1498):
        entry, row = entries[position], expected[position - 1]
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(row[prompt[position]].item())
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_a_prompt_of_one_token_has_one_entry_without_a_logprob(sampler):
    state = state_of(sampler, SamplingParams(echo=True, logprobs=2), prompt=(42,))
    assert sampler.prompt_logprobs(torch.zeros(0, VOCAB), state) == (TokenLogprob(42, None),)


def test_prompt_logprobs_of_chunks_are_those_of_the_whole(sampler):
    logits = random_logits(len(PROMPT) - 1, seed=4)
    state = state_of(sampler, SamplingParams(echo=True, logprobs=2))
    chunks = [(0, 1), (1, 3), (3, 4), (4, 5)]
    entries = [
        sampler.prompt_logprobs(logits[start : min(end, 4)], state, start, end)
        for start, end in chunks
    ]
    assert [len(part) for part in entries] == [2, 2, 1, 0]
    assert sum(entries, ()) == sampler.prompt_logprobs(logits, state)
    with pytest.raises(ValueError, match=r"must be \[2, 257\], got \[1, 257\]"):
        sampler.prompt_logprobs(logits[:1], state, 1, 3)


def test_prompt_logits_are_checked(sampler):
    state = state_of(sampler, SamplingParams(echo=True, logprobs=0))
    with pytest.raises(ValueError, match="prompt_logits must be"):
        sampler.prompt_logprobs(torch.zeros(3, VOCAB), state)
    logits = torch.zeros(4, VOCAB)
    logits[2, 1] = math.nan
    with pytest.raises(NonFiniteLogitsError) as caught:
        sampler.prompt_logprobs(logits, state)
    assert caught.value.rows == (2,)
