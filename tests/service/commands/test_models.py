"""`gptjet models` against a live server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from typer.testing import Result

from gptjet.service.backends.mock import MockBackend
from gptjet.service.commands.terminal import ExitCode
from gptjet.service.engine.tokenizer import ByteTokenizer

Invoke = Callable[..., Awaitable[Result]]
DOCKERFILE = Path(__file__).parents[3] / "Dockerfile"


async def test_the_table_says_what_is_served_and_its_limits(
    start_server: Any, invoke: Invoke
) -> None:
    backend = MockBackend(max_context=96, max_sequences=8, max_batch_size=4, num_kv_blocks=10)
    running = await start_server(backend=backend, max_queue_size=5, max_n=3)
    result = await invoke("models", "--server", running.target)
    assert result.exit_code == ExitCode.OK
    rows = dict(re.split("  +", line) for line in result.stdout.splitlines())
    assert rows["server"].startswith(f"{running.target} (version ")
    assert rows["health"] == "serving"
    assert rows["model"] == "toy"
    assert rows["backend"] == "mock"
    assert rows["device"] == "cpu, float32"
    assert rows["parity"] == "not run"
    assert rows["context"] == "96 tokens, vocabulary 257"
    assert rows["concurrency"] == "8 sequences, 4 in one step"
    assert rows["KV cache"] == "160 tokens (10 blocks of 16)"
    assert rows["queue"] == "5 requests, n up to 3"


async def test_json_has_every_field_of_the_answer(start_server: Any, invoke: Invoke) -> None:
    running = await start_server()
    result = await invoke("models", "--json", env={"GPTJET_SERVER": running.target})
    fields = json.loads(result.stdout)
    assert fields["health"] == "serving"
    assert fields["max_context"] == 512
    assert fields["kv_cache_tokens"] == fields["num_kv_blocks"] * fields["block_size"] == 64 * 512
    assert fields["parity"]["status"] == "not_run"


async def test_while_the_model_loads_it_says_so_and_ends_with_code_4(
    start_server: Any, invoke: Invoke
) -> None:
    running = await start_server(attach=False)
    result = await invoke("models", "--server", running.target)
    assert result.exit_code == ExitCode.REFUSED
    assert "not serving" in result.stdout
    assert "context" not in result.stdout  # not known yet, so not shown as 0


async def test_wait_waits_until_the_model_is_loaded(start_server: Any, invoke: Invoke) -> None:
    running = await start_server(attach=False)
    waiting = asyncio.create_task(invoke("models", "--server", running.target, "--wait", "20"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await running.server.attach(MockBackend(), ByteTokenizer())
    assert (await waiting).exit_code == ExitCode.OK


async def test_without_a_server_it_ends_with_code_3(invoke: Invoke) -> None:
    result = await invoke("models", "--server", "127.0.0.1:1")
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "no server answers at 127.0.0.1:1" in result.stderr


async def test_health_alone_needs_no_token_where_health_is_open(
    start_server: Any, invoke: Invoke, tmp_path: Path
) -> None:
    """What the image's HEALTHCHECK runs, against a server that asks everybody else for a token."""
    (check,) = re.findall(r"HEALTHCHECK .*\\\n +CMD (\[.*\])", DOCKERFILE.read_text("utf-8"))
    program, *arguments = json.loads(check)
    assert program == "gptjet"
    assert (await invoke("tokens", "create", "web", "--file", str(tmp_path / "t"))).exit_code == 0
    settings = {"tokens_file": tmp_path / "t", "attach": False}
    running = await start_server(open_health=True, **settings)
    closed = await start_server(**settings)

    async def probe(server: Any, *more: str) -> Result:
        return await invoke(*arguments, *more, env={"GPTJET_SERVER": server.target})

    loading = await probe(running)
    assert (loading.exit_code, loading.stdout) == (ExitCode.REFUSED, "not serving\n")
    await running.server.attach(MockBackend(), ByteTokenizer())
    serving = await probe(running)
    assert (serving.exit_code, serving.stdout) == (ExitCode.OK, "serving\n")
    fields = json.loads((await probe(running, "--json")).stdout)
    assert fields == {"server": running.target, "health": "serving"}
    refused = await probe(closed)
    assert refused.exit_code == ExitCode.REFUSED
    assert "a bearer token is needed" in refused.stderr
