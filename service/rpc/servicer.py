"""gptjet.v1.TextGeneration on top of an AsyncEngine.

It converts, tokenizes and passes on; what the model allows is the engine's to check. Errors are
raised as the engine's own and become statuses in the interceptor.
"""

from __future__ import annotations

import asyncio
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeAlias

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.config import ServerConfig
from gptjet.service.engine.async_engine import AsyncEngine
from gptjet.service.engine.errors import EngineUnavailableError
from gptjet.service.engine.request import FinishReason, RequestOutput, new_request
from gptjet.service.engine.request_stream import RequestStream
from gptjet.service.governance.governance import Governance
from gptjet.service.rpc import convert
from gptjet.service.rpc.access import quota
from gptjet.service.rpc.governed import GovernedCall, GovernedOutput
from gptjet.service.rpc.interceptors import RequestRecord, current_record
from gptjet.service.rpc.patience import PatientWriter
from gptjet.service.rpc.score_request import bounded_ids, score_request_from_pb
from gptjet.service.rpc.status import DeadlineExceededError, PolicyBlockedError
from gptjet.service.rpc.text import TextCodec
from gptjet.service.rpc.watch import RpcWatch

if TYPE_CHECKING:
    import grpc

_SERVICE = pb.DESCRIPTOR.services_by_name["TextGeneration"]
SERVICE_NAME: str = _SERVICE.full_name
METHOD_NAMES: tuple[str, ...] = tuple(method.name for method in _SERVICE.methods)

_LOADING_RETRY_S = 2.0
_DRAINING_RETRY_S = 1.0
# gRPC's class is generic in its stub only.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class TextGenerationServicer(pb_grpc.TextGenerationServicer):
    """Refuses with UNAVAILABLE until `attach` and from `refuse` on; GetModel always answers."""

    def __init__(self, config: ServerConfig, watch: RpcWatch) -> None:
        self._config = config
        self._watch = watch
        self._version = server_version()
        self._engine: AsyncEngine | None = None
        self._codec: TextCodec | None = None
        self._governance: Governance | None = None
        self._refusal: tuple[str, float] | None = ("the model is loading", _LOADING_RETRY_S)

    def attach(self, engine: AsyncEngine, codec: TextCodec) -> None:
        """Serve requests with a started engine."""
        self._engine, self._codec, self._refusal = engine, codec, None

    def govern(self, governance: Governance) -> None:
        """Judge every text that comes and goes by its policy."""
        self._governance = governance

    def refuse(self, reason: str) -> None:
        """Answer every new request with UNAVAILABLE."""
        self._refusal = (reason, _DRAINING_RETRY_S)

    async def Generate(  # noqa: N802 - the names are gRPC's
        self, request: pb.GenerateRequest, _context: _Context
    ) -> pb.GenerateResponse:
        """One answer at the end."""
        stream, governed = await self._submit(request)
        response = pb.GenerateResponse()
        texts: list[list[str]] = []
        for index in range(stream.request.sampling_params.n):
            response.sequences.add(index=index)
            texts.append([])
        record = current_record()
        try:
            async for output in stream:
                _observe(output, record)
                if governed is not None:
                    output, blocked = await governed.clear(output)
                    _raise_if_blocked(blocked, record)
                convert.append_output(response.sequences[output.index], texts[output.index], output)
                if output.summary is not None:
                    response.summary.CopyFrom(convert.summary_to_pb(output.summary))
        finally:
            _leave(stream, record, governed)
        for sequence, parts in zip(response.sequences, texts, strict=True):
            sequence.text = "".join(parts)
        return response

    # A coroutine that writes instead of the generator that the base class has: see interceptors.
    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: _Context
    ) -> None:
        """One message a step and sequence, then the summary."""
        stream, governed = await self._submit(request)
        writer = PatientWriter(context, stream, self._config)
        record = current_record()
        try:
            async for output in stream:
                _observe(output, record)
                blocked = None
                if governed is not None:
                    output, blocked = await governed.clear(output)
                if output.text or output.token_ids:
                    chunk = convert.chunk_to_pb(output)
                    await writer.write(pb.GenerateStreamResponse(chunk=chunk))
                _raise_if_blocked(blocked, record)
                if output.summary is not None:
                    summary = convert.summary_to_pb(output.summary)
                    await writer.write(pb.GenerateStreamResponse(summary=summary))
        finally:
            _leave(stream, record, governed)

    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, _context: _Context
    ) -> pb.ScoreResponse:
        """Candidates' log-probabilities; one answer at the end."""
        record = current_record()
        engine, codec = self._ready()
        domain = await score_request_from_pb(
            request,
            codec,
            engine.spec.max_context,
            request_id=request.request_id or record.request_id or "",
            arrival_ns=record.started_ns,
            deadline_ns=record.deadline_ns,
            trace=record.trace,
        )
        call_policy = self._governed(engine, codec, domain.request_id)
        if call_policy is not None:
            domain = await call_policy.score_request(domain)
        if self._config.log_prompts:
            # What a rule may have taken out stays out of the log, too.
            given = request.text if call_policy is None else ""
            record.prompt = given or str(list(domain.prompt_token_ids))
        record.prompt_tokens = len(domain.prompt_token_ids)
        record.candidates = len(domain.candidates)
        record.candidate_tokens = domain.candidate_tokens
        # Each prompt is computed with every candidate after it.
        cost = sum(len(prompt) + domain.candidate_tokens for prompt in domain.prompts)
        quota.reserve_tokens(cost)
        call = engine.submit_score(domain)
        quota.use_tokens(cost)
        try:
            outcome = await call.outcome()
        except asyncio.CancelledError:
            call.cancel(record.leave())
            raise
        record.finish_reason = outcome.finish_reason
        _raise_unless_finished(outcome.finish_reason, outcome.error)
        assert outcome.result is not None
        record.score = outcome.result
        return convert.score_result_to_pb(outcome.result)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, _context: _Context
    ) -> pb.TokenizeResponse:
        """Text to ids."""
        engine, codec = self._ready()
        ids, pieces = await codec.tokenize(request.text)
        call_policy = self._governed(engine, codec)
        if call_policy is not None:
            judged = await call_policy.text("text", request.text)
            if judged != request.text:
                ids, pieces = await codec.tokenize(judged)
        return pb.TokenizeResponse(ids=ids, pieces=pieces)

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, _context: _Context
    ) -> pb.DetokenizeResponse:
        """Ids to text."""
        engine, codec = self._ready()
        text = await codec.detokenize(request.ids, engine.spec.vocab_size)
        call_policy = self._governed(engine, codec)
        if call_policy is not None:
            text = await call_policy.text("ids", text)
            text = await call_policy.text("text", text, "output")
        return pb.DetokenizeResponse(text=text)

    async def GetModel(  # noqa: N802
        self, _request: pb.GetModelRequest, _context: _Context
    ) -> pb.GetModelResponse:
        """What is served; while the model loads, what was asked for and the server's limits."""
        config = self._config
        if self._engine is None:
            response = pb.GetModelResponse(backend=config.backend)
        else:
            response = convert.spec_to_pb(self._engine.spec)
            response.max_sequences = min(response.max_sequences, config.max_sequences)
        response.name = config.model
        response.max_queue_size = config.max_queue_size
        response.max_n = config.max_n
        response.server_version = self._version
        return response

    def _ready(self) -> tuple[AsyncEngine, TextCodec]:
        if self._refusal is not None:
            raise EngineUnavailableError(*self._refusal)
        assert self._engine is not None
        assert self._codec is not None
        return self._engine, self._codec

    def _governed(
        self, engine: AsyncEngine, codec: TextCodec, request_id: str = ""
    ) -> GovernedCall | None:
        if self._governance is None:
            return None
        record = current_record()
        call_policy = GovernedCall(
            self._governance, engine, codec, method=record.method, request_id=request_id
        )
        # The log line and the decisions are found by the same id.
        record.request_id = call_policy.request_id
        return call_policy

    async def _submit(
        self, message: convert.GenerateMessage
    ) -> tuple[RequestStream, GovernedOutput | None]:
        """Queue the request a message describes, and what clears its outputs where one must."""
        record = current_record()
        engine, codec = self._ready()
        params = convert.sampling_params_from_pb(message.sampling_params)
        prompt_token_ids = await self._prompt_token_ids(message, engine, codec)
        prompt, request_id = message.text, message.request_id or record.request_id or ""
        call_policy = self._governed(engine, codec, request_id)
        if call_policy is not None:
            request_id = call_policy.request_id
            given = None if message.WhichOneof("prompt") == "token_ids" else message.text
            prompt, prompt_token_ids = await call_policy.prompt(given, prompt_token_ids, params)
        if self._config.log_prompts:
            record.prompt = prompt or str(list(prompt_token_ids))
        record.prompt_tokens = len(prompt_token_ids)
        request = new_request(
            prompt_token_ids,
            params,
            request_id=request_id,
            arrival_ns=record.started_ns,
            deadline_ns=record.deadline_ns,
            trace=record.trace,
        )
        self._watch.describe(record, request)
        # What asks for more than the context is refused by the engine, which says so better.
        most = min(params.max_new_tokens, engine.spec.max_context)
        quota.reserve_tokens(len(prompt_token_ids) + min(params.n, self._config.max_n) * most)
        stream = engine.submit(request)
        quota.use_tokens(len(prompt_token_ids))
        record.output_tokens = 0
        return stream, None if call_policy is None else call_policy.output(request, prompt)

    async def _prompt_token_ids(
        self, message: convert.GenerateMessage, engine: AsyncEngine, codec: TextCodec
    ) -> tuple[int, ...]:
        if message.WhichOneof("prompt") != "token_ids":
            return await codec.encode_prompt(message.text)
        return bounded_ids("prompt", message.token_ids.ids, engine.spec.max_context)


def _observe(output: RequestOutput, record: RequestRecord) -> None:
    """Note what came, and raise where it is the end of an RPC that did not finish."""
    if not output.is_prompt:
        record.output_tokens = (record.output_tokens or 0) + len(output.token_ids)
        quota.use_tokens(len(output.token_ids))
    if output.summary is not None:
        record.summary = output.summary
        record.finish_reason = output.summary.finish_reason
    if output.finish_reason in (FinishReason.ERROR, FinishReason.DEADLINE, FinishReason.CANCELLED):
        record.finish_reason = output.finish_reason
    _raise_unless_finished(output.finish_reason, output.error)


def _raise_unless_finished(reason: FinishReason | None, error: Exception | None) -> None:
    """Raise where `reason` is the end of a request that did not finish."""
    if error is not None:
        raise error
    if reason is FinishReason.DEADLINE:
        raise DeadlineExceededError
    if reason is FinishReason.CANCELLED:
        # The caller did not do it, else this task would have been cancelled: the grace is over.
        raise EngineUnavailableError("the server stopped before the request was finished")


def _raise_if_blocked(blocked: PolicyBlockedError | None, record: RequestRecord) -> None:
    if blocked is not None:
        record.finish_reason = FinishReason.ERROR
        raise blocked


def _leave(stream: RequestStream, record: RequestRecord, governed: GovernedOutput | None) -> None:
    """Take an unfinished request out of the engine; nothing happens to a finished one."""
    if record.summary is None:
        stream.cancel(record.leave())
    if governed is not None:
        governed.close()


def server_version() -> str:
    """Of the installed package."""
    try:
        return metadata.version("gptjet")
    except metadata.PackageNotFoundError:  # run from the tree, not installed
        return "unknown"
