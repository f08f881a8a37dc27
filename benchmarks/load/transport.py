"""Gets planned requests to a GPTJet server: the client's own streams, over several connections."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Self

from gptjet.benchmarks.load.generator import Answered, RequestFailedError
from gptjet.benchmarks.load.workload import PlannedRequest
from gptjet.service.client import AsyncClient, GptjetError, TlsOptions


def tls_to_json(tls: TlsOptions | None) -> dict[str, str] | None:
    """What a worker needs to know of it; None: plain text."""
    if tls is None:
        return None
    return {name: str(value) for name, value in asdict(tls).items() if value is not None}


def tls_from_json(fields: Mapping[str, str] | None) -> TlsOptions | None:
    """The options that `tls_to_json` wrote."""
    if fields is None:
        return None
    paths = {name: Path(value) for name, value in fields.items() if name != "server_name"}
    return TlsOptions(**paths, server_name=fields.get("server_name"))


class GrpcTransport:
    """A Transport over `connections` channels in turn; make it where the event loop runs.

    Nothing is retried: a refusal is what the run wants to know of. `timeout_s` is each request's
    deadline. Greedy, end-of-text ignored, so that every length is what was planned.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: TlsOptions | None,
        timeout_s: float,
        connections: int,
        token: str | None = None,
    ) -> None:
        self._clients = [
            AsyncClient(
                target,
                tls=tls,
                timeout_s=timeout_s,
                retry=None,
                token=token,
                # The command line has asked already whether this may be.
                allow_plaintext_token=True,
            )
            for _ in range(connections)
        ]
        self._turns = itertools.cycle(self._clients)

    @property
    def connections(self) -> int:
        """How many channels there are."""
        return len(self._clients)

    async def send(self, request: PlannedRequest, on_tokens: Callable[[int], None]) -> Answered:
        """See Transport."""
        stream = next(self._turns).generate_stream(
            request.prompt,
            max_new_tokens=request.output_tokens,
            min_new_tokens=request.output_tokens,
            ignore_eos=True,
            temperature=0.0,
        )
        try:
            async with stream:
                async for chunk in stream:
                    if chunk.token_ids:
                        on_tokens(len(chunk.token_ids))
        except GptjetError as error:
            raise RequestFailedError(error.code.name) from error
        summary = stream.summary
        if summary is None:
            return Answered()
        return Answered(summary.prompt_tokens, asdict(summary.timings))

    async def close(self) -> None:
        """Close every connection."""
        for client in self._clients:
            await client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
