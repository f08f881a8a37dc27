"""`gptjet serve`: the settings, resolved, and the server with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gptjet.service.commands.loading import follow, follows, load_model
from gptjet.service.commands.server_settings import resolve, sources, with_server_settings
from gptjet.service.commands.terminal import ExitCode, fail
from gptjet.service.config import ServerConfig

HELP = """Start the gRPC server.

It loads the model, warms it up, and then takes requests: its gRPC health says SERVING. \
SIGTERM or Ctrl-C drains: new requests are refused, running ones finish within the grace period, \
and the exit code is 0. With --reuse-port another server on the port takes over and nothing is \
refused. Exit code 6: the engine hung or failed for good; start it again.

Every setting below can also come from the environment (GPTJET_PORT for --port) or from a TOML \
file (port = 50051). A flag wins over the environment, that over the file, that over the default.
"""

EXAMPLES = """Examples:

$ gptjet serve
$ gptjet serve --model EleutherAI/gpt-j-6b --port 50051
$ gptjet serve --model ./checkpoint --device cuda --dtype float16 --host 0.0.0.0
$ gptjet serve --tls-cert server.pem --tls-key server.key --log-format json
$ gptjet serve --governance-policy policy.toml --governance-dir /var/lib/gptjet/governance
$ gptjet serve --port 50052 --print-config > gptjet.toml && gptjet serve --config gptjet.toml
"""


@with_server_settings()
def serve(
    *,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file with settings; also GPTJET_CONFIG"),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            "--dry-run",
            help="show the settings in effect and where each comes from, and start nothing",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="with --print-config: as JSON instead of TOML")
    ] = False,
    settings: dict[str, Any],
) -> None:
    """Resolve the settings and run the server until it is told to stop."""
    if as_json and not print_config:
        fail("--json is for --print-config; --log-format json is for the log", ExitCode.USAGE)
    resolved = resolve(config, settings)
    if print_config:
        where = sources(config, settings)
        typer.echo(_as_json(resolved, where) if as_json else _as_toml(resolved, where))
        return
    raise typer.Exit(_run(resolved))


def _run(config: ServerConfig) -> int:
    if follows(config):
        from gptjet.service.engine.errors import BackendLoadError

        try:
            return follow(config)
        except BackendLoadError as error:
            fail(str(error), ExitCode.USAGE)
    # Here, not above: it brings grpc and torch, and `--help` needs neither.
    from gptjet.service.rpc import process

    return process.run(config, loader=load_model)


def _as_json(config: ServerConfig, where: dict[str, str]) -> str:
    values = config.model_dump(mode="json")
    settings = {name: {"value": values[name], "source": where[name]} for name in where}
    return json.dumps(settings, indent=2)


def _as_toml(config: ServerConfig, where: dict[str, str]) -> str:
    """A file that `--config` takes. TOML has no null: what is unset stands in a comment."""
    lines = []
    values = config.model_dump(mode="json")
    for name in where:
        value = values[name]
        # JSON's strings, numbers and booleans are TOML's.
        line = f"# {name} is unset" if value is None else f"{name} = {json.dumps(value)}"
        lines.append(f"{line:<40}  # {where[name]}")
    return "\n".join(lines)
