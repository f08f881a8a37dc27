"""The classifier: scores the labels, streams an explanation, and says when it does not know."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from gptjet.service.apps.sentiment.answer import Answer, check_named, read_answer
from gptjet.service.apps.sentiment.result import (
    Event,
    ExplanationDelta,
    Finished,
    Scored,
    SentimentResult,
    TextError,
)
from gptjet.service.apps.sentiment.split import split_to_fit
from gptjet.service.apps.sentiment.template import UNCERTAIN, PromptTemplate, TemplateError
from gptjet.service.client import AsyncClient, CandidateScore, GenerationSummary, ModelInfo

# Less room than this for the text of a part: the template does not suit the model.
_LEAST_ROOM_TOKENS = 8
_PARTS_IN_FLIGHT = 8
# A label that a model in half precision finds impossible stays a number to calculate with.
_LEAST_LOGPROB = -1000.0
POOLING = "mean log-probability of each label over the parts, weighted by their tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierOptions:
    """What a caller may choose.

    explain    whether an explanation is generated where the template has one
    max_chars  a longer text is refused
    max_parts  a text that needs more parts is refused
    timeout_s  of each RPC; None: the client's own
    """

    explain: bool = True
    max_chars: int = 100_000
    max_parts: int = 256
    timeout_s: float | None = None


_DEFAULT_OPTIONS = ClassifierOptions()


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the text and its labels' log-probabilities, which sum to 1 as probabilities."""

    text: str
    tokens: int
    logprobs: tuple[float, ...]


class SentimentClassifier:
    """Classifies texts by one template through one client; any number at the same time."""

    def __init__(
        self,
        client: AsyncClient,
        template: PromptTemplate,
        *,
        options: ClassifierOptions = _DEFAULT_OPTIONS,
    ) -> None:
        self._client = client
        self.options = options
        self.template = template
        self._model: ModelInfo | None = None
        self._prompt_tokens = 0  # of the prompt without a text
        self._room_tokens = 0  # for the text
        self._setting_up = asyncio.Lock()

    async def classify(self, text: str, *, seed: int = 0) -> SentimentResult:
        """The last event of `stream`."""
        async with contextlib.aclosing(self.stream(text, seed=seed)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event.result
        raise AssertionError("a stream ends with Finished")

    async def stream(self, text: str, *, seed: int = 0) -> AsyncGenerator[Event]:
        """Scored, then the explanation as it comes, then Finished.

        Raises TextError for a text that cannot be classified, TemplateError where the template
        does not fit the served model, and GptjetError. Closing the iterator cancels the RPC.
        """
        self._check(text)
        await self.model()
        parts = await self._score_parts(await self._split(text))
        logprobs = pool([part.logprobs for part in parts], [part.tokens for part in parts])
        names = [label.name for label in self.template.labels]
        probabilities = dict(zip(names, map(math.exp, logprobs), strict=True))
        scored_label = max(probabilities, key=lambda name: probabilities[name])
        reason = self._near_even(probabilities)
        yield Scored(
            UNCERTAIN if reason else scored_label, probabilities, reason, num_parts=len(parts)
        )
        explained = 0
        answer, summary = Answer("", None), None
        if self.options.explain and self.template.answer:
            explained = _most_telling(parts, names.index(scored_label))
            # Closed with this iterator and not some time later: that is what cancels the RPC.
            async with contextlib.aclosing(self._explain(parts[explained].text, seed)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, ExplanationDelta):
                        yield piece
                    else:
                        answer, summary = piece
        if reason is None and answer.label not in (None, scored_label):
            reason = (
                f"the labels' probabilities say {scored_label}, the explanation says {answer.label}"
            )
        highlights, missing = check_named(self.template, answer.explanation, text)
        result = SentimentResult(
            text=text,
            label=UNCERTAIN if reason else scored_label,
            scored_label=scored_label,
            probabilities=probabilities,
            uncertain_reason=reason,
            explanation=answer.explanation,
            explained_label=answer.label,
            highlights=highlights,
            missing_words=missing,
            num_parts=len(parts),
            explained_part=explained,
            pooling=POOLING if len(parts) > 1 else None,
            ttft_ms=None if summary is None else summary.timings.ttft_ms,
            tokens_per_second=None if summary is None else _tokens_per_second(summary),
            template=self.template.name,
            template_version=self.template.version,
            seed=seed,
            model=(await self.model()).name,
        )
        yield Finished(result)

    def _check(self, text: str) -> None:
        if len(text) > self.options.max_chars:
            raise TextError(
                f"text: must be at most {self.options.max_chars} characters, got {len(text)}"
            )
        if not self.template.one_line(text):
            raise TextError("text: must not be empty or blank")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(
                f"text: must be valid Unicode, has a lone surrogate at character {error.start}"
            ) from None

    async def model(self) -> ModelInfo:
        """The served model, asked for once, after checking that the template fits it.

        Raises TemplateError and GptjetError.
        """
        async with self._setting_up:
            if self._model is None:
                template, timeout_s = self.template, self.options.timeout_s
                model = await self._client.get_model(timeout_s=timeout_s)
                self._prompt_tokens = await self._count(template.render(""))
                explain_tokens = await self._count(template.render_explain(""))
                labels = [await self._count(label.continuation) for label in template.labels]
                generated = template.max_new_tokens if template.answer else 0
                overhead = max(self._prompt_tokens, explain_tokens) + max([generated, *labels])
                if model.max_context - overhead < _LEAST_ROOM_TOKENS:
                    raise TemplateError(
                        f"prompt: template {template.name!r} needs {overhead} tokens beside the "
                        f"text, and the context of {model.name} has {model.max_context}"
                    )
                room = template.max_text_tokens or model.max_context
                self._room_tokens = min(room, model.max_context - overhead)
                self._model = model
            return self._model

    async def _count(self, text: str) -> int:
        return len((await self._client.tokenize(text, timeout_s=self.options.timeout_s)).ids)

    async def _split(self, text: str) -> list[str]:
        room = self._room_tokens

        async def count(piece: str) -> int:
            # As it stands in the prompt; no tokenizer makes more tokens than there are bytes.
            size = len(self.template.one_line(piece).encode())
            if size < room:
                return size
            return await self._count(self.template.render(piece)) - self._prompt_tokens

        parts = await split_to_fit(text, room, count)
        if len(parts) > self.options.max_parts:
            raise TextError(
                f"text: must fit {self.options.max_parts} parts of {room} tokens, "
                f"needs {len(parts)}"
            )
        return parts

    async def _score_parts(self, texts: Sequence[str]) -> list[_Part]:
        slots = asyncio.Semaphore(_PARTS_IN_FLIGHT)

        async def score(text: str) -> _Part:
            async with slots:
                return await self._score(text)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(score(text)) for text in texts]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first failure has cancelled the others
        return [task.result() for task in tasks]

    async def _score(self, text: str) -> _Part:
        template = self.template
        neutral = template.render(template.neutral_text) if template.calibrate else None
        scored = await self._client.score(
            template.render(text),
            [label.continuation for label in template.labels],
            calibration_prompt=neutral,
            timeout_s=self.options.timeout_s,
        )
        shares = [_share(score) for score in scored.scores]
        tokens = max(1, scored.prompt_tokens - self._prompt_tokens)
        return _Part(text, tokens, _normalised(shares))

    async def _explain(
        self, text: str, seed: int
    ) -> AsyncGenerator[ExplanationDelta | tuple[Answer, GenerationSummary | None]]:
        template = self.template
        stream = self._client.generate_stream(
            template.render_explain(text),
            timeout_s=self.options.timeout_s,
            max_new_tokens=template.max_new_tokens,
            temperature=template.temperature,
            seed=seed,
            stop=template.stop or None,
        )
        shown = 0
        async with stream:
            async for _ in stream:
                ready = read_answer(template, stream.text, ended=False).explanation
                if len(ready) > shown:
                    yield ExplanationDelta(ready[shown:])
                    shown = len(ready)
        answer = read_answer(template, stream.text)
        if len(answer.explanation) > shown:
            yield ExplanationDelta(answer.explanation[shown:])
        yield answer, stream.summary

    def _near_even(self, probabilities: dict[str, float]) -> str | None:
        first, second = sorted(probabilities, key=lambda name: -probabilities[name])[:2]
        margin = probabilities[first] - probabilities[second]
        if margin >= self.template.uncertain_margin:
            return None
        return (
            f"{first} ({probabilities[first]:.0%}) and {second} ({probabilities[second]:.0%}) "
            f"are nearly as probable"
        )


def _most_telling(parts: Sequence[_Part], label_index: int) -> int:
    """Which part speaks most for a label: by its length and its probability."""
    return max(
        range(len(parts)), key=lambda i: parts[i].tokens * math.exp(parts[i].logprobs[label_index])
    )


def pool(logprobs: Sequence[Sequence[float]], weights: Sequence[float]) -> tuple[float, ...]:
    """One log-probability a label from those of several parts, [parts, labels] and [parts].

    The weighted mean of the log-probabilities, normalised: a logarithmic opinion pool (Genest and
    Zidek 1986).
    """
    total = sum(weights)
    means = [
        sum(weight * part[index] for part, weight in zip(logprobs, weights, strict=True)) / total
        for index in range(len(logprobs[0]))
    ]
    return _normalised(means)


def _share(score: CandidateScore) -> float:
    """A label's log-probability, less that after the neutral text where it was asked for.

    An impossible label stays one: as impossible after the neutral text, it would have share 0.
    """
    if score.logprob <= _LEAST_LOGPROB:
        return _LEAST_LOGPROB
    return score.logprob - max(score.calibration_logprob or 0.0, _LEAST_LOGPROB)


def _normalised(logprobs: Sequence[float]) -> tuple[float, ...]:
    highest = max(logprobs)
    log_sum = highest + math.log(sum(math.exp(value - highest) for value in logprobs))
    return tuple(value - log_sum for value in logprobs)


def _tokens_per_second(summary: GenerationSummary) -> float | None:
    """Of decoding, the first token excluded: TTFT is about that one."""
    tokens = summary.completion_tokens - 1
    if tokens < 1 or summary.timings.decode_ms <= 0:
        return None
    return tokens / summary.timings.decode_ms * 1000
