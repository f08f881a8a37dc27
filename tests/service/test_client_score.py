"""What the client sends and makes of Score, against a stub of the service that answers by hand."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service import client_messages as messages
from gptjet.service.client import (
    AsyncClient,
    CandidateScore,
    Client,
    InvalidRequestError,
    ScoreResult,
    Timings,
    TokenLogprob,
)


class _Answering(pb_grpc.TextGenerationServicer):
    """Answers every Score with the same two scores and keeps the last request."""

    def __init__(self) -> None:
        self.requests: list[pb.ScoreRequest] = []

    def Score(self, request: pb.ScoreRequest, _context: Any) -> pb.ScoreResponse:  # noqa: N802
        self.requests.append(request)
        return pb.ScoreResponse(
            request_id="r-1",
            scores=[
                pb.CandidateScore(
                    index=0,
                    logprob=-3.0,
                    tokens=[
                        pb.TokenLogprob(token_id=7, logprob=-1.0),
                        pb.TokenLogprob(token_id=8, logprob=-2.0),
                    ],
                    probability=0.25,
                    calibration_logprob=0.0,
                ),
                pb.CandidateScore(
                    index=1,
                    logprob=-0.5,
                    tokens=[pb.TokenLogprob(token_id=9, logprob=-0.5)],
                    probability=0.75,
                ),
            ],
            usage=pb.Usage(prompt_tokens=4, completion_tokens=3),
            timings=pb.Timings(queue_ms=1, prefill_ms=2, decode_ms=3, ttft_ms=4, e2e_ms=6),
        )


EXPECTED = ScoreResult(
    request_id="r-1",
    scores=(
        CandidateScore(
            index=0,
            logprob=-3.0,
            tokens=(TokenLogprob(7, -1.0), TokenLogprob(8, -2.0)),
            probability=0.25,
            calibration_logprob=0.0,  # of a candidate that is certain: not the same as absent
        ),
        CandidateScore(
            index=1,
            logprob=-0.5,
            tokens=(TokenLogprob(9, -0.5),),
            probability=0.75,
            calibration_logprob=None,
        ),
    ),
    prompt_tokens=4,
    candidate_tokens=3,
    timings=Timings(queue_ms=1, prefill_ms=2, decode_ms=3, ttft_ms=4, e2e_ms=6),
)


@pytest.fixture
def answering() -> Iterator[tuple[_Answering, str]]:
    servicer = _Answering()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_TextGenerationServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_score_sends_what_was_given_and_returns_what_came(
    answering: tuple[_Answering, str],
) -> None:
    servicer, target = answering
    with Client(target, retry=None, timeout_s=20) as client:
        assert client.score("The food was", [" good", [1, 2]], request_id="r-1") == EXPECTED
        assert client.score([5, 6], (" good",), calibration_prompt="N/A").best == 1
        client.score("a", ["b"], calibration_prompt=[9])
    text, ids, calibrated_by_ids = servicer.requests
    assert text == pb.ScoreRequest(
        text="The food was",
        request_id="r-1",
        candidates=[
            pb.Candidate(text=" good"),
            pb.Candidate(token_ids=pb.TokenIds(ids=[1, 2])),
        ],
    )
    assert text.WhichOneof("calibration_prompt") is None
    assert list(ids.token_ids.ids) == [5, 6]
    assert ids.calibration_text == "N/A"
    assert list(calibrated_by_ids.calibration_token_ids.ids) == [9]


async def test_async_score_does_what_the_sync_one_does(answering: tuple[_Answering, str]) -> None:
    servicer, target = answering
    async with AsyncClient(target, retry=None, timeout_s=20) as client:
        assert await client.score("a", ["b"], calibration_prompt="", request_id="r-1") == EXPECTED
    (request,) = servicer.requests
    assert request.candidates[0].text == "b"
    # Present and empty: the server says that it is empty, and does not leave calibration out.
    assert request.WhichOneof("calibration_prompt") == "calibration_text"


def test_best_is_the_first_of_equally_probable_candidates() -> None:
    def score(index: int, probability: float) -> CandidateScore:
        return CandidateScore(index=index, logprob=-1.0, tokens=(), probability=probability)

    result = ScoreResult(
        request_id="",
        scores=(score(0, 0.2), score(1, 0.4), score(2, 0.4)),
        prompt_tokens=1,
        candidate_tokens=3,
        timings=EXPECTED.timings,
    )
    assert result.best == 1


@pytest.mark.parametrize(
    ("arguments", "field", "description"),
    [
        ({"prompt": "a\ud800"}, "text", "lone surrogate at character 1"),
        ({"prompt": [1, -1]}, "token_ids.ids[1]", "got -1"),
        ({"prompt": 3}, "token_ids.ids", "must be a list, got 3"),
        ({"candidates": "good"}, "candidates", "must be a list of candidates, got 'good'"),
        ({"candidates": None}, "candidates", "must be a list of candidates, got None"),
        ({"candidates": ["x", "\ud800"]}, "candidates[1].text", "lone surrogate"),
        ({"candidates": [[1], [2, True]]}, "candidates[1].token_ids.ids[1]", "got True"),
        ({"candidates": ["x", 3]}, "candidates[1].token_ids.ids", "must be a list, got 3"),
        ({"calibration_prompt": "\udfff"}, "calibration_text", "lone surrogate"),
        ({"calibration_prompt": [2**32]}, "calibration_token_ids.ids[0]", "got 4294967296"),
        ({"request_id": 7}, "request_id", "must be text, got int"),
    ],
)
def test_score_value_its_field_cannot_hold_is_named(
    arguments: dict[str, Any], field: str, description: str
) -> None:
    values: dict[str, Any] = {"prompt": "a", "candidates": ["b"]} | arguments
    with (
        Client("127.0.0.1:1", retry=None) as client,  # nobody is asked
        pytest.raises(InvalidRequestError) as caught,
    ):
        client.score(values.pop("prompt"), values.pop("candidates"), **values)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert description in violation.description


def test_every_bad_value_of_a_score_is_named_at_once() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        messages.score_request([-1], ["\ud800", [-2]], [-3], "\ud800")
    assert [violation.field for violation in caught.value.violations] == [
        "token_ids.ids[0]",
        "request_id",
        "candidates[0].text",
        "candidates[1].token_ids.ids[0]",
        "calibration_token_ids.ids[0]",
    ]
