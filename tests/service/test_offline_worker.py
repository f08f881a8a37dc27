"""The engine over standard streams: what is asked, what is answered, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from gptjet.service import offline_worker
from gptjet.service.backends.mock import MockBackend
from gptjet.service.engine.backend import ScheduledBatch
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.tokenizer import ByteTokenizer


@pytest.fixture
def engine() -> Engine:
    return Engine(MockBackend(max_context=64), ByteTokenizer())


def test_a_prompt_goes_on_greedily_for_exactly_the_tokens_asked_for(engine: Engine) -> None:
    """After "ab" comes "cde". Z's successor is end-of-text, which ends nothing here."""
    made = offline_worker.answer(engine, {"prompt": list(b"ab"), "output_tokens": 3})
    assert bytes(made["tokens"]) == b"cde"
    assert made["token_ms"] == sorted(made["token_ms"])
    assert 0 < made["token_ms"][0] <= made["token_ms"][-1] <= made["e2e_ms"]
    assert made["peak_memory_bytes"] > 10 * 2**20
    after_the_end = offline_worker.answer(engine, {"prompt": list(b"XY"), "output_tokens": 5})
    assert len(after_the_end["tokens"]) == 5


def test_several_prompts_share_their_decode_steps(engine: Engine) -> None:
    sizes: list[int] = []
    decode = engine.backend.decode

    def count(batch: ScheduledBatch) -> Any:
        sizes.append(len(batch.sequences))
        return decode(batch)

    engine.backend.decode = count  # type: ignore[method-assign]
    made = offline_worker.answer(engine, {"prompts": [list(b"ab"), list(b"k")], "output_tokens": 4})
    assert [bytes(stream["tokens"]) for stream in made["streams"]] == [b"cdef", b"lmno"]
    assert max(sizes) == 2


def test_a_late_prompt_comes_when_every_stream_has_the_tokens_asked_for(engine: Engine) -> None:
    lengths: list[list[int]] = []
    prefill = engine.backend.prefill

    def watched(batch: ScheduledBatch) -> Any:
        lengths.append([len(sequence.token_ids) for sequence in batch.sequences])
        return prefill(batch)

    engine.backend.prefill = watched  # type: ignore[method-assign]
    late = {"prompt": list(b"klm"), "after_tokens": 3}
    asked = {"prompts": [list(b"a"), list(b"b")], "output_tokens": 9, "late": late}
    made = offline_worker.answer(engine, asked)
    assert [bytes(stream["tokens"]) for stream in made["streams"]] == [b"bcdefghij", b"cdefghijk"]
    assert lengths[-1] == [3]
    times = made["streams"][0]["token_ms"]
    assert times[2] <= made["late"]["added_ms"] <= times[4]
    assert 0 < made["late"]["ttft_ms"] < made["e2e_ms"]
    never = offline_worker.answer(engine, asked | {"late": {"prompt": [1], "after_tokens": 99}})
    assert "never came: after 99 tokens" in never["error"]


def test_what_a_child_held_while_loading_counts_with_what_this_process_held() -> None:
    watch = offline_worker._Loading()
    with watch:
        held = "import sys; b = bytearray(60 << 20); sys.stdin.read()"
        own = offline_worker.peak_memory_bytes()
        assert own is not None
        # At the end of the block its input ends, and so does it.
        with subprocess.Popen([sys.executable, "-S", "-c", held], stdin=subprocess.PIPE):
            end = time.monotonic() + 60
            while watch.peak_bytes <= own + (60 << 20):
                assert time.monotonic() < end
                time.sleep(0.01)
    alone = offline_worker._Loading()
    with alone:
        pass
    assert alone.peak_bytes == 0


def test_a_prompt_that_does_not_fit_is_refused_and_the_next_one_runs(engine: Engine) -> None:
    refused = offline_worker.answer(
        engine, {"prompts": [[1], list(range(100))], "output_tokens": 4}
    )
    assert "context of 64" in refused["error"]
    assert not engine.has_work  # not even the prompt that was fine
    assert "tokens" in offline_worker.answer(engine, {"prompt": [1], "output_tokens": 2})


def test_a_failing_step_is_an_error_and_not_a_short_answer(engine: Engine) -> None:
    def fail(batch: ScheduledBatch) -> Any:
        raise RuntimeError("broken")

    engine.backend.decode = fail  # type: ignore[method-assign]
    failed = offline_worker.answer(engine, {"prompt": [1], "output_tokens": 2})
    assert "the engine failed in a step" in failed["error"]
    assert not engine.has_work


def talk(*arguments: str, lines: str = "") -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "gptjet.service.offline_worker", *arguments]
    result = subprocess.run(
        command, input=lines, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    return result.returncode, [json.loads(line) for line in result.stdout.splitlines()]


def test_the_process_says_ready_answers_a_line_each_and_ends_with_its_input() -> None:
    asked = json.dumps({"prompt": list(b"a"), "output_tokens": 2}) + "\n"
    code, (ready, first, second) = talk("--backend=mock", "--model=any", lines=2 * asked)
    assert (code, ready["ready"]) == (0, True)
    assert bytes(first["tokens"]) == bytes(second["tokens"]) == b"bc"


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_1() -> None:
    code, (said,) = talk("--backend=huggingface", "--model=no/such/folder/here")
    assert code == 1
    assert "\n" not in said["error"]
    assert "no/such/folder/here" in said["error"]
