"""`gptjet models`: what a server is serving."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptjet.service.commands.connection import ConnectionFlags, connect
from gptjet.service.commands.flags import expand_flags
from gptjet.service.commands.terminal import ExitCode

if TYPE_CHECKING:
    from gptjet.service.client import HealthStatus, ModelInfo, ParityVerdict

HELP = """Show what a server is serving, its limits and its health.

It answers while the model loads, too; the exit code is 4 then, and 0 once the health is SERVING. \
With `--health` it asks for the health alone, as a probe does: without a token where the server \
runs with `--open-health`.
"""

EXAMPLES = """Examples:

$ gptjet models
$ gptjet models --server gpu-box:50051 --wait 60
$ gptjet models --json | jq .max_context
$ gptjet models --health --timeout 5
"""


@expand_flags
def models(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    health_only: Annotated[
        bool, typer.Option("--health", help="ask grpc.health.v1 and nothing else")
    ] = False,
    connection: ConnectionFlags,
) -> None:
    """Ask for the model and the health, or the latter alone, and print it."""
    from gptjet.service.client import HealthStatus

    with connect(connection) as client:
        model = None if health_only else client.get_model()
        health = client.health(timeout_s=connection.timeout_s)
    if as_json:
        fields: dict[str, Any] = {"server": connection.server, "health": health.value}
        if model is not None:
            fields |= {**asdict(model), "kv_cache_tokens": _kv_cache_tokens(model)}
        typer.echo(json.dumps(fields, indent=2, ensure_ascii=False))
    elif model is None:
        typer.echo(health.value.replace("_", " "))
    else:
        typer.echo(_table(connection.server, model, health))
    if health is not HealthStatus.SERVING:
        raise typer.Exit(ExitCode.REFUSED)


def _table(server: str, model: ModelInfo, health: HealthStatus) -> str:
    is_serving = health.value == "serving"
    status = typer.style(
        health.value.replace("_", " "), fg="green" if is_serving else "yellow", bold=True
    )
    rows = [("server", f"{server} (version {model.server_version})"), ("health", status)]
    rows += [("model", model.name), ("backend", model.backend)]
    if is_serving:
        rows += [
            ("architecture", f"{model.architecture}, {_parameters(model.num_parameters)}"),
            ("device", f"{model.device}, {model.dtype}"),
            ("parity", _parity(model.parity)),
            ("context", f"{model.max_context} tokens, vocabulary {model.vocab_size}"),
            (
                "concurrency",
                f"{model.max_sequences} sequences, {model.max_batch_size} in one step",
            ),
            (
                "KV cache",
                f"{_kv_cache_tokens(model)} tokens "
                f"({model.num_kv_blocks} blocks of {model.block_size})",
            ),
        ]
    rows.append(("queue", f"{model.max_queue_size} requests, n up to {model.max_n}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{typer.style(f'{name:<{width}}', dim=True)}  {value}" for name, value in rows
    )


def _kv_cache_tokens(model: ModelInfo) -> int:
    return model.num_kv_blocks * model.block_size


def _parameters(count: int) -> str:
    """`6.05 B parameters`."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.2f}{unit} parameters"
    return f"{count} parameters"


def _parity(parity: ParityVerdict) -> str:
    words = parity.status.replace("_", " ")
    if parity.tokens_compared:
        words += f", {parity.tokens_agreed} of {parity.tokens_compared} tokens agree"
    return f"{words} ({parity.detail})" if parity.detail else words
