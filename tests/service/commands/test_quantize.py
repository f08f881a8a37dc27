"""`gptjet quantize` from its flags to its table, and every way to be refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import Result

from gptjet.service.commands.terminal import ExitCode
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import resolve_checkpoint
from gptjet.service.models.fused.weights import load_fused_weights

Invoke = Callable[..., Awaitable[Result]]
TEXT = "It rained in the morning. " * 40


@pytest.fixture
def source(make_gptj_checkpoint: Callable[..., Path]) -> str:
    return str(make_gptj_checkpoint())


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


async def test_int8_prints_size_and_perplexity_before_and_after(
    source: str, text: str, tmp_path: Path, invoke: Invoke
) -> None:
    output = str(tmp_path / "out")
    result = await invoke("quantize", source, output, "--bits", "8", "--text", text)
    assert result.exit_code == ExitCode.OK, result.output
    rows = dict(re.split("  +", line.strip(), maxsplit=1) for line in result.stdout.splitlines())
    assert rows["written"] == output
    assert rows["weights"] == "INT8 by rtn"
    assert rows["perplexity"] == f"{len(TEXT) - -(-len(TEXT) // 64)} tokens of text.txt"
    before, after = float(rows["before"]), float(rows["after"])
    assert before != after
    assert float(rows["delta"].rstrip("%")) == pytest.approx(100 * (after / before - 1), abs=1e-2)
    assert "calibration" not in rows
    assert load_fused_weights(resolve_checkpoint(output), "int8").quantization is not None


async def test_json_has_the_recipe_and_the_figures(
    source: str, text: str, tmp_path: Path, invoke: Invoke
) -> None:
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("Rain, snow and a little sun. " * 30)
    result = await invoke(
        *("quantize", source, str(tmp_path / "out"), "--json", "--text", text),
        *("--calibration", str(calibration), "--calibration-tokens", "500"),
        *("--text-tokens", "200"),
    )
    assert result.exit_code == ExitCode.OK, result.output
    fields = json.loads(result.stdout)
    assert fields["recipe"]["bits"] == 4
    assert fields["recipe"]["method"] == "gptq"
    assert fields["recipe"]["calibration"]["text"] == "calibration.txt"
    assert fields["recipe"]["calibration"]["tokens"] == 500
    assert fields["perplexity_tokens"] == 200 - 4  # windows of the context, 64
    delta = fields["perplexity_after"] / fields["perplexity_before"] - 1
    assert fields["perplexity_delta"] == pytest.approx(delta)
    assert fields["output_bytes"] < fields["source_bytes"] / 4
    assert fields["text"] == "text.txt"


async def test_without_evaluation_it_only_writes(
    source: str, tmp_path: Path, invoke: Invoke
) -> None:
    result = await invoke("quantize", source, str(tmp_path / "out"), "--bits", "8", "--no-evaluate")
    assert result.exit_code == ExitCode.OK
    assert "perplexity" not in result.stdout


async def test_one_text_for_both_is_said_to_flatter(
    source: str, text: str, tmp_path: Path, invoke: Invoke
) -> None:
    result = await invoke(
        "quantize", source, str(tmp_path / "out"), "--text", text, "--calibration", text
    )
    assert result.exit_code == ExitCode.OK
    assert "the delta flatters" in result.stderr


async def test_an_earlier_result_is_kept_without_force_and_replaced_with_it(
    source: str, tmp_path: Path, invoke: Invoke
) -> None:
    output = tmp_path / "out"
    command = ["quantize", source, str(output), "--no-evaluate", "--method", "rtn"]
    assert (await invoke(*command, "--bits", "8")).exit_code == ExitCode.OK
    refused = await invoke(*command)
    assert refused.exit_code == ExitCode.USAGE
    assert "give --force to replace it" in refused.stderr
    load_fused_weights(resolve_checkpoint(str(output)), "int8")
    assert (await invoke(*command, "--force")).exit_code == ExitCode.OK
    load_fused_weights(resolve_checkpoint(str(output)), "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--bits", "5"], "bits must be 4 or 8, got 5"),
        (["--bits", "8", "--method", "gptq"], "method gptq is for 4 bits"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--calibration", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
async def test_unusable_flags_are_one_line_before_anything_is_written(
    flags: list[str], problem: str, source: str, tmp_path: Path, invoke: Invoke
) -> None:
    result = await invoke("quantize", source, str(tmp_path / "out"), *flags)
    assert result.exit_code == ExitCode.USAGE
    assert problem in result.stderr
    assert list(tmp_path.iterdir()) == []


async def test_models_that_cannot_be_quantised_are_refused_saying_why(
    source: str,
    tmp_path: Path,
    make_causal_lm_checkpoint: Callable[..., Path],
    invoke: Invoke,
) -> None:
    result = await invoke("quantize", str(tmp_path / "none"), str(tmp_path / "out"))
    assert (result.exit_code, "there is no folder" in result.stderr) == (ExitCode.USAGE, True)

    other = make_causal_lm_checkpoint("gpt2", n_layer=1, n_embd=32, n_head=2, vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(source) / name, other / name)
    result = await invoke("quantize", str(other), str(tmp_path / "out"), "--no-evaluate")
    assert result.exit_code == ExitCode.USAGE
    assert "GPT2LMHeadModel is not of the GPT-J family" in result.stderr

    quantized = str(tmp_path / "quantized")
    await invoke("quantize", source, quantized, "--bits", "8", "--no-evaluate")
    result = await invoke("quantize", quantized, str(tmp_path / "out"))
    assert result.exit_code == ExitCode.USAGE
    assert "is quantised already" in result.stderr
    assert not (tmp_path / "out").exists()


async def test_interrupted_run_leaves_nothing(
    source: str, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptjet.service.quantization import convert

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_round", interrupt)
    output = str(tmp_path / "out")
    result = await invoke("quantize", source, output, "--bits", "8", "--no-evaluate")
    assert result.exit_code == ExitCode.INTERRUPTED
    assert "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


async def test_shard_that_cannot_be_written_is_one_line_and_leaves_nothing(
    source: str, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptjet.service.quantization import writer

    def fail(_: Any, path: Path, **__: Any) -> None:
        path.write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", fail)
    output = str(tmp_path / "out")
    result = await invoke("quantize", source, output, "--bits", "8", "--no-evaluate")
    assert result.exit_code == ExitCode.USAGE
    assert "out cannot be written: I/O error: No space left on device" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_interrupt_after_the_swap_says_that_the_output_was_written(
    is_replaced: bool,
    source: str,
    text: str,
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = str(tmp_path / "out")
    command = ["quantize", source, output, "--bits", "8", "--text", text, "--force"]
    if is_replaced:
        assert (await invoke(*command, "--no-evaluate")).exit_code == ExitCode.OK
    interrupt_perplexity(monkeypatch, "after", KeyboardInterrupt())
    result = await invoke(*command)
    assert result.exit_code == ExitCode.INTERRUPTED
    assert result.stderr == f"gptjet: error: interrupted: {output} was written before that\n"
    load_fused_weights(resolve_checkpoint(output), "int8")


async def test_interrupt_before_the_swap_says_that_nothing_was_written(
    source: str, text: str, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["quantize", source, str(tmp_path / "out"), "--bits", "8", "--text", text, "--force"]
    assert (await invoke(*command, "--no-evaluate")).exit_code == ExitCode.OK
    interrupt_perplexity(monkeypatch, "before", KeyboardInterrupt())
    result = await invoke(*command)
    assert result.exit_code == ExitCode.INTERRUPTED
    assert "interrupted: nothing was written" in result.stderr


async def test_failure_after_the_swap_says_that_the_output_was_written(
    source: str, text: str, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "out")
    interrupt_perplexity(monkeypatch, "after", BackendLoadError("no memory"))
    result = await invoke("quantize", source, output, "--bits", "8", "--text", text)
    assert result.exit_code == ExitCode.USAGE
    assert f"no memory; {output} was written before that" in result.stderr


def interrupt_perplexity(monkeypatch: pytest.MonkeyPatch, when: str, error: BaseException) -> None:
    """`error` instead of the perplexity "before" or "after"."""
    from gptjet.service.quantization import run

    measure = run._perplexity

    def measure_or_not(*arguments: Any) -> Any:
        if arguments[-1] == f"perplexity {when}":
            raise error
        return measure(*arguments)

    monkeypatch.setattr(run, "_perplexity", measure_or_not)
