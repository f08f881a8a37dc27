"""The flags of `gptjet generate`: every sampling parameter, and what a bad value gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import MISSING, fields
from typing import Any

import pytest
from typer.testing import Result

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.cli import load_command
from gptjet.service.commands.sampling import SamplingFlags, flag_of
from gptjet.service.commands.terminal import ExitCode
from gptjet.service.engine.request import Request, SamplingParams

Invoke = Callable[..., Awaitable[Result]]

# One value for each flag that is not its default, and what the server must receive.
EVERY_FLAG: dict[str, tuple[list[str], object]] = {
    "max_new_tokens": (["9"], 9),
    "min_new_tokens": (["2"], 2),
    "temperature": (["0.7"], 0.7),
    "top_k": (["5"], 5),
    "top_p": (["0.9"], 0.9),
    "min_p": (["0.05"], 0.05),
    "typical_p": (["0.8"], 0.8),
    "repetition_penalty": (["1.2"], 1.2),
    "presence_penalty": (["-0.5"], -0.5),
    "frequency_penalty": (["0.25"], 0.25),
    "no_repeat_ngram_size": (["3"], 3),
    "prompt_lookup_tokens": (["4"], 4),
    "seed": (["18446744073709551615"], 2**64 - 1),
    "n": (["2"], 2),
    "stop": (["END", "\n\n"], ("END", "\n\n")),
    "stop_token_ids": (["46", "33"], (46, 33)),
    "ignore_eos": ([], True),
    "logprobs": (["2"], 2),
    "echo": ([], True),
    "logit_bias": (["97=-1.5", "98=2"], {97: -1.5, 98: 2.0}),
}


def test_flags_and_sampling_params_are_the_same_with_the_same_defaults() -> None:
    assert {f.name for f in fields(SamplingFlags)} == {f.name for f in fields(SamplingParams)}
    assert {f.name for f in fields(SamplingFlags)} == set(
        pb.SamplingParams.DESCRIPTOR.fields_by_name
    )
    assert all(f.default is not MISSING for f in fields(SamplingFlags))
    assert SamplingFlags().to_params() == SamplingParams()


def test_the_name_of_a_flag_for_a_field_is_a_flag_that_exists() -> None:
    flags = {opt for parameter in load_command("generate").params for opt in parameter.opts}
    for field in fields(SamplingParams):
        assert flag_of(f"sampling_params.{field.name}[0]") in flags
    assert {flag_of("request_id"), flag_of("token_ids.ids[3]")} <= flags


async def test_every_flag_reaches_the_engine(
    start_server: Any, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_server()
    received: list[Request] = []
    submit = running.server.engine.submit

    def recording_submit(request: Request) -> Any:
        received.append(request)
        return submit(request)

    monkeypatch.setattr(running.server.engine, "submit", recording_submit)
    arguments = []
    for name, (values, _) in EVERY_FLAG.items():
        flag = flag_of(name)
        arguments += [word for value in values for word in (flag, value)] or [flag]
    result = await invoke(
        *("generate", "abc", "--json", "--server", running.target, "--request-id", "mine"),
        *arguments,
    )
    assert result.exit_code == ExitCode.OK, result.stderr
    expected = SamplingParams(**{name: value for name, (_, value) in EVERY_FLAG.items()})  # type: ignore[arg-type]
    assert received[0].sampling_params == expected
    assert received[0].request_id == "mine"
    default = SamplingParams()
    assert all(getattr(expected, f.name) != getattr(default, f.name) for f in fields(default))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--top-p", "2"], "--top-p: must be in (0, 1], got 2.0"),
        (["--temperature", "-1"], "--temperature: must be a finite number, 0 or more, got -1.0"),
        (["--temperature", "nan"], "--temperature: must be a finite number"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be 1 or more, got 0"),
        (["--max-new-tokens", "-3"], "--max-new-tokens: must be 1 or more, got -3"),
        (["--top-k", "-1"], "--top-k: must be 0 (off) or more, got -1"),
        (["--stop", ""], "--stop: must not be empty"),
        (["--logprobs", "21", "--json"], "--logprobs: must be 0 to 20, got 21"),
        (["--seed", "-1"], "--seed: must be in [0, 2**64), got -1"),
        (["--logit-bias", "5"], "--logit-bias: must be ID=BIAS, such as 50256=-5, got '5'"),
        (["--logit-bias", "-5=1"], "--logit-bias: must be ID=BIAS"),
        (["--logit-bias", "5=101"], "--logit-bias: must be in [-100, 100], got 101.0"),
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["--n", "0"], "'--n'"),
        (["--stop-token-id", "-1"], "'--stop-token-id'"),
        (["--timeout", "0"], "--timeout: must be above 0, got 0"),
        (["--model", "x"], "--model needs --in-process"),
        (["--tls-ca", "missing.pem"], "missing.pem: No such file or directory"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key must be given together"),
        (["--max-new-tokens", "some"], "'--max-new-tokens'"),
        (["--token-ids", "1,2"], "give the prompt as text, or - for stdin, or --token-ids"),
    ],
)
async def test_a_bad_flag_is_named_with_its_limit_before_any_server_is_asked(
    invoke: Invoke, flags: list[str], problem: str
) -> None:
    result = await invoke("generate", "abc", "--server", "127.0.0.1:1", *flags)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert problem in result.stderr
    assert not result.stdout


async def test_all_bad_flags_are_named_at_once(invoke: Invoke) -> None:
    result = await invoke("generate", "abc", "--top-p", "2", "--min-p", "2")
    assert "--top-p: " in result.stderr
    assert "--min-p: " in result.stderr


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["abc", "--max-new-tokens", "600"], "--max-new-tokens: prompt (3) + max_new_tokens (600)"),
        (["abc", "--n", "17"], "--n: must be 1 to 16 (max_n), got 17"),
        (["abc", "--stop-token-id", "257"], "--stop-token-id: must be below the vocabulary of 257"),
        ([""], "the prompt: must hold at least one token"),
        (["a" * 512], "the prompt: must leave room for one token in the context of 512"),
        (["--token-ids", "1,999"], "--token-ids: must be below the vocabulary of 257, got 999"),
    ],
)
async def test_limits_of_the_model_are_named_alike_by_a_server_and_in_process(
    start_server: Any, invoke: Invoke, flags: list[str], problem: str
) -> None:
    running = await start_server()
    asked = await invoke("generate", *flags, "--server", running.target)
    here = await invoke("generate", *flags, "--in-process", "--backend", "mock")
    assert asked.exit_code == here.exit_code == ExitCode.USAGE
    assert problem in asked.stderr
    assert here.stderr == asked.stderr
