"""How a client-side command shows who it is and checks who answers: TLS and bearer token flags."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from gptjet.service.commands.terminal import ExitCode, fail
from gptjet.service.config import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE

if TYPE_CHECKING:
    from gptjet.service.client import TlsOptions

_CONNECTION = "Server"
_MAX_TOKEN_FILE_BYTES = 4096


class SecurityOptions(TypedDict):
    """The arguments of Client that these flags decide."""

    tls: TlsOptions | None
    token: str | None
    allow_plaintext_token: bool


@dataclass(frozen=True)
class SecurityFlags:
    """TLS, and the token."""

    tls: Annotated[
        bool,
        typer.Option(
            "--tls",
            help="use TLS, with the roots that gRPC ships with",
            rich_help_panel=_CONNECTION,
        ),
    ] = False
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            help="PEM roots that the server's certificate is checked against (turns TLS on)",
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            help="PEM certificate of this client, where the server asks for one",
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key", help="PEM private key of --tls-cert", rich_help_panel=_CONNECTION
        ),
    ] = None
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            "--tls-server-name",
            metavar="NAME",
            help="name to expect in the server's certificate, where it is not the host",
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    # Not read from the environment by typer, which would show the token in --help.
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            metavar="TOKEN",
            help=f"bearer token to show; also {TOKEN_VARIABLE}, which other users of the machine "
            "do not see as they see flags",
            show_default=False,
            rich_help_panel=_CONNECTION,
        ),
    ] = field(default=None, repr=False)
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help=f"file that holds the token; also {TOKEN_FILE_VARIABLE}",
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    allow_plaintext_token: Annotated[
        bool,
        typer.Option(
            "--allow-plaintext-token",
            help="send the token without TLS to a server that is not on this machine, "
            "for whoever listens in between to use",
            rich_help_panel=_CONNECTION,
        ),
    ] = False

    def tls_options(self) -> TlsOptions | None:
        """For the client; None: plain text."""
        from gptjet.service.client import TlsOptions

        if not (self.tls or self.tls_ca or self.tls_cert or self.tls_key or self.tls_server_name):
            return None
        return TlsOptions(
            root_ca=self.tls_ca,
            client_cert=self.tls_cert,
            client_key=self.tls_key,
            server_name=self.tls_server_name,
        )

    def security_options(self, target: str) -> SecurityOptions:
        """For a client of `target`. Ends the command where they do not go together.

        A flag wins over the environment; the token itself over a file of it.
        """
        from gptjet.service.client import PlaintextTokenError, check_token

        if (self.tls_cert is None) != (self.tls_key is None):
            fail("--tls-cert and --tls-key must be given together", ExitCode.USAGE)
        tls, (token, source) = self.tls_options(), self._token()
        if token is not None:
            try:
                check_token(token, target, tls, self.allow_plaintext_token)
            except PlaintextTokenError:
                fail(
                    f"{source}: a token is not sent in plain text to {target}\n"
                    "use TLS (--tls, --tls-ca), or --allow-plaintext-token",
                    ExitCode.USAGE,
                )
            except ValueError as error:
                fail(f"{source}: {error}", ExitCode.USAGE)
        return {
            "tls": tls,
            "token": token,
            "allow_plaintext_token": self.allow_plaintext_token,
        }

    def _token(self) -> tuple[str | None, str]:
        """The token and where it comes from."""
        if self.token is not None and self.token_file is not None:
            fail("--token and --token-file: one of the two", ExitCode.USAGE)
        if self.token is not None:
            return self.token, "--token"
        if self.token_file is not None:
            return _read(self.token_file, "--token-file"), f"--token-file {self.token_file}"
        from_environment = os.environ.get(TOKEN_VARIABLE)
        if from_environment:
            return from_environment, TOKEN_VARIABLE
        file = os.environ.get(TOKEN_FILE_VARIABLE)
        if file:
            return _read(Path(file), TOKEN_FILE_VARIABLE), f"{TOKEN_FILE_VARIABLE} {file}"
        return None, ""


def _read(path: Path, source: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TOKEN_FILE_BYTES + 1)
    except OSError as error:
        fail(f"{source}: {path}: {error.strerror or error}", ExitCode.USAGE)
    if len(data) > _MAX_TOKEN_FILE_BYTES:
        fail(f"{source}: {path}: must be at most {_MAX_TOKEN_FILE_BYTES} bytes", ExitCode.USAGE)
    return data.decode("latin-1").strip()
