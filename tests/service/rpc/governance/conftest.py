"""A server under a policy, and what its audit log says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.governance.audit import read_log

StartServer = Callable[..., Awaitable[Any]]
StartGoverned = Callable[..., Awaitable[Any]]

RULES = """
version = 1
[[rules]]
name = "no-fgh"
on = ["output"]
action = "block"
phrases = ["fgh"]
[[rules]]
name = "no-secret"
on = ["input"]
action = "block"
phrases = ["top secret"]
[[rules]]
name = "name"
action = "redact"
phrases = ["pq", "John Doe"]
replacement = "<n>"
[[rules]]
name = "watch"
action = "flag"
phrases = ["uv"]
"""


@pytest.fixture
def start_governed(start_server: StartServer, tmp_path: Path) -> StartGoverned:
    """`await start_governed(rules, **settings)`: a server with that policy; `.folder` is its."""

    async def start(rules: str = RULES, **settings: Any) -> Any:
        policy = tmp_path / "policy.toml"
        policy.write_text(rules, encoding="utf-8")
        settings.setdefault("governance_dir", tmp_path / "governance")
        running = await start_server(governance_policy=policy, **settings)
        running.folder = settings["governance_dir"]
        running.policy = policy
        return running

    return start


def decisions(running: Any) -> list[dict[str, Any]]:
    return [r for r in read_log(running.folder / "audit.jsonl") if r["event"] == "decision"]
