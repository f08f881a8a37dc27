"""Load on one address while servers come and go behind it; run as a process of its own.

    python hand_over_load.py HOST:PORT

Loops of unary calls and of streams on connections that stay, and of unary calls on a new connection
each, none of which retries anything: what a foreign caller would see. A line on stdin ends it; then
it prints one JSON object: calls that went well by kind, and what each failure was.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys

from gptjet.service.client import AsyncClient, GptjetError

TOKENS = 20
TEXT = "bcdefghijklmnopqrstu"
LOOPS = {"unary": 12, "stream": 12, "new_connection": 6}


async def main(target: str) -> None:
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    stopped = asyncio.Event()

    async def call(client: AsyncClient, kind: str) -> str:
        if kind != "stream":
            return (await client.generate("a", max_new_tokens=TOKENS)).text
        stream = client.generate_stream("a", max_new_tokens=TOKENS)
        return "".join([chunk.text async for chunk in stream])

    async def loop(kind: str) -> None:
        client = AsyncClient(target, retry=None, timeout_s=60)
        while not stopped.is_set():
            if kind == "new_connection":
                await client.close()
                client = AsyncClient(target, retry=None, timeout_s=60)
            try:
                text = await call(client, kind)
            except GptjetError as error:
                failures.append(f"{kind}: {error}")
                await asyncio.sleep(0.05)
                continue
            if text == TEXT:
                counts[kind] += 1
            else:
                failures.append(f"{kind}: {text!r}")
        await client.close()

    loops = [asyncio.create_task(loop(kind)) for kind, n in LOOPS.items() for _ in range(n)]
    print("started", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    stopped.set()
    await asyncio.gather(*loops)
    print(json.dumps({"counts": counts, "failures": failures}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
