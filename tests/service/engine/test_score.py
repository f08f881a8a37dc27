"""What a score request may hold, and the shares that its log-probabilities make."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gptjet.service.engine.errors import InvalidRequestError
from gptjet.service.engine.score import (
    MAX_CANDIDATE_TOKENS,
    ScoreRequest,
    new_score_request,
    validate_score_request,
)
from gptjet.service.engine.scoring import probabilities


def request(**changes: Any) -> ScoreRequest:
    values: dict[str, Any] = {"prompt_token_ids": (1, 2), "candidates": ((3,), (4, 5))} | changes
    return new_score_request(values.pop("prompt_token_ids"), values.pop("candidates"), **values)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt_token_ids": ()}, [("prompt", "at least one token, got none")]),
        (
            {"prompt_token_ids": (1, 97, 98)},
            [("token_ids.ids[1]", "below the vocabulary of 97, got 97")],
        ),
        ({"prompt_token_ids": (1,) * 32}, [("prompt", "context of 32, got 32 tokens")]),
        ({"candidates": ()}, [("candidates", "must be 1 to 64, got 0")]),
        ({"candidates": ((1,),) * 65}, [("candidates", "must be 1 to 64, got 65")]),
        ({"candidates": ((1,), ())}, [("candidates[1]", "at least one token, got none")]),
        (
            {"candidates": ((1,), (2, -1))},
            [("candidates[1].token_ids.ids[1]", "below the vocabulary of 97, got -1")],
        ),
        (
            {"candidates": ((1,) * 30, (1,) * 31)},
            [("candidates[1]", "prompt (2) + candidate (31) must be at most the context of 32")],
        ),
        (
            {"calibration_token_ids": ()},
            [("calibration_prompt", "at least one token, got none")],
        ),
        (
            {"calibration_token_ids": (200,)},
            [("calibration_token_ids.ids[0]", "below the vocabulary of 97, got 200")],
        ),
        (
            {"calibration_token_ids": (1,) * 31},
            [("candidates[1]", "calibration_prompt (31) + candidate (2) must be at most")],
        ),
        ({"calibration_token_ids": (1,) * 40}, [("calibration_prompt", "context of 32, got 40")]),
        ({"request_id": "r" * 129}, [("request_id", "at most 128 characters, got 129")]),
        (
            {"prompt_token_ids": (), "candidates": ((), (100,))},
            [
                ("prompt", "at least one"),
                ("candidates[0]", "at least one"),
                ("candidates[1].token_ids.ids[0]", "got 100"),
            ],
        ),
    ],
)
def test_bad_field_is_named_with_its_limit(
    changes: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate_score_request(request(**changes), vocab_size=97, max_context=32)
    assert [v.field for v in caught.value.violations] == [field for field, _ in expected]
    for violation, (_, limit) in zip(caught.value.violations, expected, strict=True):
        assert limit in violation.description


def test_limits_themselves_are_accepted() -> None:
    full = request(candidates=((1,) * 30,) * 64, calibration_token_ids=(1, 2))
    validate_score_request(full, vocab_size=97, max_context=32)
    validate_score_request(request(candidates=((96,),)), vocab_size=97, max_context=32)


def test_candidates_are_bounded_together() -> None:
    over = request(candidates=((1,) * 1000,) * 33)
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_CANDIDATE_TOKENS} tokens tog"):
        validate_score_request(over, vocab_size=97, max_context=2048)


def test_id_and_arrival_are_drawn_where_they_are_not_given() -> None:
    first, second = request(), request()
    assert first.request_id != second.request_id
    assert 0 < first.arrival_ns <= second.arrival_ns
    assert request(request_id="mine", arrival_ns=5).arrival_ns == 5


def test_probabilities_are_the_softmax_of_the_logprobs() -> None:
    # Weights 1 : 3.
    assert probabilities([math.log(0.1), math.log(0.3)]) == pytest.approx([0.25, 0.75])
    # So small that their exponentials are 0 in float64.
    assert probabilities([-2000.0, -2000.0 - math.log(3)]) == pytest.approx([0.75, 0.25])


def test_calibration_divides_by_what_the_model_thinks_of_the_word_anyway() -> None:
    # 0.6 : 0.2 after the prompt, 0.9 : 0.1 after one without content: 2/3 : 2 = 1 : 3.
    shares = probabilities([math.log(0.6), math.log(0.2)], [math.log(0.9), math.log(0.1)])
    assert shares == pytest.approx([0.25, 0.75])
