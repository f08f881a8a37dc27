"""The sampler: reproducible, independent of the batch, and distributed as it should be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.generation import logits_process as hf

from gptjet.service.engine.request import SamplingParams
from gptjet.service.engine.sampler import NonFiniteLogitsError, Sampler

from .conftest import EOS, VOCAB, random_logits, state_of

MIXTURE = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.2, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.05, logprobs=3),
    SamplingParams(temperature=1.0, typical_p=0.6),
    SamplingParams(repetition_penalty=1.4, no_repeat_ngram_size=2),
    SamplingParams(temperature=0.9, frequency_penalty=0.4, presence_penalty=0.4, top_k=5),
    SamplingParams(temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.9, logprobs=20),
    SamplingParams(logit_bias={3: 4.0}, logprobs=0),
    SamplingParams(temperature=0.8, min_new_tokens=6, stop_token_ids=(9,)),
]


# Greedy


def test_greedy_takes_the_likeliest_token_and_the_lowest_id_of_equals(sampler):
    logits = torch.zeros(2, VOCAB)
    logits[0, [30, 40]] = 2.0
    states = [state_of(sampler, SamplingParams()) for _ in range(2)]
    assert sampler.sample(logits, states).token_ids == [30, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(logprobs=0)])
def test_greedy_rows_that_are_not_finite_are_named_and_advance_no_state(sampler, params, bad):
    logits = random_logits(4)
    logits[1] = bad
    logits[3, 7 if bad > 0 or bad != bad else slice(None)] = bad
    states = [state_of(sampler, params) for _ in range(4)]
    with pytest.raises(NonFiniteLogitsError) as caught:
        sampler.sample(logits, states)
    assert caught.value.rows == (1, 3)
    assert [state.num_output_tokens for state in states] == [0] * 4


def test_the_short_way_of_a_plain_greedy_batch_gives_the_same_tokens(sampler):
    logits = random_logits(5)
    plain = [state_of(sampler, SamplingParams()) for _ in range(5)]
    with_logprobs = [state_of(sampler, SamplingParams(logprobs=0)) for _ in range(5)]
    assert all(state.plain for state in plain)
    assert not any(state.plain for state in with_logprobs)
    expected = sampler.sample(logits, with_logprobs).token_ids
    assert sampler.sample(logits, plain).token_ids == expected
    for params in (SamplingParams(min_new_tokens=1), SamplingParams(logit_bias={3: 1.0})):
        assert not state_of(sampler, params).plain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 20},
    ],
)
def test_greedy_decoding_equals_transformers_generate(options):
    torch.manual_seed(3)
    config = GPTJConfig(vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=2, rotary_dim=8)
    model = GPTJForCausalLM(config).eval()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    steps = 40
    with torch.inference_mode():
        unstopped = model.generate(
            torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        eos = unstopped[5]  # a token the model does choose, so that min_new_tokens has work to do
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            **options,
        )[0, len(prompt) :].tolist()
        greedy = Sampler(61, (eos,))
        params = SamplingParams(max_new_tokens=steps, **options)
        state = state_of(greedy, params, prompt=tuple(prompt))
        output = []
        while len(output) < steps and (not output or output[-1] != eos):
            logits = model(torch.tensor([prompt + output])).logits[:, -1].float()
            output += greedy.sample(logits, [state]).token_ids
    assert output == expected


# The same whatever else is running


def run_mixture(sampler, which, *, steps=8):
    """Tokens and log-probabilities of the chosen sequences of MIXTURE, stepped together."""
    states = {i: state_of(sampler, MIXTURE[i % len(MIXTURE)], seed=i) for i in which}
    tokens = {i: [] for i in which}
    logprobs = {i: [] for i in which}
    for step in range(steps):
        all_logits = random_logits(4 * len(MIXTURE), sampler._vocab_size, seed=step)
        result = sampler.sample(all_logits[list(which)], [states[i] for i in which])
        for i, token, logprob in zip(which, result.token_ids, result.logprobs, strict=True):
            tokens[i].append(token)
            logprobs[i].append(logprob)
    return tokens, logprobs


@pytest.mark.parametrize("vocab", [VOCAB, 50400])
def test_a_row_gives_the_same_tokens_alone_and_in_any_batch(vocab):
    sampler = Sampler(vocab, (EOS,))
    count = len(MIXTURE) * (3 if vocab == VOCAB else 1)
    together, together_logprobs = run_mixture(sampler, list(range(count)), steps=4)
    for which in ([i] for i in range(count)):
        alone, alone_logprobs = run_mixture(sampler, which, steps=4)
        assert alone[which[0]] == together[which[0]]
        assert alone_logprobs[which[0]] == together_logprobs[which[0]]


@settings(deadline=None, max_examples=30)
@given(which=st.lists(st.integers(0, 4 * len(MIXTURE) - 1), unique=True, min_size=1, max_size=12))
def test_any_selection_of_rows_gives_the_tokens_of_the_whole(which):
    sampler = Sampler(VOCAB, (EOS,))
    whole = run_mixture(sampler, list(range(4 * len(MIXTURE))), steps=3)
    part = run_mixture(sampler, which, steps=3)
    for i in which:
        assert (part[0][i], part[1][i]) == (whole[0][i], whole[1][i])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(threads):
    """50400 columns are enough for torch to split one row over threads."""
    before = torch.get_num_threads()
    sampler = Sampler(50400)
    logits = random_logits(1, 50400, seed=5)
    params = SamplingParams(temperature=1.0, top_p=0.99, typical_p=0.99)
    try:
        torch.set_num_threads(threads)
        states = [state_of(sampler, params, seed=seed) for seed in range(8)]
        tokens = [sampler.sample(logits, [state]).token_ids[0] for state in states]
    finally:
        torch.set_num_threads(before)
    batch = [state_of(sampler, params, seed=seed) for seed in range(8)]
    assert tokens == sampler.sample(logits.expand(8, -1), batch).token_ids


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(sampler):
    logits = random_logits(1).expand(30, -1)
    params = SamplingParams(temperature=1.5)

    def tokens(seed, index=0):
        state = state_of(sampler, params, seed=seed, index=index)
        return [sampler.sample(logits[:1], [state]).token_ids[0] for _ in range(30)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(7) != tokens(7 + 2**32), "the high word of the seed counts too"
    assert tokens(7) != tokens(7, index=1), "the n sequences of a request differ"


# The distribution

CHI_SQUARE_VOCAB = 24


def warpers(params):
    yield hf.TemperatureLogitsWarper(params.temperature)
    if params.top_k:
        yield hf.TopKLogitsWarper(params.top_k)
    if params.top_p < 1:
        yield hf.TopPLogitsWarper(params.top_p)
    if params.min_p:
        yield hf.MinPLogitsWarper(params.min_p)
    if params.typical_p < 1:
        yield hf.TypicalLogitsWarper(params.typical_p)


def assert_fits(tokens, scores, params):
    for warper in warpers(params):
        scores = warper(None, scores)
    expected = scores.double().softmax(-1)[0] * len(tokens)
    observed = torch.bincount(torch.tensor(tokens), minlength=CHI_SQUARE_VOCAB)
    assert (observed[expected == 0] == 0).all()
    common = expected >= 5  # the usual condition; the rest is one class
    classes = [*expected[common].tolist(), expected[~common].sum().item()]
    counts = [*observed[common].tolist(), observed[~common].sum().item()]
    if classes[-1] == 0:
        classes, counts = classes[:-1], counts[:-1]
    assert stats.chisquare(counts, classes).pvalue > 1e-3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.0, typical_p=0.7),
        SamplingParams(temperature=0.8, top_k=12, top_p=0.9),
    ],
)
@pytest.mark.parametrize("axis", ["seed", "index"])
def test_sampled_tokens_fit_the_distribution_by_chi_square(params, axis):
    sampler = Sampler(CHI_SQUARE_VOCAB)
    scores = random_logits(1, CHI_SQUARE_VOCAB, seed=11, scale=1.5)
    states = [
        state_of(sampler, params, **({"seed": 77, "index": 0} | {axis: i})) for i in range(3000)
    ]
    tokens = sampler.sample(scores.expand(3000, -1), states).token_ids
    assert_fits(tokens, scores, params)


def test_the_tokens_of_one_sequence_fit_the_distribution_by_chi_square():
    sampler = Sampler(CHI_SQUARE_VOCAB)
    scores = random_logits(1, CHI_SQUARE_VOCAB, seed=11, scale=1.5)
    params = SamplingParams(temperature=1.0, top_k=15)
    state = state_of(sampler, params, seed=77)
    tokens = [sampler.sample(scores, [state]).token_ids[0] for _ in range(3000)]
    assert_fits(tokens, scores, params)


# min_new_tokens, stop ids, limits of the vocabulary


def test_min_new_tokens_holds_back_eos_and_stop_ids_until_it_is_reached(sampler):
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 9], logits[0, 50] = 9.0, 8.0, 7.0
    state = state_of(sampler, SamplingParams(min_new_tokens=2, stop_token_ids=(9,)))
    assert [sampler.sample(logits, [state]).token_ids[0] for _ in range(3)] == [50, 50, EOS]


def test_with_ignore_eos_min_new_tokens_leaves_eos_alone(sampler):
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 9.0
    params = SamplingParams(min_new_tokens=2, ignore_eos=True)
    assert sampler.sample(logits, [state_of(sampler, params)]).token_ids == [EOS]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_above_max_token_id_are_never_sampled(temperature):
    logits = torch.full((1, 12), -10.0)
    logits[0, 9:] = 10.0
    params = SamplingParams(temperature=temperature, logprobs=2)
    limited = Sampler(12, max_token_id=8)
    states = [state_of(limited, params, seed=seed) for seed in range(50)]
    result = limited.sample(logits.expand(50, -1), states)
    assert max(result.token_ids) <= 8
    # Log-probabilities are of the whole distribution all the same.
    assert [token for token, _ in result.logprobs[0].top] == [9, 10]
    free = Sampler(12)
    assert free.sample(logits, [state_of(free, params)]).token_ids[0] >= 9


def test_masked_logits_are_never_sampled(sampler):
    logits = random_logits(1)
    logits[0, ::2] = -math.inf
    states = [state_of(sampler, SamplingParams(temperature=5.0), seed=i) for i in range(200)]
    tokens = sampler.sample(logits.expand(200, -1), states).token_ids
    assert all(token % 2 for token in tokens)


def test_penalties_follow_what_was_sampled(sampler):
    """A presence penalty of 2 takes 2.0 from each token once it is out: 3, 4, 5, then 3 again."""
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 4, 5]] = torch.tensor([4.0, 3.5, 3.0])
    state = state_of(sampler, SamplingParams(presence_penalty=2.0))
    assert [sampler.sample(logits, [state]).token_ids[0] for _ in range(5)] == [3, 4, 5, 3, 3]


# Bad logits


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, VOCAB - 1])
def test_bad_rows_are_named_and_no_state_advances(sampler, bad, column):
    logits = random_logits(len(MIXTURE))
    logits[1, column] = bad
    logits[8, column] = bad
    logits[6] = -math.inf
    states = [state_of(sampler, params) for params in MIXTURE]
    with pytest.raises(NonFiniteLogitsError) as caught:
        sampler.sample(logits, states)
    assert caught.value.rows == (1, 6, 8)
    assert "1, 6, 8" in str(caught.value)
    assert all(state.num_output_tokens == 0 for state in states)
    good = [row for row in range(len(MIXTURE)) if row not in caught.value.rows]
    fresh = [state_of(sampler, MIXTURE[row]) for row in good]
    again = sampler.sample(logits[good], [states[row] for row in good])
    assert again == sampler.sample(logits[good], fresh)


@pytest.mark.parametrize("params", MIXTURE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_wholly_bad_row_is_refused_under_every_parameter(sampler, params, bad):
    logits = torch.full((1, VOCAB), bad)
    with pytest.raises(NonFiniteLogitsError, match="row 0"):
        sampler.sample(logits, [state_of(sampler, params)])


def test_a_row_with_only_unusable_ids_is_refused():
    sampler = Sampler(12, max_token_id=8)
    logits = torch.full((1, 12), -math.inf)
    logits[0, 10] = 1.0
    with pytest.raises(NonFiniteLogitsError):
        sampler.sample(logits, [state_of(sampler, SamplingParams())])


def test_logits_of_the_wrong_shape_are_refused(sampler):
    state = state_of(sampler, SamplingParams())
    with pytest.raises(ValueError, match=r"must be \[1, 257\], got \[2, 257\]"):
        sampler.sample(torch.zeros(2, VOCAB), [state])
    with pytest.raises(ValueError, match="must be"):
        sampler.sample(torch.zeros(1, VOCAB + 1), [state])


def test_an_empty_batch_gives_nothing(sampler):
    result = sampler.sample(torch.zeros(0, VOCAB), [])
    assert (result.token_ids, result.logprobs) == ([], [])


@pytest.mark.parametrize("arguments", [(0, ()), (2**19 + 1, ()), (10, (), 10), (10, (), -1)])
def test_impossible_vocabularies_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        Sampler(*arguments)


def test_the_callers_logits_are_not_changed(sampler):
    logits = random_logits(len(MIXTURE))
    before = logits.clone()
    sampler.sample(logits, [state_of(sampler, params) for params in MIXTURE])
    assert torch.equal(logits, before)


def test_half_precision_logits_and_inference_tensors_are_taken(sampler):
    with torch.inference_mode():
        logits = random_logits(len(MIXTURE)).half()
        states = [state_of(sampler, params) for params in MIXTURE]
        tokens = sampler.sample(logits, states).token_ids
    states = [state_of(sampler, params) for params in MIXTURE]
    assert tokens == sampler.sample(logits.float(), states).token_ids
