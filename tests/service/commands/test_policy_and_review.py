"""`gptjet policy` and `gptjet review`, and a server that is told to read its policy again."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gptjet.service.client import AsyncClient, PolicyBlockedError
from gptjet.service.commands.terminal import ExitCode
from gptjet.service.governance.governance import REVIEW_FILE
from gptjet.service.governance.review import Flagged, ReviewQueue

Invoke = Callable[..., Awaitable[Result]]
Start = Callable[..., Awaitable[asyncio.subprocess.Process]]

POLICY = """
version = 1
[review]
block_rejected = true
[[rules]]
name = "names"
action = "redact"
phrases = ["Jane Doe"]
[[rules]]
name = "keys"
on = ["output"]
action = "block"
regexes = ['sk-\\d{4}']
window = 8
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    queue = ReviewQueue(tmp_path / REVIEW_FILE)
    for number in (1, 2):
        queue.add(
            [
                Flagged(
                    rule="watch",
                    digest=f"d{number}",
                    request_id=f"r-{number}",
                    method="Generate",
                    direction="output",
                    field="sequences[0]",
                    start=0,
                    end=3,
                    excerpt="some text",
                )
            ]
        )
    queue.close()
    return tmp_path


async def test_check_explains_the_rules(invoke: Invoke, policy: Path) -> None:
    result = await invoke("policy", "check", str(policy))
    assert result.exit_code == ExitCode.OK
    assert "names: redact 1 phrases (folded) in input and output" in result.stdout
    assert "keys: block 1 expressions of at most 8 characters (folded) in output" in result.stdout
    assert "what a reviewer rejected is blocked" in result.stdout


async def test_check_tries_a_text_in_the_direction_that_is_named(
    invoke: Invoke, policy: Path
) -> None:
    text = "jane doe has sk-1234 x"
    result = await invoke("policy", "check", str(policy), "--text", text)
    assert "leaves: '[names] has sk-1234 x'" in result.stdout
    result = await invoke(
        *("policy", "check", str(policy), "--text", "-", "--direction", "output", "--json"),
        stdin=text.encode(),
    )
    trial = json.loads(result.stdout)["text"]
    assert (trial["verdict"], trial["result"]) == ("block", "[names] has ")
    assert trial["findings"][1] == {
        "rule": "keys",
        "action": "block",
        "start": 13,
        "end": 20,
        "matched": "sk-1234",
    }


async def test_check_names_what_is_wrong_and_exits_with_usage(invoke: Invoke, policy: Path) -> None:
    policy.write_text(POLICY.replace("{4}", "+"))
    result = await invoke("policy", "check", str(policy))
    assert result.exit_code == ExitCode.USAGE
    assert "rule 'keys'" in result.stderr
    assert "{1,40} instead of +" in result.stderr


async def test_items_are_listed_shown_and_decided(invoke: Invoke, folder: Path) -> None:
    where = ("--dir", str(folder))
    listed = await invoke("review", "list", *where)
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [
        ["1", "pending"],
        ["2", "pending"],
    ]
    shown = await invoke("review", "show", "1", *where)
    assert "'some text'" in shown.stdout
    rejected = await invoke(
        *("review", "reject", "1", *where, "--reviewer", "ada", "--note", "no", "--json")
    )
    item = json.loads(rejected.stdout)
    assert (item["status"], item["decisions"][0]["reviewer"]) == ("rejected", "ada")
    approved = await invoke("review", "approve", "2", "--reviewer", "bob", *where)
    assert "approved by bob" in approved.stdout
    assert (await invoke("review", "list", *where)).stdout == "no pending items\n"
    everything = await invoke("review", "list", "--status", "all", "--json", *where)
    assert [item["status"] for item in json.loads(everything.stdout)] == ["rejected", "approved"]


async def test_the_folder_can_be_named_by_the_servers_variable(
    invoke: Invoke, folder: Path
) -> None:
    result = await invoke("review", "list", env={"GPTJET_GOVERNANCE_DIR": str(folder)})
    assert len(result.stdout.splitlines()) == 2


async def test_what_is_not_there_is_said_in_one_line(
    invoke: Invoke, folder: Path, tmp_path: Path
) -> None:
    result = await invoke("review", "show", "9", "--dir", str(folder))
    assert (result.exit_code, "no item 9" in result.stderr) == (ExitCode.FAILURE, True)
    result = await invoke("review", "list", "--dir", str(tmp_path / "none"))
    assert (result.exit_code, "no review queue" in result.stderr) == (ExitCode.USAGE, True)


async def test_a_policy_without_its_folder_is_refused(invoke: Invoke, policy: Path) -> None:
    result = await invoke("serve", "--governance-policy", str(policy))
    assert result.exit_code == ExitCode.USAGE
    assert "governance_dir must be given" in result.stderr


async def test_governance_settings_come_from_flag_environment_and_file(
    invoke: Invoke, tmp_path: Path
) -> None:
    file = tmp_path / "gptjet.toml"
    file.write_text("governance_audit_files = 2\ngovernance_timeout_s = 3\n")
    result = await invoke(
        *("serve", "--print-config", "--json", "--config", str(file), "--governance-fail-open"),
        env={"GPTJET_GOVERNANCE_TIMEOUT_S": "4"},
    )
    shown = json.loads(result.stdout)
    assert shown["governance_audit_files"] == {"value": 2, "source": str(file)}
    assert shown["governance_timeout_s"] == {"value": 4.0, "source": "GPTJET_GOVERNANCE_TIMEOUT_S"}
    assert shown["governance_fail_open"] == {"value": True, "source": "--governance-fail-open"}


async def test_the_embedded_model_is_governed_and_sighup_reads_the_policy_again(
    start_cli: Start, tmp_path: Path
) -> None:
    """What the model says of itself, without a policy, is what must not leave with one."""
    policy, folder = tmp_path / "policy.toml", tmp_path / "governance"
    rule = 'version = 1\n[[rules]]\nname = "r"\naction = "{}"\nphrases = ["{}"]\non = ["output"]\n'
    policy.write_text(rule.format("block", "nothing of the kind \\u4e9c"))
    port_file = tmp_path / "port"
    process = await start_cli(
        *("serve", "--port", "0", "--port-file", str(port_file), "--backend", "huggingface"),
        *("--governance-policy", str(policy), "--governance-dir", str(folder)),
    )
    async with asyncio.timeout(120):
        while not port_file.exists():
            await asyncio.sleep(0.05)
            assert process.returncode is None, (await process.communicate())[1].decode()
    client = AsyncClient(f"127.0.0.1:{port_file.read_text().strip()}")
    await client.wait_until_serving(120)
    free = await client.generate("The food was", max_new_tokens=24)
    word = max(free.text.split()[2:], key=len)
    policy.write_text(rule.format("redact", word))
    process.send_signal(signal.SIGHUP)

    async def redacted() -> bool:
        answer = await client.generate("The food was", max_new_tokens=24)
        return bool(answer.text == free.text.replace(word, "[r]"))

    async with asyncio.timeout(30):
        while not await redacted():
            await asyncio.sleep(0.05)
    answer = await client.generate("The food was", max_new_tokens=24, logprobs=2)
    assert word not in await client.detokenize(answer.sequences[0].token_ids)
    stream = client.generate_stream("The food was", max_new_tokens=24)
    assert "".join([chunk.text async for chunk in stream]) == answer.text
    policy.write_text(rule.format("block", word))
    process.send_signal(signal.SIGHUP)

    async def blocked() -> bool:
        try:
            await client.generate("The food was", max_new_tokens=24)
        except PolicyBlockedError:
            return True
        return False

    async with asyncio.timeout(30):
        while not await blocked():
            await asyncio.sleep(0.05)
    await client.close()
    process.send_signal(signal.SIGTERM)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
