"""Policies written to a file and loaded from there, as an operator would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptjet.service.governance.policy import Policy, load_policy


@pytest.fixture
def make_policy(tmp_path: Path) -> Callable[[str], Policy]:
    """`make_policy("[[rules]]…")` writes a file of version 1 and loads it."""

    def make(rules: str) -> Policy:
        path = tmp_path / "policy.toml"
        path.write_text("version = 1\n" + rules, encoding="utf-8")
        return load_policy(path)

    return make
