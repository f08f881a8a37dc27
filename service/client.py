"""Calls a GPTJet server: `Client`, and `AsyncClient` with the same methods for asyncio.

    with Client("localhost:50051") as client:
        print(client.generate("The cat", max_new_tokens=16).text)
        with client.generate_stream("The cat", temperature=0.8) as stream:
            for token in stream:
                print(token.text, end="", flush=True)
        print(stream.summary.timings.ttft_ms)

It needs gRPC and the messages only: no torch, no engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service import client_channel as channels
from gptjet.service import client_messages as messages
from gptjet.service.client_channel import check_token
from gptjet.service.client_stream import AsyncGenerationStream, GenerationStream
from gptjet.service.client_types import (
    CancelledError,
    CandidateScore,
    DeadlineExceededError,
    FieldViolation,
    FinishReason,
    GeneratedSequence,
    Generation,
    GenerationSummary,
    GptjetError,
    HealthStatus,
    InternalError,
    InvalidRequestError,
    ModelInfo,
    ParityVerdict,
    PermissionDeniedError,
    PlaintextTokenError,
    PolicyBlockedError,
    Prompt,
    QueueFullError,
    QuotaExceededError,
    ResourceExhaustedError,
    RetryPolicy,
    SamplingOptions,
    ScoreResult,
    SequenceSummary,
    Speculation,
    Timings,
    TlsOptions,
    TokenChunk,
    Tokenization,
    TokenLogprob,
    UnauthenticatedError,
    UnavailableError,
)

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "AsyncClient",
    "AsyncGenerationStream",
    "CancelledError",
    "CandidateScore",
    "Client",
    "DeadlineExceededError",
    "FieldViolation",
    "FinishReason",
    "GeneratedSequence",
    "Generation",
    "GenerationStream",
    "GenerationSummary",
    "GptjetError",
    "HealthStatus",
    "InternalError",
    "InvalidRequestError",
    "ModelInfo",
    "ParityVerdict",
    "PermissionDeniedError",
    "PlaintextTokenError",
    "PolicyBlockedError",
    "Prompt",
    "QueueFullError",
    "QuotaExceededError",
    "ResourceExhaustedError",
    "RetryPolicy",
    "SamplingOptions",
    "ScoreResult",
    "SequenceSummary",
    "Speculation",
    "Timings",
    "TlsOptions",
    "TokenChunk",
    "TokenLogprob",
    "Tokenization",
    "UnauthenticatedError",
    "UnavailableError",
    "check_token",
]

DEFAULT_TIMEOUT_S = 300.0
_DEFAULT_RETRY = RetryPolicy()


class Client:
    """A connection to one server, safe to share between threads.

    target            "host:port", or any target gRPC resolves
    tls               TlsOptions() for TLS; None: plain text
    timeout_s         deadline of a call that gives none; None: no deadline
    retry             on UNAVAILABLE; None: never
    retry_queue_full  retry on RESOURCE_EXHAUSTED too, after the time the server names
    metadata          sent with every call; where the caller uses OpenTelemetry, its trace context
                      goes with it
    token             bearer token, sent with every call; over plain text to this machine only,
                      unless `allow_plaintext_token` (else PlaintextTokenError, a ValueError)

    Each method's `timeout_s` is that call's deadline; `math.inf` is none at all. Methods raise
    GptjetError.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: TlsOptions | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = _DEFAULT_RETRY,
        retry_queue_full: bool = False,
        metadata: Sequence[tuple[str, str]] = (),
        token: str | None = None,
        allow_plaintext_token: bool = False,
    ) -> None:
        check_token(token, target, tls, allow_plaintext_token)
        options = channels.channel_options(retry, retry_queue_full, tls, token)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            credentials = channels.channel_credentials(tls)
            self._channel = grpc.secure_channel(target, credentials, options)
        self._target = target
        self._timeout_s = timeout_s
        self._metadata = channels.call_metadata(metadata, token)
        self._stub = pb_grpc.TextGenerationStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Run a request to its end."""
        request = messages.generate_request(pb.GenerateRequest, prompt, request_id, options)
        return messages.generation_from_pb(self._call(self._stub.Generate, request, timeout_s))

    def generate_stream(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """Start a request and iterate over its tokens as they come."""
        request = messages.generate_request(pb.GenerateStreamRequest, prompt, request_id, options)
        timeout = channels.deadline(timeout_s, self._timeout_s)
        return GenerationStream(
            self._stub.GenerateStream(
                request, timeout=timeout, metadata=channels.with_trace_context(self._metadata)
            )
        )

    def score(
        self,
        prompt: Prompt,
        candidates: Sequence[Prompt],
        *,
        calibration_prompt: Prompt | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> ScoreResult:
        """How likely the model finds each continuation of a prompt, without generating.

        A candidate's text is tokenized by itself: a word after a space begins with that space,
        " positive". With a `calibration_prompt` (the same prompt around a text without content,
        such as "N/A"), what the model thinks of a candidate anyway is taken out of `probability`.
        """
        request = messages.score_request(prompt, candidates, calibration_prompt, request_id)
        return messages.score_from_pb(self._call(self._stub.Score, request, timeout_s))

    def tokenize(self, text: str, *, timeout_s: float | None = None) -> Tokenization:
        """Ids of a text."""
        response = self._call(self._stub.Tokenize, messages.text_request(text), timeout_s)
        return Tokenization(tuple(response.ids), tuple(response.pieces))

    def detokenize(self, ids: Iterable[int], *, timeout_s: float | None = None) -> str:
        """Text of ids."""
        response = self._call(self._stub.Detokenize, messages.ids_request(ids), timeout_s)
        return str(response.text)

    def get_model(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What is being served; answers while the model loads, too."""
        response = self._call(self._stub.GetModel, pb.GetModelRequest(), timeout_s)
        return messages.model_from_pb(response)

    def health(
        self,
        service: str = channels.SERVICE_NAME,
        *,
        timeout_s: float | None = channels.PROBE_TIMEOUT_S,
    ) -> HealthStatus:
        """What grpc.health.v1 says; raises UnavailableError where nobody answers."""
        request = health_pb2.HealthCheckRequest(service=service)
        return messages.health_from_pb(self._call(self._health.Check, request, timeout_s))

    def wait_until_serving(self, timeout_s: float = 60.0) -> None:
        """Return once the server is up and its model warm; else raise UnavailableError."""
        patience = channels.Patience(self._target, timeout_s)
        while True:
            try:
                last = self.health(timeout_s=patience.probe_timeout_s).value
            except (UnavailableError, DeadlineExceededError) as error:
                last = error.message
            if last == HealthStatus.SERVING:
                return
            time.sleep(patience.next_pause_s(last))

    def close(self) -> None:
        """Close the connection; calls that are running are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        timeout = channels.deadline(timeout_s, self._timeout_s)
        try:
            metadata = channels.with_trace_context(self._metadata)
            return method(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise channels.from_rpc_error(error) from error


class AsyncClient:
    """Client for asyncio; make it where the event loop runs. The arguments are Client's."""

    def __init__(
        self,
        target: str,
        *,
        tls: TlsOptions | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = _DEFAULT_RETRY,
        retry_queue_full: bool = False,
        metadata: Sequence[tuple[str, str]] = (),
        token: str | None = None,
        allow_plaintext_token: bool = False,
    ) -> None:
        check_token(token, target, tls, allow_plaintext_token)
        options = channels.channel_options(retry, retry_queue_full, tls, token)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            credentials = channels.channel_credentials(tls)
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self._target = target
        self._timeout_s = timeout_s
        self._metadata = channels.call_metadata(metadata, token)
        self._stub = pb_grpc.TextGenerationStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Run a request to its end."""
        request = messages.generate_request(pb.GenerateRequest, prompt, request_id, options)
        return messages.generation_from_pb(
            await self._call(self._stub.Generate, request, timeout_s)
        )

    def generate_stream(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerationStream:
        """Start a request and iterate over its tokens as they come. Not awaited itself."""
        request = messages.generate_request(pb.GenerateStreamRequest, prompt, request_id, options)
        timeout = channels.deadline(timeout_s, self._timeout_s)
        return AsyncGenerationStream(
            self._stub.GenerateStream(
                request, timeout=timeout, metadata=channels.with_trace_context(self._metadata)
            )
        )

    async def score(
        self,
        prompt: Prompt,
        candidates: Sequence[Prompt],
        *,
        calibration_prompt: Prompt | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> ScoreResult:
        """How likely the model finds each continuation of a prompt; see Client.score."""
        request = messages.score_request(prompt, candidates, calibration_prompt, request_id)
        return messages.score_from_pb(await self._call(self._stub.Score, request, timeout_s))

    async def tokenize(self, text: str, *, timeout_s: float | None = None) -> Tokenization:
        """Ids of a text."""
        response = await self._call(self._stub.Tokenize, messages.text_request(text), timeout_s)
        return Tokenization(tuple(response.ids), tuple(response.pieces))

    async def detokenize(self, ids: Iterable[int], *, timeout_s: float | None = None) -> str:
        """Text of ids."""
        response = await self._call(self._stub.Detokenize, messages.ids_request(ids), timeout_s)
        return str(response.text)

    async def get_model(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What is being served; answers while the model loads, too."""
        response = await self._call(self._stub.GetModel, pb.GetModelRequest(), timeout_s)
        return messages.model_from_pb(response)

    async def health(
        self,
        service: str = channels.SERVICE_NAME,
        *,
        timeout_s: float | None = channels.PROBE_TIMEOUT_S,
    ) -> HealthStatus:
        """What grpc.health.v1 says; raises UnavailableError where nobody answers."""
        request = health_pb2.HealthCheckRequest(service=service)
        return messages.health_from_pb(await self._call(self._health.Check, request, timeout_s))

    async def wait_until_serving(self, timeout_s: float = 60.0) -> None:
        """Return once the server is up and its model warm; else raise UnavailableError."""
        patience = channels.Patience(self._target, timeout_s)
        while True:
            try:
                last = (await self.health(timeout_s=patience.probe_timeout_s)).value
            except (UnavailableError, DeadlineExceededError) as error:
                last = error.message
            if last == HealthStatus.SERVING:
                return
            await asyncio.sleep(patience.next_pause_s(last))

    async def close(self) -> None:
        """Close the connection; calls that are running are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        timeout = channels.deadline(timeout_s, self._timeout_s)
        try:
            return await method(
                request, timeout=timeout, metadata=channels.with_trace_context(self._metadata)
            )
        except grpc.RpcError as error:
            raise channels.from_rpc_error(error) from error
