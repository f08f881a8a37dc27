"""Every limit of a request is named by field, and all of them at once."""

from __future__ import annotations

import math

import pytest

from gptjet.service.engine.errors import InvalidRequestError
from gptjet.service.engine.request import (
    Request,
    SamplingParams,
    new_request,
    validate_request,
)

LIMITS = {"vocab_size": 100, "max_context": 32, "max_n": 4}


def violated_fields(request: Request) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        validate_request(request, **LIMITS)
    return [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 30}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"typical_p": 0.0}, "typical_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"stop": ("x",) * 17}, "stop"),
        ({"stop": ("x", "")}, "stop[1]"),
        ({"stop": ("x", "y" * 1025)}, "stop[1]"),
        ({"stop_token_ids": (100,)}, "stop_token_ids[0]"),
        ({"stop_token_ids": (1,) * 65}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {100: 1.0}}, "logit_bias[100]"),
        ({"logit_bias": {1: 101.0}}, "logit_bias[1]"),
        ({"logit_bias": {1: math.nan}}, "logit_bias[1]"),
    ],
)
def test_sampling_field_out_of_its_limits_is_named(params: dict[str, object], field: str) -> None:
    request = new_request((1, 2, 3), SamplingParams(**{"max_new_tokens": 8, **params}))  # type: ignore[arg-type]
    assert f"sampling_params.{field}" in violated_fields(request)


def test_every_bad_field_is_reported_at_once() -> None:
    request = new_request((), SamplingParams(temperature=-1, top_p=2, n=0))
    assert violated_fields(request) == [
        "prompt",
        "sampling_params.temperature",
        "sampling_params.top_p",
        "sampling_params.n",
        "sampling_params.max_new_tokens",
    ]


def test_prompt_that_leaves_no_room_is_named_with_the_context() -> None:
    with pytest.raises(InvalidRequestError, match=r"context of 32, got 32 tokens"):
        validate_request(new_request((1,) * 32), **LIMITS)


def test_prompt_id_outside_the_vocabulary_is_named_by_position() -> None:
    assert violated_fields(new_request((1, 100), SamplingParams(max_new_tokens=1))) == [
        "token_ids.ids[1]"
    ]


def test_request_that_fills_the_context_to_its_end_is_accepted() -> None:
    validate_request(new_request((1,) * 31, SamplingParams(max_new_tokens=1)), **LIMITS)
    validate_request(new_request((1,), SamplingParams(max_new_tokens=31)), **LIMITS)


def test_request_id_over_its_length_is_named() -> None:
    request = new_request((1,), SamplingParams(max_new_tokens=1), request_id="x" * 129)
    assert violated_fields(request) == ["request_id"]


def test_seed_id_and_arrival_are_drawn_where_not_given() -> None:
    first, second = new_request((1,)), new_request((1,))
    assert first.seed != second.seed
    assert first.request_id != second.request_id
    assert new_request((1,), SamplingParams(seed=7)).seed == 7
    assert second.arrival_ns >= first.arrival_ns > 0
