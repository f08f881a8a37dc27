"""The server's certificate, key and client roots, checked before use and changed while serving.

gRPC asks at each handshake whether there is a newer certificate. Connections that are open keep the
one they were made with.
"""

from __future__ import annotations

import re
import ssl
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc

from gptjet.service.rpc.access.errors import AccessError

_PEM_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL
)
_MAX_BYTES = 1024 * 1024
# More than enough for a handshake in memory, which takes four.
_HANDSHAKE_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Where they are. `client_ca`: callers must show a certificate signed by one of these roots."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """Certificate chain, key and roots. Raises AccessError."""
        roots = None if self.client_ca is None else _read(self.client_ca)
        return _read(self.cert), _read(self.key), roots


class Certificates:
    """What the files held when they were last usable."""

    kind = "certificates"

    def __init__(self, files: CertificateFiles) -> None:
        """Read and check them. Raises AccessError with one line."""
        self.files = files
        self._in_use = _load(files)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the certificate is good for."""
        return self._in_use.names

    @property
    def not_after(self) -> datetime:
        """When it expires."""
        return self._in_use.not_after

    def reload(self) -> bool:
        """Take what the files hold now, unless it is in use already; blocks. True: it is new.

        Raises AccessError where it cannot be used; the old one stays.
        """
        if self.files.read() == self._in_use.contents:
            return False
        self._in_use = _load(self.files)
        return True

    def credentials(self) -> grpc.ServerCredentials:
        """For one listening port: every handshake from now on is with what is then in use."""
        given = self._in_use
        lock = threading.Lock()

        def newer() -> grpc.ServerCertificateConfiguration | None:
            """In gRPC's threads; None: the same as last time, which saves it parsing the PEM."""
            nonlocal given
            with lock:
                if given is self._in_use:
                    return None
                given = self._in_use
                return given.configuration()

        return grpc.dynamic_ssl_server_credentials(
            given.configuration(),
            newer,  # type: ignore[arg-type]  # the stub forgets None, which gRPC documents
            require_client_authentication=self.files.client_ca is not None,
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    contents: tuple[bytes, bytes, bytes | None]
    names: tuple[str, ...]
    not_after: datetime

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        chain, key, roots = self.contents
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise AccessError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise AccessError(f"{path}: must be at most {_MAX_BYTES} bytes")
    return data


def _load(files: CertificateFiles) -> _Loaded:
    contents = files.read()
    context = _server_context(files)
    details = _rehearse(context, contents[0], files.cert)
    # Python's ssl takes a certificate by its path only: make sure that it saw what we hold.
    if files.read() != contents:
        raise AccessError(f"{files.cert} and {files.key} change while they are read")
    not_after = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(details["notAfter"])), UTC)
    return _Loaded(contents, _names(details), not_after)


def _server_context(files: CertificateFiles) -> ssl.SSLContext:
    """Have Python's ssl read the files, which says what is wrong; gRPC fails each handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password callback, so that an encrypted key is an error and not a prompt.
        context.load_cert_chain(files.cert, files.key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise AccessError(
            f"{files.cert} and {files.key} are not a certificate and its key: {error}"
        ) from error
    if files.client_ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(files.client_ca)
        except OSError as error:
            raise AccessError(f"{files.client_ca} holds no PEM roots: {error}") from error
    return context


def _rehearse(server: ssl.SSLContext, chain: bytes, path: Path) -> dict[str, object]:
    """Shake hands with it in memory, as a caller who trusts it would; what such a caller sees.

    Raises AccessError where no caller would accept it: expired, not yet valid, not for servers.
    """
    leaf = _PEM_CERTIFICATE.search(chain)
    if leaf is None:
        raise AccessError(f"{path} holds no PEM certificate")
    caller = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    caller.check_hostname = False
    caller.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    caller.load_verify_locations(cadata=leaf[0].decode("ascii"))
    to_server, to_caller = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        caller.wrap_bio(to_caller, to_server, server_side=False),
        server.wrap_bio(to_server, to_caller, server_side=True),
    ]
    for _ in range(_HANDSHAKE_ROUNDS):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                reason = getattr(error, "verify_message", "") or error.reason or str(error)
                raise AccessError(f"{path}: no caller would accept it: {reason}") from error
            ends.remove(end)
            if not end.server_side:
                details = end.getpeercert()
        if not ends:
            return dict(details or {})
    raise AccessError(f"{path}: a handshake with it does not end")


def _names(details: dict[str, object]) -> tuple[str, ...]:
    """Subject alternative names, else the common name."""
    alternative = details.get("subjectAltName") or ()
    subject = details.get("subject") or ()
    common = [
        value
        for part in subject  # type: ignore[attr-defined]
        for name, value in part
        if name == "commonName"
    ]
    return tuple(value for _, value in alternative) or tuple(common)  # type: ignore[attr-defined]
