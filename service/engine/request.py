"""What a caller asks for and what one step gives back: plain data that imports nothing heavy."""

from __future__ import annotations

import enum
import math
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gptjet.service.engine.errors import FieldViolation, InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_REQUEST_ID_LENGTH = 128
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_PROMPT_LOOKUP_TOKENS = 16
_SEED_LIMIT = 2**64


class FinishReason(enum.StrEnum):
    """Why a sequence stopped."""

    LENGTH = "length"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; the wire message of the same name says what each field does.

    `seed=None` means the engine draws one. Construction never raises: `violations` lists what is
    out of bounds, so that a caller hears of every bad field at once.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    echo: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    prompt_lookup_tokens: int = 0

    @property
    def is_greedy(self) -> bool:
        """Temperature 0: the likeliest token, no randomness."""
        return self.temperature == 0.0

    def violations(
        self, *, vocab_size: int, max_n: int, prefix: str = "sampling_params."
    ) -> Iterator[FieldViolation]:
        """Yield every field that is out of its limits for a model of `vocab_size` ids."""

        def bad(name: str, limit: str, value: object) -> FieldViolation:
            return FieldViolation(prefix + name, f"must be {limit}, got {value}")

        if self.max_new_tokens < 1:
            yield bad("max_new_tokens", "1 or more", self.max_new_tokens)
        if not 0 <= self.min_new_tokens <= max(self.max_new_tokens, 0):
            yield bad(
                "min_new_tokens",
                f"0 to max_new_tokens ({self.max_new_tokens})",
                self.min_new_tokens,
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            yield bad("temperature", "a finite number, 0 or more", self.temperature)
        if self.top_k < 0:
            yield bad("top_k", "0 (off) or more", self.top_k)
        if not 0 < self.top_p <= 1:
            yield bad("top_p", "in (0, 1]", self.top_p)
        if not 0 <= self.min_p <= 1:
            yield bad("min_p", "in [0, 1]", self.min_p)
        if not 0 < self.typical_p <= 1:
            yield bad("typical_p", "in (0, 1]", self.typical_p)
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            yield bad("repetition_penalty", "a finite number above 0", self.repetition_penalty)
        if not -2 <= self.presence_penalty <= 2:
            yield bad("presence_penalty", "in [-2, 2]", self.presence_penalty)
        if not -2 <= self.frequency_penalty <= 2:
            yield bad("frequency_penalty", "in [-2, 2]", self.frequency_penalty)
        if self.no_repeat_ngram_size < 0:
            yield bad("no_repeat_ngram_size", "0 (off) or more", self.no_repeat_ngram_size)
        if self.seed is not None and not 0 <= self.seed < _SEED_LIMIT:
            yield bad("seed", "in [0, 2**64)", self.seed)
        if not 1 <= self.n <= max_n:
            yield bad("n", f"1 to {max_n} (max_n)", self.n)
        if len(self.stop) > MAX_STOP_STRINGS:
            yield bad("stop", f"at most {MAX_STOP_STRINGS} strings", len(self.stop))
        for position, text in enumerate(self.stop):
            if not text:
                yield FieldViolation(f"{prefix}stop[{position}]", "must not be empty")
            elif len(text) > MAX_STOP_STRING_LENGTH:
                yield bad(
                    f"stop[{position}]", f"at most {MAX_STOP_STRING_LENGTH} characters", len(text)
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            yield bad(
                "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids", len(self.stop_token_ids)
            )
        for position, token_id in enumerate(self.stop_token_ids):
            if not 0 <= token_id < vocab_size:
                yield bad(
                    f"stop_token_ids[{position}]", f"below the vocabulary of {vocab_size}", token_id
                )
        if self.logprobs is not None and not 0 <= self.logprobs <= min(MAX_LOGPROBS, vocab_size):
            yield bad("logprobs", f"0 to {min(MAX_LOGPROBS, vocab_size)}", self.logprobs)
        if not 0 <= self.prompt_lookup_tokens <= MAX_PROMPT_LOOKUP_TOKENS:
            yield bad(
                "prompt_lookup_tokens",
                f"0 (off) to {MAX_PROMPT_LOOKUP_TOKENS}",
                self.prompt_lookup_tokens,
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS_ENTRIES:
            yield bad("logit_bias", f"at most {MAX_LOGIT_BIAS_ENTRIES} ids", len(self.logit_bias))
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id < vocab_size:
                yield bad(
                    f"logit_bias[{token_id}]",
                    f"an id below the vocabulary of {vocab_size}",
                    token_id,
                )
            if not -100 <= bias <= 100:
                yield bad(f"logit_bias[{token_id}]", "in [-100, 100]", bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted call: a prompt and how to continue it.

    `sampling_params.seed` is always set here. Times are `time.monotonic_ns()`. `trace` is a
    RequestObserver's; the engine never looks at it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    arrival_ns: int
    deadline_ns: int | None = None
    trace: object = field(default=None, compare=False, repr=False)

    @property
    def seed(self) -> int:
        """The seed in use, drawn by the server where the caller gave none."""
        seed = self.sampling_params.seed
        assert seed is not None, "new_request sets it"
        return seed

    @property
    def max_tokens(self) -> int:
        """Most tokens one sequence of this request can reach, prompt included."""
        return len(self.prompt_token_ids) + self.sampling_params.max_new_tokens


def new_request(
    prompt_token_ids: tuple[int, ...],
    sampling_params: SamplingParams | None = None,
    *,
    request_id: str = "",
    arrival_ns: int | None = None,
    deadline_ns: int | None = None,
    trace: object = None,
) -> Request:
    """Build a Request, drawing the id, the seed and the arrival time where they are not given."""
    params = sampling_params or SamplingParams()
    if params.seed is None:
        params = replace(params, seed=secrets.randbits(63))
    return Request(
        request_id=request_id or uuid.uuid4().hex,
        prompt_token_ids=prompt_token_ids,
        sampling_params=params,
        arrival_ns=time.monotonic_ns() if arrival_ns is None else arrival_ns,
        deadline_ns=deadline_ns,
        trace=trace,
    )


def validate_request(request: Request, *, vocab_size: int, max_context: int, max_n: int) -> None:
    """Raise InvalidRequestError naming every field out of its limits for this model.

    `max_context` is the most tokens of prompt and output together.
    """
    violations: list[FieldViolation] = []
    if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
        violations.append(
            FieldViolation(
                "request_id",
                f"must be at most {MAX_REQUEST_ID_LENGTH} characters, "
                f"got {len(request.request_id)}",
            )
        )
    prompt_tokens = len(request.prompt_token_ids)
    if prompt_tokens == 0:
        violations.append(FieldViolation("prompt", "must hold at least one token, got none"))
    for position, token_id in enumerate(request.prompt_token_ids):
        if not 0 <= token_id < vocab_size:
            violations.append(
                FieldViolation(
                    f"token_ids.ids[{position}]",
                    f"must be below the vocabulary of {vocab_size}, got {token_id}",
                )
            )
            break  # one is enough: a prompt for another model has thousands
    params = request.sampling_params
    violations.extend(params.violations(vocab_size=vocab_size, max_n=max_n))
    if prompt_tokens >= max_context:
        violations.append(
            FieldViolation(
                "prompt",
                f"must leave room for one token in the context of {max_context}, "
                f"got {prompt_tokens} tokens",
            )
        )
    elif params.max_new_tokens >= 1 and request.max_tokens > max_context:
        violations.append(
            FieldViolation(
                "sampling_params.max_new_tokens",
                f"prompt ({prompt_tokens}) + max_new_tokens ({params.max_new_tokens}) must be at "
                f"most the context of {max_context}: at most {max_context - prompt_tokens} here",
            )
        )
    if violations:
        raise InvalidRequestError(*violations)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the model's unmodified distribution.

    `logprob` is None for the first token of an echoed prompt; `top` holds (id, logprob) pairs, best
    first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a request's time went, in ms; the wire message of the same name says what each is."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    ttft_ms: float = 0.0
    e2e_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSummary:
    """How one sequence ended. `stop_match` is the stop string or stop id that matched."""

    index: int
    finish_reason: FinishReason
    completion_tokens: int
    stop_match: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What guessing tokens brought; the wire message of the same name says what each field is."""

    drafted_tokens: int
    accepted_tokens: int
    decode_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """The end of a request, over all its sequences.

    `cached_prompt_tokens` are those the prefix cache had; `speculation` is None where none was
    asked for or the backend cannot verify guesses.
    """

    request_id: str
    prompt_tokens: int
    completion_tokens: int
    timings: Timings
    sequences: tuple[SequenceSummary, ...]
    seed: int
    cached_prompt_tokens: int = 0
    speculation: Speculation | None = None

    @property
    def finish_reason(self) -> FinishReason:
        """Of the sequence with index 0."""
        return self.sequences[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step added to one sequence of a request.

    `text` is the delta that is now certain and can be empty while `token_ids` is not.
    `is_prompt` marks an echoed prompt. `finish_reason` is set on the sequence's last output;
    `summary` on the request's last one. `error` goes with FinishReason.ERROR.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    is_prompt: bool = False
    finish_reason: FinishReason | None = None
    summary: RequestSummary | None = None
    error: Exception | None = None
