"""SamplingParams as flags. A test compares them with the engine's fields and defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from gptjet.service.engine.request import MAX_STOP_STRINGS, SamplingParams

_LENGTH = "Length"
_RANDOMNESS = "Randomness"
_REPETITION = "Repetition"
_OUTPUT = "Output"

# Upper limits of the served model, which only the server knows.
_ANY_MODEL = 2**31

# What is not the field's name with hyphens: what is given several times reads as one.
_FLAG_OF = {
    "stop_token_ids": "--stop-token-id",
    "token_ids.ids": "--token-ids",
    "prompt": "the prompt",
    "text": "the prompt",
    "candidates": "--candidate",
    "calibration_prompt": "--calibration",
    "calibration_text": "--calibration",
    "": "the request",
}


def flag_of(field: str) -> str:
    """What was typed for a field of the wire: `sampling_params.stop[1]` -> `--stop`."""
    name = field.removeprefix("sampling_params.").partition("[")[0]
    return _FLAG_OF.get(name, "--" + name.replace("_", "-"))


@dataclass(frozen=True)
class SamplingFlags:
    """Every field of SamplingParams, as one types it."""

    max_new_tokens: Annotated[
        int, typer.Option(help="most tokens to generate, 1 or more", rich_help_panel=_LENGTH)
    ] = 64
    min_new_tokens: Annotated[
        int, typer.Option(help="do not end before this many tokens", rich_help_panel=_LENGTH)
    ] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help=f"end before this text appears; repeat it for up to {MAX_STOP_STRINGS}; a newline "
            "is --stop $'\\n' in most shells",
            rich_help_panel=_LENGTH,
        ),
    ] = None
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option(
            "--stop-token-id",
            metavar="ID",
            min=0,
            help="end at this token id, besides the model's own; repeatable",
            rich_help_panel=_LENGTH,
        ),
    ] = None
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="go on at the model's end-of-text", rich_help_panel=_LENGTH
        ),
    ] = False

    temperature: Annotated[
        float,
        typer.Option(
            help="0 takes the likeliest token; the larger, the more random",
            rich_help_panel=_RANDOMNESS,
        ),
    ] = 0.0
    top_k: Annotated[
        int, typer.Option(help="keep the k likeliest tokens; 0: all", rich_help_panel=_RANDOMNESS)
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            help="keep the likeliest tokens that make up this probability, in (0, 1]",
            rich_help_panel=_RANDOMNESS,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        typer.Option(
            help="drop tokens less likely than this share of the likeliest, in [0, 1]",
            rich_help_panel=_RANDOMNESS,
        ),
    ] = 0.0
    typical_p: Annotated[
        float,
        typer.Option(
            help="locally typical sampling: probability to keep, in (0, 1]",
            rich_help_panel=_RANDOMNESS,
        ),
    ] = 1.0
    seed: Annotated[
        int | None,
        typer.Option(
            help="same seed, same request, same tokens; unset: drawn, and shown afterwards",
            rich_help_panel=_RANDOMNESS,
        ),
    ] = None
    n: Annotated[
        int,
        typer.Option("--n", "-n", min=1, help="sequences to generate", rich_help_panel=_RANDOMNESS),
    ] = 1
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=BIAS",
            help="add to the logit of a token id, in [-100, 100]; repeatable",
            rich_help_panel=_RANDOMNESS,
        ),
    ] = None

    repetition_penalty: Annotated[
        float,
        typer.Option(
            help="larger than 1: tokens of prompt and output become less likely; above 0",
            rich_help_panel=_REPETITION,
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        typer.Option(
            help="subtracted from logits of generated tokens, once, in [-2, 2]",
            rich_help_panel=_REPETITION,
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(
            help="subtracted from logits of generated tokens, per occurrence, in [-2, 2]",
            rich_help_panel=_REPETITION,
        ),
    ] = 0.0
    no_repeat_ngram_size: Annotated[
        int,
        typer.Option(
            help="no n-gram of this many tokens occurs twice; 0: off",
            rich_help_panel=_REPETITION,
        ),
    ] = 0
    prompt_lookup_tokens: Annotated[
        int,
        typer.Option(
            help="guess up to this many tokens a step by prompt lookup, 0 (off) to 16; the output "
            "stays the same",
            rich_help_panel=_OUTPUT,
        ),
    ] = 0

    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="log-probabilities of each token and its K likeliest alternatives, 0 to 20 "
            "(needs --json)",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    echo: Annotated[
        bool,
        typer.Option("--echo", help="print the prompt before the output", rich_help_panel=_OUTPUT),
    ] = False

    def to_params(self) -> SamplingParams:
        """The engine's SamplingParams. Raises ValueError, one line a flag that cannot be used."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        params = SamplingParams(
            **values
            | {
                "stop": tuple(self.stop or ()),
                "stop_token_ids": tuple(self.stop_token_ids or ()),
                "logit_bias": _parse_logit_bias(self.logit_bias or []),
            }
        )
        problems = [
            f"{flag_of(violation.field)}: {violation.description}"
            for violation in params.violations(vocab_size=_ANY_MODEL, max_n=_ANY_MODEL)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return params


def _parse_logit_bias(entries: list[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for entry in entries:
        token_id, separator, bias = entry.partition("=")
        try:
            if not separator or int(token_id) < 0:
                raise ValueError(entry)
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise ValueError(
                f"--logit-bias: must be ID=BIAS, such as 50256=-5, got {entry!r}"
            ) from None
    return biases
