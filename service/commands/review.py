"""`gptjet review`: what flag rules found, for a person to decide on."""

from __future__ import annotations

import contextlib
import getpass
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gptjet.service.commands.terminal import ExitCode, fail, printable

if TYPE_CHECKING:
    from gptjet.service.governance.review import ReviewItem, ReviewQueue, Status

_CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}

HELP = """Decide on what the policy flagged: list, show, approve, reject.

An item is a text that a rule with action flag found; the same text again is counted, not queued \
again. A decision is recorded with its reviewer and time. Rejected texts are blocked from then on \
where the policy says [review] block_rejected = true; approved ones pass as before.
"""

EXAMPLES = """Examples:

$ gptjet review list --dir /var/lib/gptjet/governance
$ gptjet review show 17 --dir /var/lib/gptjet/governance
$ gptjet review reject 17 --note "instructions for harm" --dir /var/lib/gptjet/governance
$ gptjet review list --status rejected --json | jq length
"""

app = typer.Typer(
    help=HELP,
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    context_settings=_CONTEXT_SETTINGS,
    pretty_exceptions_enable=False,
)

_Folder = Annotated[
    Path,
    typer.Option(
        "--dir",
        envvar="GPTJET_GOVERNANCE_DIR",
        help="the server's governance_dir",
        show_default=False,
    ),
]
_ItemId = Annotated[int, typer.Argument(metavar="ID", help="as listed", show_default=False)]
_AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
_Reviewer = Annotated[
    str | None,
    typer.Option("--reviewer", help="who decides (unset: the user's login name)"),
]
_Note = Annotated[str, typer.Option("--note", help="why, for those who look later")]


@app.command(name="list", help="List items, oldest first.", context_settings=_CONTEXT_SETTINGS)
def list_items(
    *,
    folder: _Folder,
    status: Annotated[
        Literal["pending", "approved", "rejected", "all"],
        typer.Option("--status", help="which items"),
    ] = "pending",
    limit: Annotated[int, typer.Option("--limit", min=1, help="at most so many")] = 100,
    as_json: _AsJson = False,
) -> None:
    """One line an item."""
    with _queue(folder) as queue:
        items = queue.items(None if status == "all" else status, limit)
    if as_json:
        typer.echo(json.dumps([asdict(item) for item in items], indent=2))
        return
    if not items:
        typer.echo(f"no {'' if status == 'all' else status + ' '}items")
    for item in items:
        typer.echo(
            f"{item.id:>5}  {item.status:<8}  {item.last_seen}  {item.rule}  {item.direction} "
            f"{item.field}  request {printable(item.request_id)}"
            + (f"  seen {item.seen} times" if item.seen > 1 else "")
        )


@app.command(help="Show one item and its decisions.", context_settings=_CONTEXT_SETTINGS)
def show(item_id: _ItemId, *, folder: _Folder, as_json: _AsJson = False) -> None:
    """All that is known of an item."""
    with _queue(folder) as queue:
        _print(queue.item(item_id), as_json=as_json)


@app.command(help="Let this text pass.", context_settings=_CONTEXT_SETTINGS)
def approve(
    item_id: _ItemId,
    *,
    folder: _Folder,
    reviewer: _Reviewer = None,
    note: _Note = "",
    as_json: _AsJson = False,
) -> None:
    """Record an approval."""
    _decide(item_id, "approved", folder, reviewer, note, as_json=as_json)


@app.command(
    help="Refuse this text; a policy with block_rejected blocks it.",
    context_settings=_CONTEXT_SETTINGS,
)
def reject(
    item_id: _ItemId,
    *,
    folder: _Folder,
    reviewer: _Reviewer = None,
    note: _Note = "",
    as_json: _AsJson = False,
) -> None:
    """Record a rejection."""
    _decide(item_id, "rejected", folder, reviewer, note, as_json=as_json)


def _decide(
    item_id: int, status: Status, folder: Path, reviewer: str | None, note: str, *, as_json: bool
) -> None:
    with _queue(folder) as queue:
        item = queue.decide(item_id, status, _login() if reviewer is None else reviewer, note)
    _print(item, as_json=as_json)


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        fail("who decides? give --reviewer", ExitCode.USAGE)


@contextlib.contextmanager
def _queue(folder: Path) -> Iterator[ReviewQueue]:
    from gptjet.service.governance.governance import REVIEW_FILE
    from gptjet.service.governance.review import ReviewError, ReviewQueue

    try:
        queue = ReviewQueue(folder / REVIEW_FILE, must_exist=True)
    except ReviewError as error:
        fail(str(error), ExitCode.USAGE)
    try:
        yield queue
    except ReviewError as error:
        fail(str(error), ExitCode.FAILURE)
    finally:
        queue.close()


def _print(item: ReviewItem, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(item), indent=2))
        return
    excerpt = "not kept (--governance-excerpts keeps it)"
    rows = {
        "item": f"{item.id}, {item.status}",
        "rule": item.rule,
        "found in": f"{item.method} {item.direction} {item.field}, characters {item.start} to "
        f"{item.end}",
        "request": printable(item.request_id),
        "seen": f"{item.seen} times, {item.first_seen} to {item.last_seen}",
        "digest": item.digest,
        "text": excerpt if item.excerpt is None else repr(printable(item.excerpt)),
    }
    for name, value in rows.items():
        typer.echo(f"{typer.style(f'{name:<9}', dim=True)} {value}")
    for decision in item.decisions:
        note = f": {printable(decision.note)}" if decision.note else ""
        typer.echo(f"{decision.decided_at}  {decision.status} by {decision.reviewer}{note}")
