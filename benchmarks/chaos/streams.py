"""Worker: many concurrent streams from one process, some left at a random moment.

    python -m gptjet.benchmarks.chaos.streams --target HOST:PORT --streams 250 ...

All streams are open at once. One JSON line at the end says how they ended; with `--hold` the
process says {"open": n} when every stream has its first token, and then waits to be killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gptjet.service.client import AsyncClient, GptjetError

FINISHED, LEFT, WRONG_LENGTH = "finished", "left", "wrong length"
# gRPC lets a connection carry 100 streams unless told otherwise, and queues the rest.
_STREAMS_A_CONNECTION = 50


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """One stream: what it asks for, and after how many seconds it leaves, if it does."""

    prompt: tuple[int, ...]
    tokens: int
    leaves_after_s: float | None


def plan_streams(
    rng: random.Random, streams: int, *, tokens: int, leaving: float, within_s: float, vocab: int
) -> list[StreamPlan]:
    """`leaving` is the share of streams that leave, each at a moment of the first `within_s`."""
    leavers = set(rng.sample(range(streams), round(streams * leaving)))
    return [
        StreamPlan(
            tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 64))),
            rng.randint(max(1, tokens // 2), tokens),
            rng.uniform(0.0, within_s) if index in leavers else None,
        )
        for index in range(streams)
    ]


async def run_stream(client: AsyncClient, plan: StreamPlan, timeout_s: float) -> str:
    """How it ended: one of this module's words, or the name of a gRPC status."""
    stream = client.generate_stream(
        plan.prompt,
        max_new_tokens=plan.tokens,
        min_new_tokens=plan.tokens,
        ignore_eos=True,
        timeout_s=timeout_s,
    )

    async def read() -> int:
        return sum([len(chunk.token_ids) async for chunk in stream])

    try:
        async with stream:
            if plan.leaves_after_s is None:
                received = await read()
                return FINISHED if received == plan.tokens else WRONG_LENGTH
            try:
                await asyncio.wait_for(read(), plan.leaves_after_s)
            except TimeoutError:
                return LEFT
            return FINISHED  # it was done before it wanted to leave
    except GptjetError as error:
        return error.code.name


async def run_all(target: str, plans: Sequence[StreamPlan], timeout_s: float) -> Counter[str]:
    """Open every stream at once; how many ended in which way."""
    connections = -(-len(plans) // _STREAMS_A_CONNECTION)
    clients = [AsyncClient(target, retry=None) for _ in range(connections)]
    try:
        ends = await asyncio.gather(
            *(
                run_stream(clients[index % connections], plan, timeout_s)
                for index, plan in enumerate(plans)
            )
        )
    finally:
        for client in clients:
            await client.close()
    return Counter(ends)


async def hold(target: str, plans: Sequence[StreamPlan]) -> None:
    """Read the first token of each stream, say so, and hold all of them open, reading on."""
    client = AsyncClient(target, retry=None)
    open_now = 0

    async def read(plan: StreamPlan) -> None:
        stream = client.generate_stream(
            plan.prompt, max_new_tokens=plan.tokens, min_new_tokens=plan.tokens, ignore_eos=True
        )
        nonlocal open_now
        is_first = True
        async for _ in stream:
            open_now += is_first
            if is_first and open_now == len(plans):
                print(json.dumps({"open": open_now}), flush=True)
            is_first = False

    # one that is refused ends the process, which is what its parent then sees
    await asyncio.gather(*(read(plan) for plan in plans))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.chaos.streams")
    parser.add_argument("--target", required=True)
    parser.add_argument("--streams", type=int, default=250)
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a stream")
    parser.add_argument("--leaving", type=float, default=0.5, help="share that leaves")
    parser.add_argument("--within-s", type=float, default=10.0, help="leavers leave within this")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=300.0)
    parser.add_argument("--hold", action="store_true", help="hold the streams until killed")
    flags = parser.parse_args(arguments)
    plans = plan_streams(
        random.Random(flags.seed),
        flags.streams,
        tokens=flags.tokens,
        leaving=0.0 if flags.hold else flags.leaving,
        within_s=flags.within_s,
        vocab=flags.vocab,
    )
    if flags.hold:
        asyncio.run(hold(flags.target, plans))
        return 0
    ends = asyncio.run(run_all(flags.target, plans, flags.timeout_s))
    print(json.dumps({"ends": dict(ends)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
