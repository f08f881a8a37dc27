"""`gptjet policy`: check a policy file, and try it on a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptjet.service.commands.terminal import ExitCode, fail, printable

if TYPE_CHECKING:
    from gptjet.service.governance.guard import Guard
    from gptjet.service.governance.policy import Policy
    from gptjet.service.governance.policy_file import Direction, RuleSettings

_CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}

HELP = """Check a policy file, and try it on a text.

A policy says what may go into the model and what may come out: `gptjet serve --governance-policy`.
"""

EXAMPLES = """Examples:

$ gptjet policy check policy.toml
$ gptjet policy check policy.toml --text "Call +1 650 253 0000" --direction output
$ gptjet policy check policy.toml --text - --json < prompt.txt
"""

app = typer.Typer(
    help=HELP,
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    context_settings=_CONTEXT_SETTINGS,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Keep `check` a sub-command while it is the only one."""


@app.command(
    name="check", help="Validate a policy file and explain it.", context_settings=_CONTEXT_SETTINGS
)
def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="the policy, as TOML", show_default=False)
    ],
    *,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="TEXT", help="apply it to this text; - reads it from stdin"),
    ] = None,
    direction: Annotated[
        Literal["input", "output"],
        typer.Option("--direction", help="whether the text is a prompt or an output"),
    ] = "input",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Load the file, say what it does, and what it does to a text."""
    from gptjet.service.governance.policy import load_policy
    from gptjet.service.governance.policy_file import PolicyError

    try:
        policy = load_policy(file)
    except PolicyError as error:
        fail(str(error), ExitCode.USAGE)
    report: dict[str, Any] = {"file": str(file), "digest": policy.digest, "rules": _rules(policy)}
    if text is not None:
        report["text"] = _try(policy, sys.stdin.read() if text == "-" else text, direction)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"{file}: usable, {len(report['rules'])} rules (digest {policy.digest})")
    for rule in report["rules"]:
        typer.echo(f"  {rule['name']}: {rule['action']} {rule['what']} in {rule['on']}")
    if policy.settings.review.block_rejected:
        typer.echo("  what a reviewer rejected is blocked")
    if "text" in report:
        _print_trial(report["text"])


def _rules(policy: Policy) -> list[dict[str, str]]:
    return [
        {
            "name": settings.name,
            "action": settings.action,
            "kind": rule.kind,
            "what": _what(settings),
            "on": " and ".join(settings.on),
        }
        for settings, rule in zip(policy.settings.rules, policy.rules, strict=True)
    ]


def _what(settings: RuleSettings) -> str:
    if settings.personal_data:
        regions = f" (numbers as in {', '.join(settings.regions)})" if settings.regions else ""
        return f"personal data: {', '.join(settings.personal_data)}{regions}"
    if settings.max_characters is not None:
        return f"more than {settings.max_characters} characters"
    if settings.languages:
        return (
            f"languages other than {', '.join(settings.languages)}, from "
            f"{settings.min_characters} characters on"
        )
    parts = []
    if settings.phrases:
        parts.append(f"{len(settings.phrases)} phrases")
    if settings.phrases_file is not None:
        parts.append(f"the phrases of {settings.phrases_file}")
    if settings.regexes:
        parts.append(f"{len(settings.regexes)} expressions of at most {settings.window} characters")
    manner = "folded" if settings.fold else "exact"
    return f"{', '.join(parts)} ({manner}{', whole words' if settings.whole_words else ''})"


def _try(policy: Policy, text: str, direction: Direction) -> dict[str, Any]:
    from gptjet.service.governance.guard import Guard

    guard = Guard(policy.chains[direction], lambda _rule, _matched: False)
    guard.push(text)
    guard.finish()
    return {
        "direction": direction,
        "verdict": _verdict(guard),
        "result": guard.release(),
        "findings": [
            {
                "rule": finding.rule.name,
                "action": finding.action,
                "start": finding.start,
                "end": finding.end,
                "matched": finding.matched,
            }
            for finding in guard.findings
        ],
    }


def _verdict(guard: Guard) -> str:
    actions = {finding.action for finding in guard.findings}
    return next((a for a in ("block", "redact", "flag") if a in actions), "pass")


def _print_trial(trial: dict[str, Any]) -> None:
    typer.echo(f"{trial['direction']}: {trial['verdict']}")
    for finding in trial["findings"]:
        where = f"characters {finding['start']} to {finding['end']}"
        typer.echo(
            f"  {finding['rule']}: {finding['action']}, {where}: {printable(finding['matched'])!r}"
        )
    typer.echo(f"  leaves: {printable(trial['result'])!r}")
