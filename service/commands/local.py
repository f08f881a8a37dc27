"""A model in this process, answering as the client does: the same chunks, summary and errors."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

from gptjet.service.commands.loading import load_model
from gptjet.service.commands.sampling import flag_of
from gptjet.service.commands.terminal import ExitCode, fail
from gptjet.service.engine.errors import BackendLoadError, InvalidRequestError
from gptjet.service.engine.request import FinishReason, RequestOutput, SamplingParams, new_request

if TYPE_CHECKING:
    from gptjet.service import client
    from gptjet.service.config import ServerConfig
    from gptjet.service.engine.engine import Engine
    from gptjet.service.engine.request import RequestSummary

Event: TypeAlias = "client.TokenChunk | client.GenerationSummary"


class LocalModel:
    """Loads what the settings name and runs one request at a time, in the caller's thread."""

    def __init__(self, config: ServerConfig) -> None:
        """Ends the command where the model cannot be loaded."""
        self._engine = _load(config)

    @property
    def engine(self) -> Engine:
        """What runs it; for the caller's thread alone."""
        return self._engine

    def stream(
        self,
        prompt: str | tuple[int, ...],
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float,
    ) -> Generator[Event]:
        """Chunks as they come, then the summary. Closing the iterator stops the request.

        Ends the command where the request cannot be served, fails, or takes over `timeout_s`.
        """
        engine, now_ns = self._engine, time.monotonic_ns()
        # As in the server: no prompt stays none, even where the model has a start token.
        ids = prompt
        if isinstance(ids, str):
            ids = tuple(engine.tokenizer.encode(ids)) if ids else ()
        request = new_request(
            ids,
            params,
            request_id=request_id,
            arrival_ns=now_ns,
            deadline_ns=None if math.isinf(timeout_s) else now_ns + int(timeout_s * 1e9),
        )
        try:
            key = engine.add(request)
        except InvalidRequestError as error:
            lines = [f"{flag_of(v.field)}: {v.description}" for v in error.violations]
            fail("\n".join(lines), ExitCode.USAGE)
        try:
            while engine.has_work:
                for _, output in engine.step():
                    yield from _events(output, timeout_s)
        finally:
            engine.cancel(key)

    def close(self) -> None:
        """Give the device's memory back."""
        self._engine.backend.close()


def _load(config: ServerConfig) -> Engine:
    from gptjet.service.engine.engine import Engine

    try:
        loaded = load_model(config)
        loaded.backend.warm_up()
    except BackendLoadError as error:
        fail(str(error), ExitCode.USAGE)
    return Engine(loaded.backend, loaded.tokenizer, config.engine)


def _events(output: RequestOutput, timeout_s: float) -> Iterator[Event]:
    from gptjet.service import client

    if output.error is not None:
        fail(str(output.error), ExitCode.FAILURE)
    if output.finish_reason is FinishReason.DEADLINE:
        fail(f"timed out after {timeout_s:g} s (--timeout)", ExitCode.TIMEOUT)
    if output.text or output.token_ids:
        yield client.TokenChunk(
            index=output.index,
            text=output.text,
            token_ids=output.token_ids,
            logprobs=tuple(
                client.TokenLogprob(item.token_id, item.logprob, item.top)
                for item in output.logprobs
            ),
            is_prompt=output.is_prompt,
        )
    if output.summary is not None:
        yield _summary(output.summary)


def _summary(summary: RequestSummary) -> client.GenerationSummary:
    """The client's types have the engine's fields; a test holds them to that."""
    from gptjet.service import client

    speculation = summary.speculation
    return client.GenerationSummary(
        request_id=summary.request_id,
        finish_reason=client.FinishReason(summary.finish_reason.value),
        prompt_tokens=summary.prompt_tokens,
        completion_tokens=summary.completion_tokens,
        timings=client.Timings(**asdict(summary.timings)),
        sequences=tuple(
            client.SequenceSummary(
                **asdict(sequence)
                | {"finish_reason": client.FinishReason(sequence.finish_reason.value)}
            )
            for sequence in summary.sequences
        ),
        seed=summary.seed,
        cached_prompt_tokens=summary.cached_prompt_tokens,
        speculation=None if speculation is None else client.Speculation(**asdict(speculation)),
    )
