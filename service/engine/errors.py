"""What can go wrong with a request, as the engine's callers see it.

`gptjet.service.rpc.status` maps each class to one gRPC status; nothing else may.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is out of its limits.

    `field` is the path in the wire message ("sampling_params.top_p"), `description` says what was
    given and what the limit is.
    """

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class EngineError(Exception):
    """Base of every error below."""


class InvalidRequestError(EngineError):
    """The request can never be served as it stands; `violations` names every bad field."""

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(str(violation) for violation in violations))
        self.violations = violations


class QueueFullError(EngineError):
    """The waiting queue is at its bound; try again after `retry_after_s` seconds."""

    def __init__(self, max_queue_size: int, retry_after_s: float) -> None:
        super().__init__(
            f"the queue is full: {max_queue_size} requests are waiting (max_queue_size); "
            f"try again in {retry_after_s:.1f} s"
        )
        self.max_queue_size = max_queue_size
        self.retry_after_s = retry_after_s


class EngineUnavailableError(EngineError):
    """The engine takes no new requests: it is still loading, draining or stopped."""

    def __init__(self, reason: str, retry_after_s: float = 1.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class EngineStepError(EngineError):
    """A step failed; `error_id` is in the log beside the traceback."""

    def __init__(self, error_id: str, detail: str) -> None:
        super().__init__(f"the engine failed in a step (error id {error_id}): {detail}")
        self.error_id = error_id


class OutOfMemoryError(EngineStepError):
    """What the request needed at once did not fit the device's memory, even computed alone."""

    def __init__(self, error_id: str, detail: str) -> None:
        super().__init__(error_id, detail)
        self.args = (
            f"the device ran out of memory for this request (error id {error_id}): {detail}; "
            "a shorter prompt or fewer sequences may fit",
        )


class QueueTimeError(EngineError):
    """The request waited longer than a caller can be kept waiting; nothing of it has run."""

    def __init__(self, max_queue_time_s: float, retry_after_s: float) -> None:
        super().__init__(
            f"the request waited {max_queue_time_s:g} s without its turn (max_queue_time_s); "
            f"try again in {retry_after_s:.1f} s"
        )
        self.retry_after_s = retry_after_s


class TokensInFlightError(EngineError):
    """What is queued and running may become more tokens than the server takes on at once."""

    def __init__(self, wanted: int, in_flight: int, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"the request may become {wanted} tokens and {in_flight} are in flight, of "
            f"{limit} (max_tokens_in_flight); try again in {retry_after_s:.1f} s"
        )
        self.retry_after_s = retry_after_s


class SlowReaderError(EngineError):
    """The caller does not read its stream; `limit` says which bound that passed."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"the caller does not read its stream: {limit}")


class BackendLoadError(EngineError):
    """The model, the machine or a setting does not allow this backend; the message is one line
    for a person and `serve` exits with code 2 on it."""
