"""What a run is: exact lengths, times from the client's clock, anything else an error."""

from __future__ import annotations

from typing import Any

import pytest

from gptjet.benchmarks.measure import MeasureError, measure
from gptjet.service.client_types import FinishReason


def test_times_are_those_of_the_arrivals(fake_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = fake_client([(20, 1), (5, 1), (7, 1)], monkeypatch)
    found = measure(client, [1, 2], 3, timeout_s=1)
    assert found.ttft_ms == 20
    assert found.itl_ms == (5, 7)
    assert found.e2e_ms == 33
    assert found.server == {
        "queue_ms": 1,
        "prefill_ms": 2,
        "decode_ms": 3,
        "ttft_ms": 4,
        "e2e_ms": 5,
    }


def test_tokens_of_one_chunk_came_together(
    fake_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = fake_client([(20, 2), (0, 0), (6, 3)], monkeypatch)
    assert measure(client, [1], 5, timeout_s=1).itl_ms == (0, 6, 0, 0)


def test_the_output_length_is_forced_and_end_of_text_ignored(fake_client: Any) -> None:
    client = fake_client([(0, 1)] * 4)
    measure(client, [1], 4, timeout_s=1)
    assert client.options == {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "ignore_eos": True,
        "temperature": 0.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": 3}, "counted 3 in"),
        ({"completion_tokens": 1}, "and 1 out"),
        ({"finish_reason": FinishReason.STOP_TOKEN}, "ended by stop_token"),
        (None, "without a summary"),
    ],
)
def test_another_answer_than_asked_for_is_never_a_sample(
    fake_client: Any, change: dict[str, Any] | None, message: str
) -> None:
    client = fake_client([(0, 1), (0, 1)])
    client.change = change
    with pytest.raises(MeasureError, match=message):
        measure(client, [1, 2], 2, timeout_s=1)


def test_tokens_that_did_not_arrive_are_missed(fake_client: Any) -> None:
    client = fake_client([(0, 1)])
    client.change = {"completion_tokens": 2}
    with pytest.raises(MeasureError, match="1 arrived"):
        measure(client, [1, 2], 2, timeout_s=1)
