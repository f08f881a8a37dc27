"""Log-probabilities of given tokens, by hand and against torch."""

from __future__ import annotations

import math

import pytest
import torch

from gptjet.service.backends.logprobs import token_logprobs


def test_logprob_is_the_logit_less_the_logarithm_of_the_sum() -> None:
    # Logits ln 1, ln 3: probabilities 1/4 and 3/4. Logits all alike over 2 ids: 1/2.
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]])
    assert token_logprobs(logits, (1, 0)).tolist() == pytest.approx(
        [math.log(0.75), math.log(0.5)], abs=1e-6
    )


def test_float16_logits_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 50_400, generator=generator) * 3).half()
    expected = torch.log_softmax(logits.double(), -1)
    got = token_logprobs(logits, (0, 1, 50_399, 7))
    assert got.dtype is torch.float32
    for row, token_id in enumerate((0, 1, 50_399, 7)):
        assert got[row].item() == pytest.approx(expected[row, token_id].item(), abs=1e-4)


def test_other_number_of_rows_than_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 tokens"):
        token_logprobs(torch.zeros(2, 3), (0,))
