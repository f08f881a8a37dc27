"""Requests and outputs through the server's policy: which fields of which message are texts.

Everything a caller can write and a response can repeat is judged: prompts and candidates (token ids
as the text they stand for), stop strings, the request's id; and of an output the text, token ids,
log-probabilities with their alternatives, the echoed prompt and the stop string that matched.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gptjet.service.config import ServerConfig
from gptjet.service.engine.errors import EngineUnavailableError
from gptjet.service.engine.request import (
    MAX_REQUEST_ID_LENGTH,
    MAX_STOP_STRING_LENGTH,
    Request,
    RequestOutput,
    RequestSummary,
    SamplingParams,
    TokenLogprob,
)
from gptjet.service.governance.governance import (
    BlockedError,
    FieldText,
    Governance,
    GovernanceSettings,
    OutputPolicy,
)
from gptjet.service.governance.policy_file import Direction
from gptjet.service.governance.recorder import RecordError
from gptjet.service.rpc.status import PolicyBlockedError
from gptjet.service.rpc.text import TextCodec

if TYPE_CHECKING:
    from gptjet.service.engine.async_engine import AsyncEngine
    from gptjet.service.engine.score import ScoreRequest

_RETRY_AFTER_S = 5.0


def open_governance(config: ServerConfig) -> Governance | None:
    """What the settings ask for, started; None where no policy is set. Raises GovernanceError."""
    if config.governance_policy is None:
        return None
    assert config.governance_dir is not None
    governance = Governance(
        GovernanceSettings(
            policy=config.governance_policy,
            folder=config.governance_dir,
            fail_open=config.governance_fail_open,
            excerpts=config.governance_excerpts,
            audit_max_bytes=config.governance_audit_max_bytes,
            audit_files=config.governance_audit_files,
            audit_fsync=config.governance_audit_fsync,
            timeout_s=config.governance_timeout_s,
        )
    )
    governance.start()
    return governance


class GovernedCall:
    """One RPC under a policy. Methods raise PolicyBlockedError, or EngineUnavailableError where a
    decision cannot be written down.
    """

    def __init__(
        self,
        governance: Governance,
        engine: AsyncEngine,
        codec: TextCodec,
        *,
        method: str,
        request_id: str = "",
    ) -> None:
        self._governance = governance
        self._engine = engine
        self._codec = codec
        self._method = method
        self.request_id = request_id or uuid.uuid4().hex
        self._given_id = request_id

    async def judge(self, texts: Sequence[FieldText], direction: Direction) -> list[str]:
        """The texts as they may go on."""
        try:
            return await self._governance.judge(
                texts, direction, request_id=self._id_to_log(), method=self._method
            )
        except BlockedError as error:
            raise _blocked(error) from error
        except RecordError as error:
            raise _not_recorded(error) from error

    async def text(self, field: str, text: str, direction: Direction = "input") -> str:
        """One text, as it may go on."""
        (judged,) = await self.judge([FieldText(field, text)], direction)
        return judged

    async def prompt(
        self, text: str | None, token_ids: tuple[int, ...], params: SamplingParams
    ) -> tuple[str, tuple[int, ...]]:
        """Judge a generation request; its prompt as text and as ids, rewritten where redacted.

        text  None for a prompt that was given as ids
        """
        original = await self._text_of(token_ids) if text is None else text
        texts = [FieldText("prompt", original), *self._request_id_field()]
        texts += [
            FieldText(f"sampling_params.stop[{index}]", stop, rewritable=False)
            for index, stop in enumerate(params.stop)
            if len(stop) <= MAX_STOP_STRING_LENGTH  # the engine refuses a longer one
        ]
        judged, *_ = await self.judge(texts, "input")
        if judged != original:
            token_ids = await self._codec.encode_prompt(judged)
        return judged, token_ids

    async def score_request(self, request: ScoreRequest) -> ScoreRequest:
        """Judge a score request; its ids of what is redacted are those of the redacted text."""
        prompt = await self._text_of(request.prompt_token_ids)
        fields = [FieldText("prompt", prompt)]
        for index, ids in enumerate(request.candidates):
            text = await self._text_of(ids)
            fields.append(FieldText(f"candidates[{index}]", text, context=prompt))
        if request.calibration_token_ids is not None:
            text = await self._text_of(request.calibration_token_ids)
            fields.append(FieldText("calibration_prompt", text))
        judged = await self.judge([*fields, *self._request_id_field()], "input")
        all_ids = [request.prompt_token_ids, *request.candidates]
        if request.calibration_token_ids is not None:
            all_ids.append(request.calibration_token_ids)
        for index, (field, ids) in enumerate(zip(fields, all_ids, strict=True)):
            if judged[index] != field.text:
                ids = await self._codec.encode_prompt(judged[index])
            all_ids[index] = ids
        count = len(request.candidates)
        return replace(
            request,
            prompt_token_ids=all_ids[0],
            candidates=tuple(all_ids[1 : 1 + count]),
            calibration_token_ids=(
                None if request.calibration_token_ids is None else all_ids[1 + count]
            ),
        )

    def output(self, request: Request, prompt: str) -> GovernedOutput | None:
        """What clears the outputs of an accepted request; None where no rule is about them."""
        policy = self._governance.output(
            self._engine.tokenizer.token_bytes,
            request_id=self._id_to_log(),
            method=self._method,
            context="" if request.sampling_params.echo else prompt,
        )
        return (
            None if policy is None else GovernedOutput(policy, self._engine.tokenizer.token_bytes)
        )

    async def _text_of(self, token_ids: Sequence[int]) -> str:
        """The text of ids; those outside the vocabulary are the engine's to refuse."""
        vocab_size = self._engine.spec.vocab_size
        known = [token_id for token_id in token_ids if 0 <= token_id < vocab_size]
        return await self._codec.detokenize(known, vocab_size)

    def _request_id_field(self) -> list[FieldText]:
        if not self._given_id or len(self._given_id) > MAX_REQUEST_ID_LENGTH:
            return []  # a longer one is refused by the engine
        return [FieldText("request_id", self._given_id, rewritable=False, patterns_only=True)]

    def _id_to_log(self) -> str:
        """A caller's id can be as long as a message may be, until the engine refuses it."""
        return self.request_id[:MAX_REQUEST_ID_LENGTH]


class GovernedOutput:
    """The outputs of one request, step by step."""

    def __init__(self, policy: OutputPolicy, token_bytes: Callable[[int], bytes | None]) -> None:
        self._policy = policy
        self._token_bytes = token_bytes

    async def clear(self, output: RequestOutput) -> tuple[RequestOutput, PolicyBlockedError | None]:
        """What may leave of a step, and what ends the request after it, if something does.

        Raises EngineUnavailableError where the decision cannot be written down.
        """
        try:
            cleared = await self._policy.push(
                output.index,
                output.text,
                output.token_ids,
                output.logprobs,
                is_prompt=output.is_prompt,
                final=output.finish_reason is not None,
            )
        except RecordError as error:
            raise _not_recorded(error) from error
        blocked = self._policy.blocked(output.index)
        judged = replace(
            output,
            text=cleared.text,
            token_ids=cleared.token_ids,
            logprobs=tuple(self._without_forbidden(logprob) for logprob in cleared.logprobs),
            summary=self._summary(output.summary),
        )
        return judged, None if blocked is None else _blocked(blocked)

    def close(self) -> None:
        """The request has ended, perhaps early."""
        self._policy.close()

    def _without_forbidden(self, logprob: TokenLogprob) -> TokenLogprob:
        """Leave out likely tokens that say by themselves what must not be said."""
        if not logprob.top:
            return logprob
        top = tuple(pair for pair in logprob.top if not self._forbids(pair[0]))
        return logprob if len(top) == len(logprob.top) else replace(logprob, top=top)

    def _forbids(self, token_id: int) -> bool:
        piece = self._token_bytes(token_id)
        return piece is not None and self._policy.forbids(piece.decode(errors="replace"))

    def _summary(self, summary: RequestSummary | None) -> RequestSummary | None:
        """The stop string that matched is text of the output."""
        if summary is None or not any(
            isinstance(s.stop_match, str) and self._policy.forbids(s.stop_match)
            for s in summary.sequences
        ):
            return summary
        sequences = tuple(
            replace(s, stop_match=None)
            if isinstance(s.stop_match, str) and self._policy.forbids(s.stop_match)
            else s
            for s in summary.sequences
        )
        return replace(summary, sequences=sequences)


def _blocked(error: BlockedError) -> PolicyBlockedError:
    return PolicyBlockedError(str(error), error.rule, error.direction, error.field)


def _not_recorded(error: RecordError) -> EngineUnavailableError:
    return EngineUnavailableError(
        f"the policy's decision cannot be recorded ({error}); it is refused unless "
        "governance_fail_open is on",
        _RETRY_AFTER_S,
    )
