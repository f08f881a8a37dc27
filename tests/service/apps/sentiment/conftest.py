"""A client without a server; its model counts words, so its answers are worked out by hand."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

import grpc
import pytest

from gptjet.service.client import (
    CandidateScore,
    FinishReason,
    GenerationSummary,
    ModelInfo,
    ParityVerdict,
    ScoreResult,
    Timings,
    TokenChunk,
    Tokenization,
    UnavailableError,
)

TONES = {"good": "positive", "wonderful": "positive", "bad": "negative", "awful": "negative"}
_TIMINGS = Timings(queue_ms=0, prefill_ms=5, decode_ms=100, ttft_ms=5, e2e_ms=105)
_MODEL = ModelInfo(
    name="words",
    architecture="",
    backend="fake",
    device="cpu",
    dtype="float32",
    num_parameters=0,
    vocab_size=0,
    max_context=256,
    max_sequences=8,
    max_batch_size=8,
    block_size=16,
    num_kv_blocks=64,
    max_queue_size=64,
    max_n=1,
    eos_token_id=None,
    server_version="0",
    parity=ParityVerdict(
        status="not_run", max_relative_error=0, tokens_compared=0, tokens_agreed=0, detail=""
    ),
)


def words_of(text: str) -> list[str]:
    """A token is a word or one other character that is no space."""
    return re.findall(r"\w+|[^\w\s]", text)


class FakeStream:
    """Gives an answer three characters at a time."""

    def __init__(self, client: FakeClient, answer: str) -> None:
        self._client = client
        self._answer = answer
        self.text = ""
        self.summary: GenerationSummary | None = None

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[TokenChunk]:
        for start in range(0, len(self._answer), 3):
            delta = self._answer[start : start + 3]
            self.text += delta
            yield TokenChunk(index=0, text=delta, token_ids=(start,))
        self.summary = GenerationSummary(
            request_id="",
            finish_reason=FinishReason.STOP_TOKEN,
            prompt_tokens=1,
            completion_tokens=11,
            timings=_TIMINGS,
            sequences=(),
            seed=0,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.summary is None:
            self._client.cancelled += 1


class FakeClient:
    """The methods of AsyncClient that the app calls.

    Among the words of the prompt's last text, each good word is worth 2 nats for " positive", each
    bad one 2 for " negative"; " neutral" has 1 nat.
    """

    def __init__(self, *, max_context: int = 256) -> None:
        self.max_context = max_context
        self.prompts: list[str] = []
        self.explain_prompts: list[str] = []
        self.cancelled = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.errors: list[Exception] = []
        self.answer: Callable[[str], str] = self.greedy_answer

    async def get_model(self, *, timeout_s: float | None = None) -> ModelInfo:
        return ModelInfo(
            **{f: getattr(_MODEL, f) for f in _MODEL.__slots__} | {"max_context": self.max_context}
        )

    async def tokenize(self, text: str, *, timeout_s: float | None = None) -> Tokenization:
        words = words_of(text)
        return Tokenization(tuple(range(len(words))), tuple(words))

    def nats(self, prompt: str) -> dict[str, float]:
        text = prompt.rpartition("Text:")[2]
        counts = Counter(TONES.get(word) for word in words_of(text))
        return {
            " positive": 2.0 * counts["positive"],
            " negative": 2.0 * counts["negative"],
            " neutral": 1.0,
        }

    async def score(
        self,
        prompt: str,
        candidates: Sequence[str],
        *,
        calibration_prompt: str | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> ScoreResult:
        if self.errors:
            raise self.errors.pop(0)
        assert len(words_of(prompt)) <= self.max_context
        self.prompts.append(prompt)
        nats = self.nats(prompt)
        total = math.log(sum(math.exp(nats.get(c, 0.0)) for c in candidates))
        logprobs = [nats.get(candidate, 0.0) - total for candidate in candidates]
        return ScoreResult(
            request_id="",
            scores=tuple(
                CandidateScore(
                    index=index,
                    logprob=logprob,
                    tokens=(),
                    probability=math.exp(logprob),
                    calibration_logprob=None
                    if calibration_prompt is None
                    else self.nats(calibration_prompt).get(candidates[index], 0.0),
                )
                for index, logprob in enumerate(logprobs)
            ),
            prompt_tokens=len(words_of(prompt)),
            candidate_tokens=len(candidates),
            timings=_TIMINGS,
        )

    def greedy_answer(self, prompt: str) -> str:
        nats = self.nats(prompt)
        label = max(nats, key=lambda name: nats[name]).strip()
        named = [w for w in words_of(prompt.rpartition("Text:")[2]) if TONES.get(w) == label]
        if not named:
            return f" {label}\nExplanation: no word carries a clear tone."
        return f" {label}\nExplanation: the word {named[0]} sounds {label}."

    def generate_stream(self, prompt: str, **options: Any) -> FakeStream:
        self.explain_prompts.append(prompt)
        return FakeStream(self, self.answer(prompt))


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def unavailable() -> UnavailableError:
    return UnavailableError(grpc.StatusCode.UNAVAILABLE, "gone")
