"""The server's request path as a target for a coverage-guided fuzzer.

    python -m gptjet.service.fuzz_target --runs 20000 --corpus build/fuzz

An input is one byte that picks a method and the bytes of its request. It goes the whole way: parse,
convert, tokenize, the engine on the mock backend, the status. Anything but an answer or a clear
status is a fault, and ends the run with the input kept. atheris (`gptjet[chaos]`) sees which lines
each input reached and changes the inputs towards new ones.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_INSTRUMENTED = (
    "gptjet.service.rpc.convert",
    "gptjet.service.rpc.score_request",
    "gptjet.service.rpc.servicer",
    "gptjet.service.rpc.status",
    "gptjet.service.rpc.text",
    "gptjet.service.rpc.wire",
    "gptjet.service.engine.request",
    "gptjet.service.engine.score",
)
_MAX_INPUT_BYTES = 4096
# Longer runs of the mock show nothing new.
_MAX_CONTEXT = 128
_TIMEOUT_S = 20.0


class FaultError(Exception):
    """A request ended as no request may; the message says how."""


class _AbortedError(Exception):
    """What the stand-in of gRPC's context raises on `abort`, as gRPC's does."""


class _Context:
    """The part of grpc.aio.ServicerContext that the server uses, without a connection."""

    def __init__(self) -> None:
        self._code: Any = None
        self._details = ""
        self.messages = 0

    def peer(self) -> str:
        return "fuzz"

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def code(self) -> Any:
        return self._code

    def details(self) -> str:
        return self._details

    def set_trailing_metadata(self, _metadata: object) -> None:
        """Nobody reads it."""

    def trailing_metadata(self) -> tuple[()]:
        return ()

    async def write(self, message: Any) -> None:
        message.SerializeToString()
        self.messages += 1

    async def abort(self, code: Any, details: str = "", *_: object) -> None:
        import grpc

        self._code, self._details = code, details
        raise grpc.aio.AbortError(details)


class Target:
    """The request path of a server of the mock, in this process."""

    def __init__(self, record: IO[bytes] | None = None) -> None:
        """`record` gets every input that was run: see `_write_record`."""
        from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
        from gptjet.service.rpc.servicer import SERVICE_NAME

        self._loop = asyncio.new_event_loop()
        self._handlers: dict[str, Any] = {}
        self._record = record
        self._statuses: dict[str, int] = {}
        self._loop.run_until_complete(self._start(pb_grpc, SERVICE_NAME))
        self._paths = sorted(self._handlers)

    @property
    def paths(self) -> list[str]:
        """The methods, in the order that an input's first byte counts in."""
        return self._paths

    def run(self, data: bytes) -> str:
        """The status that an input ends with. Raises FaultError for what may not be."""
        if not data:
            return "OK"
        path, wire = self._paths[data[0] % len(self._paths)], bytes(data[1:])
        if self._record is not None:
            _write_record(self._record, path, wire)
        try:
            status = self._loop.run_until_complete(
                asyncio.wait_for(self._call(path, wire), _TIMEOUT_S)
            )
        except TimeoutError as error:
            raise FaultError(f"{path}: no end within {_TIMEOUT_S:g} s") from error
        self._statuses[status] = self._statuses.get(status, 0) + 1
        return status

    def close(self) -> None:
        """Stop the engine. Raises FaultError if it still holds a sequence."""
        engine = self._server.engine
        assert engine is not None
        held = engine.num_running + engine.num_waiting
        self._loop.run_until_complete(self._server.drain(1.0))
        self._loop.close()
        if held:
            raise FaultError(f"{held} requests were still held at the end")

    async def _start(self, pb_grpc: Any, service_name: str) -> None:
        from gptjet.service.backends.mock import MockBackend
        from gptjet.service.config import ServerConfig
        from gptjet.service.engine.tokenizer import ByteTokenizer
        from gptjet.service.rpc.server import Server

        config = ServerConfig(backend="mock", model="mock", host="127.0.0.1", port=0)
        self._server = Server(config)
        handlers: dict[str, Any] = {}

        class Registry:
            """What `add_..._to_server` thinks is a gRPC server."""

            def add_generic_rpc_handlers(self, _handlers: object) -> None:
                pass

            def add_registered_method_handlers(self, _service: str, methods: Any) -> None:
                handlers.update(methods)

        pb_grpc.add_TextGenerationServicer_to_server(
            self._server._servicer,
            Registry(),
        )
        await self._server.attach(
            MockBackend(max_context=_MAX_CONTEXT, paged=True), ByteTokenizer()
        )
        interceptor = self._server._rpcs
        for name, handler in handlers.items():
            path = f"/{service_name}/{name}"

            async def continuation(_details: object, handler: Any = handler) -> Any:
                return handler

            details = type("Details", (), {"method": path, "invocation_metadata": ()})()
            self._handlers[path] = await interceptor.intercept_service(continuation, details)

    async def _call(self, path: str, wire: bytes) -> str:
        import grpc

        handler, context = self._handlers[path], _Context()
        request = handler.request_deserializer(wire)
        try:
            if handler.response_streaming:
                await handler.unary_stream(request, context)
            else:
                answer = await handler.unary_unary(request, context)
                handler.response_serializer(answer)
        except grpc.aio.AbortError:
            code = context.code()
            clear = (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.OUT_OF_RANGE,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
            if code not in clear or not context.details():
                raise FaultError(f"{path}: {code}: {context.details()}") from None
            return str(code.name)
        return "OK"


def _write_record(file: IO[bytes], path: str, wire: bytes) -> None:
    """One byte of the path's length, four of the request's (little-endian), both."""
    name = path.encode()
    file.write(bytes([len(name)]) + len(wire).to_bytes(4, "little") + name + wire)
    file.flush()


def seeds(paths: Sequence[str]) -> list[bytes]:
    """One usual request a method, to begin with."""
    from gptjet.proto.v1 import text_generation_pb2 as pb

    params = pb.SamplingParams(max_new_tokens=4, temperature=0.5, stop=["."], logprobs=2, n=2)
    usual: dict[str, Any] = {
        "Generate": pb.GenerateRequest(text="a", sampling_params=params),
        "GenerateStream": pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=[1, 2]), sampling_params=params
        ),
        "Score": pb.ScoreRequest(text="a", candidates=[pb.Candidate(text="b")]),
        "Tokenize": pb.TokenizeRequest(text="a"),
        "Detokenize": pb.DetokenizeRequest(ids=[1]),
    }
    return [
        bytes([index]) + usual[name].SerializeToString()
        for index, path in enumerate(paths)
        if (name := path.rpartition("/")[2]) in usual
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz; exit code 0 if every input ended well. atheris ends the process itself."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.service.fuzz_target")
    parser.add_argument("--runs", type=int, default=20_000, help="inputs to try")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer; 0 is taken as 1")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="kept inputs")
    parser.add_argument("--record", type=Path, help="file that every input is written to")
    flags = parser.parse_args(arguments)
    try:
        import atheris
    except ImportError:
        sys.stderr.write("the fuzzer needs atheris: pip install 'gptjet[chaos]'\n")
        return 2
    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        import gptjet.service.rpc.server  # noqa: F401
    from gptjet.service.log import configure_logging

    configure_logging("error", "console")
    flags.corpus.mkdir(parents=True, exist_ok=True)
    target = Target(flags.record.open("wb") if flags.record else None)
    for index, data in enumerate(seeds(target.paths)):
        (flags.corpus / f"seed-{index}").write_bytes(data)

    def run_one(data: bytes) -> None:
        target.run(data)

    libfuzzer = [f"-runs={flags.runs}", f"-seed={flags.seed or 1}", f"-max_len={_MAX_INPUT_BYTES}"]
    atheris.Setup([sys.argv[0], *libfuzzer, str(flags.corpus)], run_one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
