"""What a policy costs a token of output, and a prompt, beside no policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptjet.service.governance.guard import Guard
from gptjet.service.governance.policy import Chain, load_policy
from gptjet.service.governance.sequence_guard import SequenceGuard

# Tokens of GPT-2's kind have about four characters; these stand for a vocabulary of words.
_PROSE = (
    "The food was wonderful and the staff were kind , we came at 12 and paid 30 dollars . "
    "Next time we shall book a table early , because it was full even on a Tuesday ."
)
_TOKENS = [f" {word}".encode() for word in _PROSE.split()]
_IDS = [index % len(_TOKENS) for index in range(256)]
_TEXT = b"".join(_TOKENS[index] for index in _IDS).decode()

_PATTERNS = r"""
[[rules]]
name = "keys"
action = "block"
regexes = ['\bsk-[A-Za-z0-9]{20,48}\b', 'AKIA[A-Z0-9]{16}', '\bghp_[A-Za-z0-9]{36}\b']
window = 64
"""
_PERSONAL_DATA = """
[[rules]]
name = "personal-data"
action = "redact"
personal_data = ["email", "phone", "card", "iban", "ip"]
regions = ["US"]
"""
_POLICIES = ("10 phrases", "10000 phrases", "regexes", "personal data", "all")


def _policy(name: str, folder: Path) -> Chain:
    many = [f"forbidden thing {n:x} {n * n:x}" for n in range(10_000)]
    lists = {"10 phrases": many[:10], "10000 phrases": many, "all": many}
    content = "version = 1\n"
    if name in lists:
        (folder / "words.txt").write_text("\n".join(lists[name]))
        content += (
            '[[rules]]\nname = "words"\naction = "block"\nphrases_file = "words.txt"\n'
            "whole_words = true\n"
        )
    if name in ("regexes", "all"):
        content += _PATTERNS
    if name in ("personal data", "all"):
        content += _PERSONAL_DATA
    path = folder / "policy.toml"
    path.write_text(content)
    return load_policy(path).chains["output"]


def _never(_rule: str, _matched: str) -> bool:
    return False


@pytest.mark.parametrize("name", _POLICIES)
def bench_output(bench: Any, benchmark: Any, tmp_path: Path, name: str) -> None:
    """256 tokens of prose, one a step, of which nothing is found: microseconds a token."""
    chain = _policy(name, tmp_path)

    def work() -> str:
        guard: SequenceGuard[float] = SequenceGuard(chain, _never, _TOKENS.__getitem__)
        out = []
        last = len(_IDS) - 1
        for position, token_id in enumerate(_IDS):
            cleared = guard.push(
                _TOKENS[token_id].decode(), (token_id,), (), final=position == last
            )
            out.append(cleared.text)
        return "".join(out)

    def check() -> None:
        assert work() == _TEXT

    bench(work, check)
    if benchmark.stats is not None:
        per_token = benchmark.stats.stats.median / len(_IDS) * 1e6
        benchmark.extra_info["us_per_token"] = round(per_token, 2)


@pytest.mark.parametrize("name", _POLICIES)
def bench_prompt(bench: Any, benchmark: Any, tmp_path: Path, name: str) -> None:
    """A prompt of 8 KiB of prose, judged at once: nanoseconds a character."""
    chain = _policy(name, tmp_path)
    text = (_TEXT * 10)[:8192]

    def work() -> str:
        guard = Guard(chain, _never)
        guard.push(text)
        guard.finish()
        return guard.release()

    def check() -> None:
        assert work() == text

    bench(work, check)
    if benchmark.stats is not None:
        per_character = benchmark.stats.stats.median / len(text) * 1e9
        benchmark.extra_info["ns_per_character"] = round(per_character, 1)


@pytest.mark.parametrize("name", ["regexes", "personal data"])
def bench_hostile_prompt(bench: Any, tmp_path: Path, name: str) -> None:
    """8 KiB made to cost the most: beginnings of keys that go on, numbers that never end."""
    chain = _policy(name, tmp_path)
    text = {
        "regexes": "".join(f"sk-AKIA{n:x}ghp_{n * 7919:x} " for n in range(1000)),
        "personal data": "".join(f"{n * 7919 % 9973:04d} " for n in range(2000)),
    }[name][:8192]

    def work() -> int:
        guard = Guard(chain, _never)
        guard.push(text)
        guard.finish()
        return len(guard.release())

    bench(work, lambda: None if work() else pytest.fail("nothing left"))
