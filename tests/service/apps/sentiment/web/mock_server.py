"""`mock_server.py DECODE_MS`: a GPTJet server of the mock backend, to be killed.

Prints its address and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys

from gptjet.service.backends.mock import MockBackend
from gptjet.service.config import ServerConfig
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.log import configure_logging
from gptjet.service.rpc.server import Server


async def serve(decode_ms: float) -> None:
    server = Server(ServerConfig(port=0, model="toy", backend="mock"))
    await server.start()
    await server.attach(MockBackend(decode_ms=decode_ms), ByteTokenizer())
    sys.stdout.write(f"127.0.0.1:{server.port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.drain(0.0)


if __name__ == "__main__":
    configure_logging("warning")
    asyncio.run(serve(float(sys.argv[1])))
