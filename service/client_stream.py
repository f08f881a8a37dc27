"""The streams that `generate_stream` returns, for threads and for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import grpc

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service import client_channel as channels
from gptjet.service import client_messages as messages
from gptjet.service.client_types import GenerationSummary, TokenChunk


class _StreamState:
    """What both kinds of stream know of what has come."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._closed = False
        self._texts: list[str] = []
        self.summary: GenerationSummary | None = None

    @property
    def text(self) -> str:
        """The text so far of the sequence with index 0."""
        return "".join(self._texts)

    def cancel(self) -> None:
        """Cancel the RPC; the iteration ends. Nothing happens to a finished one."""
        self._closed = True
        self._call.cancel()

    def _take(self, response: pb.GenerateStreamResponse) -> TokenChunk | None:
        """The chunk of a message; the summary, and what a newer server adds, is not one."""
        event = response.WhichOneof("event")
        if event == "summary":
            self.summary = messages.summary_from_pb(response.summary)
        if event != "chunk":
            return None
        chunk = messages.chunk_from_pb(response.chunk)
        if chunk.index == 0:
            self._texts.append(chunk.text)
        return chunk


class GenerationStream(_StreamState):
    """An iterator of TokenChunk; `summary` is set when it has ended by itself.

    Leaving the `with` block, `close` and `cancel` cancel the RPC, and the server frees its
    sequences within one step.
    """

    def __iter__(self) -> Iterator[TokenChunk]:
        return self

    def __next__(self) -> TokenChunk:
        """Raises GptjetError if the RPC failed."""
        while not self._closed:
            try:
                response = next(self._call)
            except grpc.RpcError as error:
                if self._closed:  # cancelled meanwhile, from another thread
                    break
                raise channels.from_rpc_error(error) from error
            chunk = self._take(response)
            if chunk is not None:
                return chunk
        raise StopIteration

    def close(self) -> None:
        """The same as `cancel`."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncGenerationStream(_StreamState):
    """GenerationStream for asyncio: `async for`, `async with`, `aclose`."""

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self

    async def __anext__(self) -> TokenChunk:
        """Raises GptjetError if the RPC failed."""
        while not self._closed:
            try:
                response = await self._call.read()
            except grpc.RpcError as error:
                if self._closed:
                    break
                raise channels.from_rpc_error(error) from error
            except asyncio.CancelledError:
                # gRPC raises it for a cancelled call too, not only for a cancelled task.
                task = asyncio.current_task()
                if self._closed and not (task and task.cancelling()):
                    break
                raise
            if response is grpc.aio.EOF:
                break
            chunk = self._take(response)
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """The same as `cancel`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
