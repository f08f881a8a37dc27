"""Certificates of a root of the test's own, and tokens files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gptjet.service.rpc.access.tokens import new_token
from gptjet.service.rpc.access.tokens_file import editing

NAME = "gptjet.test"
DAY = timedelta(days=1)


def in_two_days() -> type[datetime]:
    """In place of a module's `datetime`: its clock is two days ahead."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + 2 * DAY

    return Ahead


@dataclass(frozen=True)
class Pem:
    """A certificate and its key, as PEM."""

    cert: bytes
    key: bytes


class Authority:
    """A root that signs certificates."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 400 * DAY)
            .not_valid_after(now + 400 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.root = self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        name: str = NAME,
        *,
        start: timedelta = -DAY,
        end: timedelta = 90 * DAY,
        usage: x509.ObjectIdentifier | None = None,
    ) -> Pem:
        """A certificate for `name`, good from `start` to `end`, from now."""
        now = datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return Pem(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )


CLIENTS_ONLY = ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True)
class Files:
    """The server's files in a folder, replaced as a person or a tool would."""

    cert: Path
    key: Path

    def write(self, pem: Pem) -> None:
        """The key first: for a moment the two do not belong together."""
        self.key.write_bytes(pem.key)
        self.cert.write_bytes(pem.cert)

    @property
    def settings(self) -> dict[str, Any]:
        return {"tls_cert": self.cert, "tls_key": self.key}


@pytest.fixture
def authority() -> Authority:
    return Authority("a root")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "server.pem", tmp_path / "server.key")


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


@pytest.fixture
def make_token(tokens_file: Path) -> Callable[..., str]:
    """`make_token("web", concurrent_streams=2)`: the token's text; it stands in `tokens_file`."""

    def make(name: str = "web", **fields: Any) -> str:
        text, kept = new_token(name, **fields)
        with editing(tokens_file, create=True) as tokens:
            tokens.append(kept)
        return text

    return make
