"""A source of answers without a model: what a text is answered with can be read off the text.

"wonderful" is positive, "awful" negative, both together nearly even and so uncertain, anything else
neutral. Words in square brackets tell it to misbehave: see FakeClassifier.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Self

import grpc

from gptjet.service.apps.sentiment.answer import Highlight
from gptjet.service.apps.sentiment.result import (
    Event,
    ExplanationDelta,
    Finished,
    Scored,
    SentimentResult,
    TextError,
)
from gptjet.service.apps.sentiment.template import PromptTemplate, load_template
from gptjet.service.apps.sentiment.web.source import SourceState
from gptjet.service.client import (
    InternalError,
    ModelInfo,
    ParityVerdict,
    QueueFullError,
    UnavailableError,
)

MODEL = ModelInfo(
    name="fake-gptj",
    architecture="gptj",
    backend="fake",
    device="cpu",
    dtype="float32",
    num_parameters=4_200_000,
    vocab_size=4096,
    max_context=512,
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
_SHARES = {
    "positive": {"negative": 0.02, "neutral": 0.04, "positive": 0.94},
    "negative": {"negative": 0.9, "neutral": 0.06, "positive": 0.04},
    "neutral": {"negative": 0.1, "neutral": 0.8, "positive": 0.1},
    "uncertain": {"negative": 0.46, "neutral": 0.06, "positive": 0.48},
}


def gone() -> UnavailableError:
    return UnavailableError(
        grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; 10.1.2.3:50051"
    )


@dataclass
class FakeSource:
    """`state_now` is what `state` says; `hold` keeps answers from ending while it is not set.

    running   answers that run now
    closed    texts whose stream was closed before its end
    asked     (text, template, seed, explain) of every answer
    queue_full, away   how many of the next answers find the queue full, or nobody
    raises    what an answer to a text raises, by the text
    """

    templates: tuple[PromptTemplate, ...] = field(
        default_factory=lambda: (load_template("embedded"), load_template("gpt-j"))
    )
    state_now: str = "ready"
    token_s: float = 0.0
    running: int = 0
    most_running: int = 0
    queue_full: int = 0
    away: int = 0
    times_lost: int = 0
    hold: asyncio.Event | None = None
    raises: dict[str, Exception] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    asked: list[tuple[str, str, int, bool]] = field(default_factory=list)

    def classifier(self, template: PromptTemplate, *, explain: bool) -> FakeClassifier:
        return FakeClassifier(self, template, explain)

    async def state(self) -> SourceState:
        known = self.state_now in ("ready", "busy")
        return SourceState(self.state_now, MODEL if known else None)

    async def count_tokens(self, text: str) -> int:
        if self.state_now != "ready":
            raise gone()
        return len(text.split())

    def lost(self) -> None:
        self.times_lost += 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


@dataclass
class FakeClassifier:
    """[die]: the server is gone after a few words; [refuse]: a TextError; [bug]: a ValueError;
    [fail]: the server fails; [parts]: was split in three; [missing]: names a word that the text
    has not."""

    source: FakeSource
    template: PromptTemplate
    explain: bool

    async def stream(self, text: str, *, seed: int = 0) -> AsyncGenerator[Event]:
        source = self.source
        source.asked.append((text, self.template.name, seed, self.explain))
        if source.state_now != "ready" or source.away:
            source.away = max(0, source.away - 1)
            raise gone()
        if source.queue_full:
            source.queue_full -= 1
            raise QueueFullError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (), 0.01)
        if "[refuse]" in text:
            raise TextError("text: is refused for the test")
        if "[fail]" in text:
            raise InternalError(grpc.StatusCode.INTERNAL, "error id 5 at 10.1.2.3")
        if text in source.raises:
            raise source.raises[text]
        if "[bug]" in text:
            raise ValueError("a bug with secret details")
        source.running += 1
        source.most_running = max(source.most_running, source.running)
        ended = False
        try:
            await asyncio.sleep(0)
            result = self._result(text, seed)
            yield Scored(
                result.label, result.probabilities, result.uncertain_reason, result.num_parts
            )
            if self.explain:
                for index, word in enumerate(result.explanation.split(" ")):
                    if "[die]" in text and index == 2:
                        raise gone()
                    yield ExplanationDelta(word if index == 0 else f" {word}")
                    await asyncio.sleep(source.token_s)
            if source.hold is not None:
                await source.hold.wait()
            ended = True
            yield Finished(result)
        finally:
            source.running -= 1
            if not ended and "[die]" not in text:
                source.closed.append(text)

    async def classify(self, text: str, *, seed: int = 0) -> SentimentResult:
        result = None
        async for event in self.stream(text, seed=seed):
            if isinstance(event, Finished):
                result = event.result
        assert result is not None
        return result

    def _result(self, text: str, seed: int) -> SentimentResult:
        words = [word for word in ("wonderful", "awful") if word in text]
        label = {
            ("wonderful",): "positive",
            ("awful",): "negative",
            ("wonderful", "awful"): "uncertain",
        }.get(tuple(words), "neutral")
        shares = _SHARES[label]
        scored = max(shares, key=lambda name: shares[name])
        named = ", ".join(f'"{word}"' for word in words)
        explanation = f"the words {named} sound {scored}" if words else "no word carries a tone"
        parts = 3 if "[parts]" in text else 1
        return SentimentResult(
            text=text,
            label=label,
            scored_label=scored,
            probabilities=shares,
            uncertain_reason="positive (48%) and negative (46%) are nearly as probable"
            if label == "uncertain"
            else None,
            explanation=explanation if self.explain else "",
            explained_label=scored,
            num_parts=parts,
            explained_part=1 if parts > 1 else 0,
            pooling="mean log-probability" if parts > 1 else None,
            highlights=tuple(
                Highlight(word, text.index(word), text.index(word) + len(word)) for word in words
            ),
            missing_words=("splendid",) if "[missing]" in text else (),
            ttft_ms=12.4 if self.explain else None,
            tokens_per_second=83.2 if self.explain else None,
            template=self.template.name,
            template_version=self.template.version,
            seed=seed,
            model="fake-gptj",
        )
