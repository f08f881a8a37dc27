"""Worker: opens streams with large messages and never reads a byte of them.

    python -m gptjet.benchmarks.chaos.slow_reader --target HOST:PORT --streams 8

gRPC takes what its flow-control window holds, and then nothing more. Prints {"open": n}; on a line
of its standard input it looks how each call has ended, and prints that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import grpc

from gptjet.benchmarks.chaos.wire import stream_request

_METHOD = "/gptjet.v1.TextGeneration/GenerateStream"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.chaos.slow_reader")
    parser.add_argument("--target", required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=500)
    flags = parser.parse_args(arguments)
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535))
    with grpc.insecure_channel(flags.target, options=options) as channel:
        method = channel.unary_stream(
            _METHOD, request_serializer=bytes, response_deserializer=bytes
        )
        # four sequences with the twenty likeliest tokens of each position: about a kilobyte a step
        request = stream_request((1, 2, 3), max_new_tokens=flags.tokens, n=4, logprobs=20)
        calls = [method(request, timeout=600) for _ in range(flags.streams)]
        print(json.dumps({"open": len(calls)}), flush=True)
        sys.stdin.readline()
        print(json.dumps({"ends": [_end_of(call) for call in calls]}), flush=True)
    return 0


def _end_of(call: Any) -> str:
    """The status that a call ended with, once what had arrived before it is read."""
    received = 0
    try:
        for message in call:
            received += len(message)
    except grpc.RpcError as error:
        code = error.code().name
        return f"{code}: {error.details()}"
    return f"OK: {received} bytes"


if __name__ == "__main__":
    sys.exit(main())
