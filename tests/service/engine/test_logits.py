"""Every processor and filter against the one of the same name in transformers."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GPTJConfig, GPTJForCausalLM
from transformers.generation import logits_process as hf

from gptjet.service.engine import logits as lg
from gptjet.service.engine.request import SamplingParams

VOCAB = 997  # prime: rows do not start where a vector register does
ROWS = 5


@pytest.fixture(params=[0, 1, 2])
def scores(request):
    """Logits [ROWS, VOCAB] as spread as a model's, some masked."""
    generator = torch.Generator().manual_seed(request.param)
    values = torch.randn(ROWS, VOCAB, generator=generator) * 4
    values[1, ::3] = -math.inf
    return values


@pytest.fixture
def history():
    """Token ids [ROWS, 40] with repeats."""
    return torch.randint(0, 30, (ROWS, 40), generator=torch.Generator().manual_seed(7))


def processors_of(history, params, *, prompt_length=25, eos=()):
    """One LogitProcessors a row, told the history token by token."""
    rows = []
    for tokens in history.tolist():
        row = lg.LogitProcessors(params, tokens[:prompt_length], eos, VOCAB)
        for token in tokens[prompt_length:]:
            row.observe(token)
        rows.append(row)
    return rows


def processed(scores, rows):
    result = scores.clone()
    lg.process_logits(result, rows)
    return result


def probabilities(weights):
    return weights.double() / weights.sum(-1, keepdim=True)


def assert_same_distribution(weights, hf_scores):
    """Same tokens kept, same probabilities."""
    expected = hf_scores.double().softmax(-1)
    actual = probabilities(weights)
    # Below 2**-44 of the likeliest token a weight is 0 by definition.
    floor = expected.amax(-1, keepdim=True) * 2.0**-43
    assert torch.equal((actual > 0) & (expected > floor), expected > floor)
    assert not (actual[expected == 0] > 0).any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


# Processors


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(scores, history, penalty):
    params = SamplingParams(repetition_penalty=penalty)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(history, scores)
    assert torch.equal(processed(scores, processors_of(history, params)), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_no_repeat_ngram_size_equals_transformers(scores, history, size):
    params = SamplingParams(no_repeat_ngram_size=size)
    expected = hf.NoRepeatNGramLogitsProcessor(size)(history, scores)
    assert torch.equal(processed(scores, processors_of(history, params)), expected)


@given(
    tokens=st.lists(st.integers(0, 3), min_size=0, max_size=25),
    prompt_length=st.integers(0, 25),
    size=st.integers(1, 5),
)
def test_ngram_ban_equals_transformers_for_any_history(tokens, prompt_length, size):
    history = torch.tensor([tokens], dtype=torch.int64)
    scores = torch.zeros(1, VOCAB)
    params = SamplingParams(no_repeat_ngram_size=size)
    rows = processors_of(history, params, prompt_length=prompt_length)
    # transformers calls a processor only once there is a token.
    expected = hf.NoRepeatNGramLogitsProcessor(size)(history, scores) if tokens else scores
    assert torch.equal(processed(scores, rows), expected)


@pytest.mark.parametrize("generated", [0, 14, 15, 16])
def test_min_new_tokens_equals_transformers(scores, history, generated):
    params = SamplingParams(min_new_tokens=15)
    history = history[:, : 20 + generated]
    expected = hf.MinNewTokensLengthLogitsProcessor(20, 15, [3, 11])(history, scores)
    rows = processors_of(history, params, prompt_length=20, eos=(3, 11, 3))
    assert torch.equal(processed(scores, rows), expected)


def test_logit_bias_equals_transformers(scores, history):
    bias = {5: 3.5, 17: -100.0, 900: 0.25}
    expected = hf.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(
        history, scores
    )
    rows = processors_of(history, SamplingParams(logit_bias=bias))
    assert torch.equal(processed(scores, rows), expected)


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, -1.5), (1.25, 0.75)])
def test_frequency_and_presence_penalties_are_openais_over_the_output(
    scores, history, frequency, presence
):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c[j] the count of j in the output."""
    params = SamplingParams(frequency_penalty=frequency, presence_penalty=presence)
    expected = scores.clone()
    for row, tokens in enumerate(history.tolist()):
        output = tokens[25:]
        for token in range(VOCAB):
            count = output.count(token)
            expected[row, token] -= count * frequency + (count > 0) * presence
    actual = processed(scores, processors_of(history, params))
    torch.testing.assert_close(actual, expected)
    prompt_only = set(history[0, :25].tolist()) - set(history[0, 25:].tolist())
    assert prompt_only, "the history must have a token that is in the prompt alone"
    assert all(actual[0, token] == scores[0, token] for token in prompt_only)


def test_a_prompt_seen_by_the_repetition_penalty_does_not_count_as_output(scores, history):
    both = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5)
    only_output = SamplingParams(frequency_penalty=0.5, presence_penalty=0.5)
    penalised = hf.RepetitionPenaltyLogitsProcessor(1.5)(history, scores)
    expected = processed(penalised, processors_of(history, only_output))
    actual = processed(scores, processors_of(history, both))
    torch.testing.assert_close(actual, expected)


def test_counts_grow_beyond_their_first_allocation():
    counts = lg.TokenCounts()
    for token in range(1000):
        counts.add(token, 1)
        counts.add(token // 2, 1)
    assert counts.ids.tolist() == list(range(1000))
    assert counts.counts.tolist() == [3.0] * 500 + [1.0] * 500


def test_rows_with_different_processors_do_not_touch_each_other(scores, history):
    settings_of_rows = [
        SamplingParams(repetition_penalty=1.5, no_repeat_ngram_size=2),
        SamplingParams(),
        SamplingParams(logit_bias={1: 2.0}, frequency_penalty=1.0),
        SamplingParams(min_new_tokens=60, max_new_tokens=64),
        SamplingParams(no_repeat_ngram_size=1),
    ]
    rows = [
        processors_of(history[i : i + 1], params, eos=(2,))[0]
        for i, params in enumerate(settings_of_rows)
    ]
    together = processed(scores, rows)
    for index, row in enumerate(rows):
        assert torch.equal(together[index], processed(scores[index : index + 1], [row])[0])
    assert torch.equal(together[1], scores[1])
    assert not rows[1].active


def test_ids_beyond_the_usable_columns_are_left_alone():
    """A prompt may hold ids of the model's padding; row 0's must not reach into row 1."""
    params = SamplingParams(
        repetition_penalty=2.0,
        no_repeat_ngram_size=1,
        logit_bias={12: 5.0},
        min_new_tokens=2,
        stop_token_ids=(11,),
    )
    rows = [lg.LogitProcessors(params, [10, 11, 12], (11,), 10) for _ in range(2)]
    scores = torch.ones(2, 10)
    assert torch.equal(processed(scores, rows), scores)


def test_an_extreme_repetition_penalty_makes_no_infinity():
    scores = torch.tensor([[5.0, -5.0, 1.0, -math.inf]])
    for penalty in (1e-38, 1e38):
        row = lg.LogitProcessors(SamplingParams(repetition_penalty=penalty), [0, 1, 3], (), 4)
        result = processed(scores, [row])
        assert result[0, :3].isfinite().all()
        assert result[0, 3] == -math.inf


def test_a_mask_that_would_leave_nothing_gives_way_ngrams_first():
    params = SamplingParams(no_repeat_ngram_size=1, min_new_tokens=2)
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    exhausted = lg.LogitProcessors(params, [0, 1], (2,), 3)
    some_left = lg.LogitProcessors(params, [0], (2,), 3)
    inf = math.inf
    expected = [[1.0, 2.0, -inf], [-inf, 2.0, -inf]]
    assert processed(scores, [exhausted, some_left]).tolist() == expected


def test_min_new_tokens_gives_way_when_only_stop_ids_exist():
    params = SamplingParams(min_new_tokens=2)
    scores = torch.tensor([[1.0, -math.inf, 3.0]])
    row = lg.LogitProcessors(params, [0], (0, 2), 3)
    assert torch.equal(processed(scores, [row]), scores)


# Filters


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5])
def test_temperature_equals_transformers(scores, history, temperature):
    weights = lg.to_weights(scores, [temperature] * ROWS)
    assert_same_distribution(weights, hf.TemperatureLogitsWarper(temperature)(history, scores))


@pytest.mark.parametrize("temperature", [5e-324, 1e-30])
def test_a_tiny_temperature_is_greedy_and_not_nan(scores, temperature):
    weights = lg.to_weights(scores, [temperature] * ROWS)
    assert torch.equal(weights.argmax(-1), scores.argmax(-1))
    assert (weights.count_nonzero(-1) == 1).all()


@pytest.mark.parametrize("top_k", [1, 2, 50, VOCAB, 10 * VOCAB])
def test_top_k_equals_transformers(scores, history, top_k):
    weights = lg.keep_top_k(lg.to_weights(scores, [1.0] * ROWS), [top_k] * ROWS)
    assert_same_distribution(weights, hf.TopKLogitsWarper(top_k)(history, scores))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(scores, history, top_p):
    weights = lg.keep_top_p(lg.to_weights(scores, [1.0] * ROWS), [top_p] * ROWS)
    assert_same_distribution(weights, hf.TopPLogitsWarper(top_p)(history, scores))


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(scores, history, min_p):
    weights = lg.keep_min_p(lg.to_weights(scores, [1.0] * ROWS), [min_p] * ROWS)
    assert_same_distribution(weights, hf.MinPLogitsWarper(min_p)(history, scores))


@pytest.mark.parametrize("typical_p", [0.05, 0.2, 0.5, 0.9, 0.99])
def test_typical_p_equals_transformers(scores, history, typical_p):
    weights = lg.keep_typical_p(lg.to_weights(scores, [1.0] * ROWS), [typical_p] * ROWS)
    assert_same_distribution(weights, hf.TypicalLogitsWarper(typical_p)(history, scores))


@pytest.mark.parametrize("top_p", [0.125, 0.5, 0.99])
def test_top_p_cuts_through_equally_likely_tokens_keeping_the_lowest_ids(top_p):
    """FP16 logits have many equal values: here eight tokens of each of eight values."""
    scores = torch.arange(64).remainder(8).div(4).unsqueeze(0)
    kept = lg.keep_top_p(lg.to_weights(scores, [1.0]), [top_p])[0] > 0
    # transformers leaves the choice among equals to an unstable sort, but keeps as many.
    kept_by_hf = hf.TopPLogitsWarper(top_p)(None, scores)[0].isfinite()
    assert torch.equal(scores[0, kept].sort()[0], scores[0, kept_by_hf].sort()[0])
    for value in scores.unique():
        among_equals = kept[scores[0] == value].tolist()
        assert among_equals == sorted(among_equals, reverse=True)


@pytest.mark.parametrize(("top_p", "count"), [(0.5, 32), (0.50001, 33), (1 / 64, 1)])
def test_top_p_stops_at_the_token_that_reaches_it_exactly(top_p, count):
    kept = lg.keep_top_p(lg.to_weights(torch.zeros(1, 64), [1.0]), [top_p])[0] > 0
    assert kept.tolist() == [True] * count + [False] * (64 - count)


def test_top_k_keeps_ties_with_the_last_as_transformers_does():
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    weights = lg.keep_top_k(lg.to_weights(scores, [1.0]), [2])
    assert torch.equal(weights > 0, hf.TopKLogitsWarper(2)(None, scores).isfinite())


def test_filters_use_each_rows_own_limit(scores):
    weights = lg.to_weights(scores, [0.5, 1.0, 1.5, 2.0, 3.0])
    for keep, limits in [
        (lg.keep_top_k, [1, 5, 20, 100, 2000]),
        (lg.keep_top_p, [0.1, 0.3, 0.5, 0.9, 0.99]),
        (lg.keep_min_p, [0.5, 0.1, 0.01, 0.001, 1.0]),
        (lg.keep_typical_p, [0.1, 0.3, 0.5, 0.9, 0.99]),
    ]:
        together = keep(weights, limits)
        for row, limit in enumerate(limits):
            assert torch.equal(together[row], keep(weights[row : row + 1], [limit])[0])


@settings(deadline=None)
@given(
    values=st.lists(st.integers(-8, 8), min_size=1, max_size=40),
    top_p=st.floats(0.001, 1.0),
    typical_p=st.floats(0.001, 1.0),
)
def test_filters_always_leave_a_token_and_reach_their_mass(values, top_p, typical_p):
    weights = lg.to_weights(torch.tensor([values], dtype=torch.float32), [1.0])
    total = weights.sum().item()
    for keep, mass in ((lg.keep_top_p, top_p), (lg.keep_typical_p, typical_p)):
        kept = keep(weights, [mass])
        assert kept.sum().item() >= mass * total * (1 - 1e-12)
        assert torch.equal(kept, torch.where(kept > 0, weights, 0))
    smallest = lg.keep_top_p(weights, [top_p])
    least = smallest[smallest > 0].min().item()
    assert smallest.sum().item() - least < top_p * total, "one token fewer would do"


# The draw


def test_draw_is_the_inverse_of_the_cumulated_weights():
    weights = torch.tensor([[0, 2, 0, 1, 1, 0]])
    uniforms = [0.0, 0.25, 0.49999, 0.5, 0.74, 0.75, 1 - 2**-53]
    drawn = [lg.draw(weights, [u]).item() for u in uniforms]
    assert drawn == [1, 1, 1, 3, 3, 4, 4]


@given(total=st.integers(1, 2**62), above=st.integers(-2, 300), power=st.integers(0, 62))
def test_draw_never_gives_a_token_without_weight_however_the_product_rounds(total, above, power):
    for last in (total, max(1, 2**power + above)):
        weights = torch.tensor([[last, 0]])
        assert lg.draw(weights, [1 - 2**-53]).item() == 0


# The order


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4
    )
    return GPTJForCausalLM(config)


@pytest.mark.parametrize("case", range(12))
def test_all_parameters_together_equal_transformers_own_list(tiny_model, case):
    """The list is the one `generate` builds, so its order is transformers' and not ours."""
    rng = random.Random(case)
    eos, prompt_length = 4, 25
    params = SamplingParams(
        temperature=rng.choice([0.6, 0.9, 1.4]),
        top_k=rng.choice([20, 60]),
        top_p=rng.choice([0.7, 0.9]),
        min_p=rng.choice([0.01, 0.05]),
        typical_p=rng.choice([0.6, 0.9]),
        repetition_penalty=rng.choice([0.8, 1.5]),
        no_repeat_ngram_size=rng.choice([1, 2]),
        min_new_tokens=rng.choice([15, 16]),
        logit_bias={4: 9.0, 6: 2.0, 500: 5.0},
    )
    config = GenerationConfig(
        do_sample=True,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        min_new_tokens=params.min_new_tokens,
        sequence_bias={(token,): bias for token, bias in params.logit_bias.items()},
        eos_token_id=eos,
    )
    config._eos_token_tensor = torch.tensor([eos])
    generator = torch.Generator().manual_seed(case)
    history = torch.randint(0, 30, (ROWS, 40), generator=generator)
    scores = torch.randn(ROWS, VOCAB, generator=generator) * 3
    their_list = tiny_model._get_logits_processor(
        config, input_ids_seq_length=prompt_length, device="cpu"
    )
    assert len(their_list) == 9
    rows = processors_of(history, params, prompt_length=prompt_length, eos=(eos,))
    weights = lg.to_weights(processed(scores, rows), [params.temperature] * ROWS)
    weights = lg.keep_top_k(weights, [params.top_k] * ROWS)
    weights = lg.keep_top_p(weights, [params.top_p] * ROWS)
    weights = lg.keep_min_p(weights, [params.min_p] * ROWS)
    weights = lg.keep_typical_p(weights, [params.typical_p] * ROWS)
    assert_same_distribution(weights, their_list(history, scores))


def test_weights_of_the_largest_vocabulary_do_not_overflow():
    assert lg.MAX_VOCAB_SIZE * 2**lg.WEIGHT_BITS == 2**63
    assert np.iinfo(np.int64).max == 2**63 - 1
    weights = lg.to_weights(torch.zeros(1, lg.MAX_VOCAB_SIZE - 1), [1.0])
    assert weights.sum().item() == (lg.MAX_VOCAB_SIZE - 1) * 2**lg.WEIGHT_BITS
