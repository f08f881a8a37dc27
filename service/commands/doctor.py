"""`gptjet doctor`: is this machine able to run it, and is its output right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from gptjet.service.commands.terminal import ExitCode, fail

if TYPE_CHECKING:
    from gptjet.service.doctor import Check

HELP = """Say whether this machine can run each backend, and how to mend what is in the way.

Nothing is downloaded or compiled. With --model the checkpoint is loaded into the backend \
(of auto: the first that takes it) and compared with transformers on this machine; the exit code \
is 1 where it differs, or where nothing was compared.
"""

EXAMPLES = """Examples:

$ gptjet doctor
$ gptjet doctor --json
$ gptjet doctor --model EleutherAI/gpt-j-6b
$ gptjet doctor --model EleutherAI/gpt-j-6b --backend deepspeed
"""

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor(
    *,
    model: Annotated[
        str | None,
        typer.Option(help="checkpoint to load and compare with transformers on this machine"),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="which to compare: auto, fused or deepspeed; for --model")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Examine the machine, and with `model` the output of a fast backend on it."""
    # Here, not above: it brings torch.
    from gptjet.service.doctor import examine

    diagnosis = examine()
    verdict = _compare(backend, model) if model else None
    if as_json:
        report = diagnosis.as_dict() | ({"parity": verdict} if verdict else {})
        typer.echo(json.dumps(report, indent=2))
    else:
        for check in diagnosis.checks:
            typer.echo(_lines(check))
        typer.echo(f"backends that run here: {', '.join(diagnosis.backends)}")
        if verdict:
            typer.echo(f"parity with transformers: {verdict['status']}: {verdict['detail']}")
    if verdict and verdict["status"] != "passed":
        raise typer.Exit(ExitCode.FAILURE)


def _compare(name: str, model: str) -> dict[str, object]:
    """The parity verdict of `model` in the backend called `name`."""
    from dataclasses import asdict

    from gptjet.service.backends.factory import load_backend
    from gptjet.service.engine.errors import BackendLoadError

    try:
        backend = load_backend(name, model).backend
    except BackendLoadError as error:
        fail(str(error), ExitCode.USAGE)
    verdict = asdict(backend.spec.parity)
    backend.close()
    return verdict


def _lines(check: Check) -> str:
    label = typer.style(f"{check.health:<8}", fg=_COLOURS[check.health.value], bold=True)
    lines = [f"{label} {check.name}: {check.summary}"]
    lines += [f"           {detail}" for detail in check.details]
    lines += [f"           mend:  {command}" for command in check.mend]
    return "\n".join(lines)
