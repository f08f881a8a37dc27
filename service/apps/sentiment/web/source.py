"""Where the page's answers come from: one GPTJet server, reached through its client."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from gptjet.service.apps.sentiment.classify import ClassifierOptions, SentimentClassifier
from gptjet.service.apps.sentiment.result import Event, SentimentResult
from gptjet.service.apps.sentiment.template import PromptTemplate
from gptjet.service.client import (
    AsyncClient,
    DeadlineExceededError,
    GptjetError,
    HealthStatus,
    ModelInfo,
    UnavailableError,
)

# Many open pages ask for the state at their own times; the server is asked this often at most.
_STATE_KEPT_S = 0.5
_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class SourceState:
    """What is known of the server. `state`: loading, ready, busy or gone.

    `model` is None until the server has said what it serves.
    """

    state: str
    model: ModelInfo | None = None


class Classifier(Protocol):
    """What the page asks of a SentimentClassifier."""

    def stream(self, text: str, *, seed: int = 0) -> AsyncGenerator[Event]:
        """Scored, then the explanation as it comes, then Finished."""

    async def classify(self, text: str, *, seed: int = 0) -> SentimentResult:
        """The result alone."""


class Source(Protocol):
    """What the page asks of where its answers come from. The first template is the default."""

    @property
    def templates(self) -> tuple[PromptTemplate, ...]:
        """Those that a visitor may choose from."""

    def classifier(self, template: PromptTemplate, *, explain: bool) -> Classifier:
        """For one of `templates`."""

    async def state(self) -> SourceState:
        """What is known of the server now; never raises for a server that is away."""

    async def count_tokens(self, text: str) -> int:
        """Of the served model. Raises GptjetError."""

    def lost(self) -> None:
        """A call found nobody: what was known of the server may be so no longer."""


class GrpcSource:
    """A Source on a GPTJet server; leaving the `async with` block closes `client`."""

    def __init__(
        self,
        client: AsyncClient,
        templates: Iterable[PromptTemplate],
        *,
        max_chars: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._templates = tuple(templates)
        self._max_chars = max_chars
        self._now_s = now_s
        self._classifiers: dict[tuple[str, bool], SentimentClassifier] = {}
        self._model: ModelInfo | None = None
        self._state = SourceState("loading")
        self._state_at_s: float | None = None

    @property
    def templates(self) -> tuple[PromptTemplate, ...]:
        """Those that a visitor may choose from."""
        return self._templates

    def classifier(self, template: PromptTemplate, *, explain: bool) -> SentimentClassifier:
        """Kept, as it asks the server once for what it needs to know."""
        key = (template.name, explain)
        if key not in self._classifiers:
            options = ClassifierOptions(explain=explain, max_chars=self._max_chars)
            self._classifiers[key] = SentimentClassifier(self._client, template, options=options)
        return self._classifiers[key]

    async def state(self) -> SourceState:
        """What is known of the server now."""
        now_s = self._now_s()
        if self._state_at_s is None or now_s - self._state_at_s >= _STATE_KEPT_S:
            self._state = await self._ask()
            self._state_at_s = self._now_s()
        return self._state

    async def _ask(self) -> SourceState:
        try:
            health = await self._client.health(timeout_s=_PROBE_TIMEOUT_S)
            if health is not HealthStatus.SERVING:
                self.lost()  # what it loads may be another model
                return SourceState("loading")
            if self._model is None:
                self._model = await self._client.get_model(timeout_s=_PROBE_TIMEOUT_S)
        except DeadlineExceededError:
            # It has not hung up: it computes, or loads.
            return SourceState("loading" if self._model is None else "busy", self._model)
        except UnavailableError:
            self.lost()
            return SourceState("gone")
        except GptjetError:
            return SourceState("gone")
        return SourceState("ready", self._model)

    async def count_tokens(self, text: str) -> int:
        """Of the served model."""
        return len((await self._client.tokenize(text)).ids)

    def lost(self) -> None:
        """Another server may answer next, with another model."""
        self._classifiers.clear()
        self._model = None
        self._state_at_s = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()
