"""`gptjet score`: how likely a model finds each of several continuations of one prompt."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptjet.service.commands.connection import ConnectionFlags, connect
from gptjet.service.commands.flags import expand_flags
from gptjet.service.commands.prompt import read_text
from gptjet.service.commands.server_settings import (
    MODEL_SETTINGS,
    flag_name,
    resolve,
    with_server_settings,
)
from gptjet.service.commands.terminal import ExitCode, fail, print_note, printable

if TYPE_CHECKING:
    from gptjet.service.client import ScoreResult

HELP = """Say how likely the model finds each of several continuations.

A table goes to stdout, the most probable candidate first; one line about the time follows on \
stderr. A candidate is tokenized by itself: a word after a space begins with that space.
"""

EXAMPLES = """Examples:

$ gptjet score "The food was wonderful. Sentiment:" --candidate " positive" --candidate " negative"
$ gptjet score "Great! Sentiment:" -c " good" -c " bad" --calibration "N/A Sentiment:"
$ gptjet score "The cat sat on the" -c " mat" -c " moon" --in-process
$ cat prompt.txt | gptjet score - -c " yes" -c " no" --json | jq -r .best
"""


@with_server_settings(*MODEL_SETTINGS, panel="Model (with --in-process)")
@expand_flags
def score(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT",
            help="text before the candidates; - reads it from stdin, without the newline at its "
            "end",
            show_default=False,
        ),
    ],
    *,
    candidates: Annotated[
        list[str],
        typer.Option(
            "--candidate",
            "-c",
            metavar="TEXT",
            help="a continuation to score; repeat it for up to 64",
            show_default=False,
        ),
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="the same prompt around a text without content, such as N/A: what the model "
            "thinks of a candidate after it is taken out of the probabilities",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    request_id: Annotated[
        str, typer.Option("--request-id", help="name of this request in the server's log")
    ] = "",
    in_process: Annotated[
        bool, typer.Option("--in-process", help="load the model here and ask no server")
    ] = False,
    connection: ConnectionFlags,
    settings: dict[str, Any],
) -> None:
    """Check what was typed, ask for the scores, print them."""
    text = read_text(prompt)
    for given in (*candidates, *([] if calibration is None else [calibration])):
        _refuse_surrogates(given)
    if in_process:
        result = _score_here(text, candidates, calibration, request_id, settings, connection)
    else:
        if settings:
            flag = flag_name(next(iter(settings)))
            fail(f"{flag} needs --in-process: a server has its own", ExitCode.USAGE)
        with connect(connection) as client:
            result = client.score(
                text, candidates, calibration_prompt=calibration, request_id=request_id
            )
    if as_json:
        typer.echo(json.dumps(_json_fields(result, candidates), ensure_ascii=False))
    else:
        typer.echo(_table(result, candidates))
        print_note(_summary_line(result))


def _score_here(
    prompt: str,
    candidates: list[str],
    calibration: str | None,
    request_id: str,
    settings: dict[str, Any],
    connection: ConnectionFlags,
) -> ScoreResult:
    # Here, not above: it brings torch.
    from gptjet.service.commands.local import LocalModel
    from gptjet.service.commands.local_score import score_here

    config = resolve(None, settings)
    if sys.stderr.isatty():
        print_note(f"loading {config.model} ({config.backend})")
    with contextlib.closing(LocalModel(config)) as model:
        return score_here(
            model.engine,
            prompt,
            candidates,
            calibration,
            request_id=request_id,
            timeout_s=connection.timeout_s,
        )


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()  # an argument that is not UTF-8 has surrogates
    except UnicodeError:
        fail("a candidate or the calibration is not valid UTF-8", ExitCode.USAGE)


def _json_fields(result: ScoreResult, candidates: list[str]) -> dict[str, Any]:
    """The wire's ScoreResponse as JSON, with each candidate's text and the best one beside it."""
    scores = []
    for item in result.scores:
        fields = asdict(item)
        # Of a token there is nothing here but its id and its log-probability.
        fields["tokens"] = [
            {"token_id": token.token_id, "logprob": token.logprob} for token in item.tokens
        ]
        scores.append({"text": candidates[item.index], **fields})
    return {
        "request_id": result.request_id,
        "best": candidates[result.best],
        "best_index": result.best,
        "scores": scores,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "candidate_tokens": result.candidate_tokens,
        },
        "timings": asdict(result.timings),
    }


def _table(result: ScoreResult, candidates: list[str]) -> str:
    """`probability  logprob  tokens  candidate`, the most probable first."""
    calibrated = any(item.calibration_logprob is not None for item in result.scores)
    head = ["probability", "logprob", *(["calibration"] if calibrated else []), "tokens"]
    rows = []
    for item in sorted(result.scores, key=lambda item: -item.probability):
        row = [f"{item.probability:.4f}", f"{item.logprob:.4f}"]
        if calibrated:
            prior = item.calibration_logprob
            row.append("" if prior is None else f"{prior:.4f}")
        rows.append(([*row, str(len(item.tokens))], candidates[item.index]))
    widths = [max(map(len, column)) for column in zip(head, *(row for row, _ in rows), strict=True)]

    def line(cells: list[str], last: str) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([*padded, last])

    lines = [typer.style(line(head, "candidate"), dim=True)]
    # In quotes: the space that a candidate begins with matters.
    lines += [line(row, printable(json.dumps(text, ensure_ascii=False))) for row, text in rows]
    return "\n".join(lines)


def _summary_line(result: ScoreResult) -> str:
    """`12.3 ms · 9 prompt tokens · 2 candidate tokens`."""
    return (
        f"{result.timings.e2e_ms:.1f} ms · {result.prompt_tokens} prompt tokens · "
        f"{result.candidate_tokens} candidate tokens"
    )
