"""What the page is sent while an answer is made: server-sent events with a JSON object each."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
from sse_starlette import ServerSentEvent

from gptjet.service.apps.sentiment.pipeline import ServerGoneError
from gptjet.service.apps.sentiment.result import (
    ExplanationDelta,
    Finished,
    Scored,
    SentimentResult,
    TextError,
)
from gptjet.service.apps.sentiment.template import TemplateError
from gptjet.service.apps.sentiment.web.errors import PageError
from gptjet.service.apps.sentiment.web.source import Classifier
from gptjet.service.client import (
    DeadlineExceededError,
    GptjetError,
    InvalidRequestError,
    PermissionDeniedError,
    PolicyBlockedError,
    QueueFullError,
    QuotaExceededError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)

# What a classifier raises for reasons of its own; everything else is a bug and is logged as one.
KNOWN_ERRORS = (GptjetError, ServerGoneError, TextError, TemplateError)


def sse(name: str, fields: dict[str, Any]) -> ServerSentEvent:
    """One event; JSON has no line breaks of its own, so it is one `data:` line."""
    return ServerSentEvent(data=json.dumps(fields), event=name, sep="\n")


def result_fields(result: SentimentResult) -> dict[str, Any]:
    """A result as the page reads it. Places of highlights count characters (code points)."""
    return result.as_json()


async def answer_events(
    classifier: Classifier, text: str, seed: int
) -> AsyncGenerator[ServerSentEvent]:
    """`scored`, `explanation` (a delta) ..., `result`. Raises what the classifier raises.

    Closing it, as a visitor who leaves does, closes the classifier's stream and so cancels the RPC.
    """
    async with aclosing(classifier.stream(text, seed=seed)) as events:
        async for event in events:
            match event:
                case Scored():
                    yield sse(
                        "scored",
                        {
                            "label": event.label,
                            "probabilities": event.probabilities,
                            "uncertain_reason": event.uncertain_reason,
                            "num_parts": event.num_parts,
                        },
                    )
                case ExplanationDelta():
                    yield sse("explanation", {"text": event.text})
                case Finished():
                    yield sse("result", result_fields(event.result))


def problem_of(error: Exception) -> PageError:
    """A classifier's error in words for a person; gRPC's own words have addresses in them."""
    match error:
        case PageError():
            return error
        case TextError():
            return PageError(400, "invalid", str(error))
        case TemplateError():
            return PageError(400, "template", str(error))
        case InvalidRequestError():
            reasons = "; ".join(map(str, error.violations)) or error.message
            return PageError(400, "invalid", f"the model server refused the text: {reasons}")
        case QueueFullError():
            return PageError(
                503,
                "busy",
                "the model server is busy: too many requests are waiting",
                retry_after_s=error.retry_after_s or 1.0,
            )
        case QuotaExceededError():
            return PageError(
                503,
                "quota",
                "the quota of this page at the model server is used up",
                retry_after_s=error.retry_after_s,
            )
        case ResourceExhaustedError():
            return PageError(413, "too_long", "the text is too long for the model server")
        case UnavailableError() if error.retry_after_s is not None:
            return PageError(
                503,
                "loading",
                "the model server is not ready: it is loading its model, or stopping",
                retry_after_s=error.retry_after_s,
            )
        case UnavailableError():
            return PageError(503, "gone", "the model server does not answer", retry_after_s=2.0)
        case DeadlineExceededError():
            return PageError(504, "timeout", "the model server took too long and was stopped")
        case GptjetError() if error.code is grpc.StatusCode.UNIMPLEMENTED:
            return PageError(
                502, "unsupported", "the model server cannot score labels (no Score RPC)"
            )
        case PolicyBlockedError():
            return PageError(
                403, "blocked", f"the model server's policy does not let this pass: {error.message}"
            )
        case UnauthenticatedError() | PermissionDeniedError():
            return PageError(
                502,
                "no_access",
                "the model server does not let this page in: its token is missing or not good",
            )
        case ServerGoneError():
            return PageError(502, "failed", str(error))
        case _:
            return PageError(502, "failed", "the model server failed; its log has the reason")
