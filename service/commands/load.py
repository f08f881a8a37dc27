"""`gptjet load`: wired here, written in `gptjet.benchmarks.load`."""

from __future__ import annotations

import os

import typer

from gptjet.benchmarks.load.flags import EXAMPLES, HELP, LoadFlags
from gptjet.service.commands.connection import ConnectionFlags, connect
from gptjet.service.commands.flags import expand_flags
from gptjet.service.commands.terminal import ExitCode, fail
from gptjet.service.config import TOKEN_VARIABLE

_MODEL_TIMEOUT_S = 10.0

__all__ = ["EXAMPLES", "HELP", "load"]


@expand_flags
def load(flags: LoadFlags, connection: ConnectionFlags) -> None:
    """Ask the server what it serves, then put the load on it."""
    from gptjet.benchmarks.load import cli

    try:
        flags.check()
        with connect(connection) as client:
            # --timeout is the deadline of the requests, which may be missed on purpose.
            model = client.get_model(timeout_s=_MODEL_TIMEOUT_S)
        # The workers have it from their environment: a spec is written into results.
        token = connection.security_options(connection.server)["token"]
        if token is not None:
            os.environ[TOKEN_VARIABLE] = token
        spec = cli.make_spec(
            flags, model, connection.server, connection.timeout_s, connection.tls_options()
        )
        code = cli.run_command(flags, spec, model)
    except (cli.FlagError, cli.WorkloadError) as error:
        fail(str(error), ExitCode.USAGE)
    except cli.InterruptedBeforeStartError as error:
        fail(str(error), ExitCode.INTERRUPTED)
    except (cli.LoadError, cli.PlotError) as error:
        fail(str(error), ExitCode.FAILURE)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", ExitCode.USAGE)
    raise typer.Exit(code)
