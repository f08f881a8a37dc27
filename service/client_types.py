"""What the client takes, gives and raises: plain data, the words of the wire contract."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

if TYPE_CHECKING:
    import grpc

Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids of the served model."""


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen; SamplingParams in text_generation.proto says what each one does.

    What is absent or None has the server's default. A `stop` that is one string is one stop string.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    echo: bool | None
    logit_bias: Mapping[int, float] | None
    prompt_lookup_tokens: int | None


class FinishReason(enum.StrEnum):
    """Why a sequence stopped. UNSPECIFIED: a reason this client is too old to know."""

    UNSPECIFIED = "unspecified"
    LENGTH = "length"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class HealthStatus(enum.StrEnum):
    """What grpc.health.v1 says of a service."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    SERVICE_UNKNOWN = "service_unknown"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability; `top` holds (id, logprob) of the likeliest, best first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """What one step added to one sequence. `text` is the delta; it can be empty."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    is_prompt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a request's time went, in ms, on the server's clock."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    e2e_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSummary:
    """How one sequence ended. `stop_match` is the stop string or stop id that matched."""

    index: int
    finish_reason: FinishReason
    completion_tokens: int
    stop_match: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What `prompt_lookup_tokens` brought: guesses, those that were right, steps that were taken.

    Every guess that was right saved a decode step.
    """

    drafted_tokens: int
    accepted_tokens: int
    decode_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSummary:
    """The end of a request. `finish_reason` is that of the sequence with index 0.

    `cached_prompt_tokens` are those the server had not to compute again; `speculation` is None
    where none was asked for or the backend cannot verify guesses.
    """

    request_id: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timings: Timings
    sequences: tuple[SequenceSummary, ...]
    seed: int
    cached_prompt_tokens: int = 0
    speculation: Speculation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSequence:
    """One finished sequence, the prompt included where `echo` asked for it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The answer of `generate`: n sequences and how they ended."""

    sequences: tuple[GeneratedSequence, ...]
    summary: GenerationSummary

    @property
    def text(self) -> str:
        """Of the sequence with index 0."""
        return self.sequences[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the sequence with index 0."""
        return self.sequences[0].token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """How likely the model finds one candidate. Natural logarithms.

    logprob              sum over the candidate's tokens
    probability          its share among all candidates of the call, calibrated where asked for
    calibration_logprob  its log-probability after the calibration prompt
    """

    index: int
    logprob: float
    tokens: tuple[TokenLogprob, ...]
    probability: float
    calibration_logprob: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """The answer of `score`, in the order of its candidates.

    `prompt_tokens` counts the prompt, without a calibration prompt; `candidate_tokens` counts all
    candidates, each once.
    """

    request_id: str
    scores: tuple[CandidateScore, ...]
    prompt_tokens: int
    candidate_tokens: int
    timings: Timings

    @property
    def best(self) -> int:
        """Index of the most probable candidate; of equal ones the first."""
        return max(self.scores, key=lambda score: score.probability).index


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A text's ids and the piece of text of each."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityVerdict:
    """What the server's self-check at load found. `status`: not_run, passed, failed."""

    status: str
    max_relative_error: float
    tokens_compared: int
    tokens_agreed: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is being served, and its limits. While the model loads, what is not known is empty or 0.

    The fields are GetModelResponse's.
    """

    name: str
    architecture: str
    backend: str
    device: str
    dtype: str
    num_parameters: int
    vocab_size: int
    max_context: int
    max_sequences: int
    max_batch_size: int
    block_size: int
    num_kv_blocks: int
    max_queue_size: int
    max_n: int
    eos_token_id: int | None
    server_version: str
    parity: ParityVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """How to reach a server with TLS; PEM files, or their contents as bytes.

    root_ca      roots to trust (None: those gRPC ships with)
    client_cert  with client_key: for a server that asks callers for a certificate
    server_name  the name to expect in the server's certificate, where it is not the target's
    """

    root_ca: Path | bytes | None = None
    client_cert: Path | bytes | None = None
    client_key: Path | bytes | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Retries on UNAVAILABLE, done by gRPC itself, before anything has been received.

    Between tries gRPC waits a random part of a backoff that grows by `multiplier` from
    `initial_backoff_s` to `max_backoff_s`, or exactly as long as the server says (RetryInfo).
    gRPC makes at most 5 attempts.
    """

    max_attempts: int = 5
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if not 2 <= self.max_attempts <= 5:
            raise ValueError(f"max_attempts must be 2 to 5, got {self.max_attempts}")
        # gRPC 1.85 waits for ever where a backoff comes out below a millisecond.
        if not 0.01 <= self.initial_backoff_s <= self.max_backoff_s:
            raise ValueError("initial_backoff_s must be at least 0.01 and at most max_backoff_s")
        if self.multiplier < 1:
            raise ValueError(f"multiplier must be 1 or more, got {self.multiplier}")


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is out of its limits; `field` is its path in the message."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


@dataclass(eq=False)
class GptjetError(Exception):
    """A call failed. `retry_after_s` is set where the server said when to come back."""

    code: grpc.StatusCode
    message: str
    violations: tuple[FieldViolation, ...] = field(default=())
    retry_after_s: float | None = field(default=None)

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class InvalidRequestError(GptjetError):
    """The request can never be served as it stands; `violations` names the fields."""


class ResourceExhaustedError(GptjetError):
    """A limit was hit: a message is too large, or see QueueFullError and QuotaExceededError."""


class QueueFullError(ResourceExhaustedError):
    """Too many requests wait; come back after `retry_after_s`."""


class QuotaExceededError(ResourceExhaustedError):
    """The token has used up a quota; come back after `retry_after_s`, or never where it is None."""


class UnauthenticatedError(GptjetError):
    """The server wants a bearer token, or does not take this one."""


class PermissionDeniedError(GptjetError):
    """The token is good, but not for this."""


class PlaintextTokenError(ValueError):
    """A token would leave this machine without TLS, for whoever listens in between to use."""

    def __init__(self, target: str) -> None:
        super().__init__(
            f"the token is not sent in plain text to {target}: "
            "use TLS, or allow_plaintext_token=True"
        )


class UnavailableError(GptjetError):
    """Nobody serves there now: unreachable, loading or draining."""


class DeadlineExceededError(GptjetError):
    """The call's `timeout_s` passed."""


class CancelledError(GptjetError):
    """The call was cancelled, by this client or on the way."""


class PolicyBlockedError(GptjetError):
    """The server's policy does not let the request or its output pass; the message names the rule.

    What a stream has given out before stands.
    """


class InternalError(GptjetError):
    """The server failed; its log has more under the error id in the message."""
