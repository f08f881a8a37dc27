"""Certificates: what is wrong with a file is said before any caller finds out."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gptjet.service.rpc.access import certificates as module
from gptjet.service.rpc.access.certificates import CertificateFiles, Certificates
from gptjet.service.rpc.access.errors import AccessError

from .conftest import CLIENTS_ONLY, DAY, Authority, Files


def load(files: Files, client_ca: Path | None = None) -> Certificates:
    return Certificates(CertificateFiles(files.cert, files.key, client_ca))


def test_a_good_certificate_says_its_names_and_its_end(authority: Authority, files: Files) -> None:
    files.write(authority.issue("a.test", end=9 * DAY))
    certificates = load(files)
    assert certificates.names == ("a.test",)
    assert abs(certificates.not_after - datetime.now(UTC) - 9 * DAY) < timedelta(minutes=5)


def test_what_stands_beside_the_pem_does_not_matter(authority: Authority, files: Files) -> None:
    """openssl writes attributes there, in any encoding; and a chain has its root at the end."""
    pem = authority.issue()
    files.write(pem)
    files.cert.write_bytes("subject=Zürich\n".encode() + pem.cert + authority.root)
    assert load(files).names == ("gptjet.test",)


Breakage = Callable[[Authority, Files], None]


def _expired(authority: Authority, files: Files) -> None:
    files.write(authority.issue(start=-2 * DAY, end=-DAY))


def _not_yet_valid(authority: Authority, files: Files) -> None:
    files.write(authority.issue(start=DAY))


def _for_clients(authority: Authority, files: Files) -> None:
    files.write(authority.issue(usage=CLIENTS_ONLY))


def _another_key(authority: Authority, files: Files) -> None:
    files.write(authority.issue())
    files.key.write_bytes(authority.issue().key)


def _half_a_key(authority: Authority, files: Files) -> None:
    files.write(authority.issue())
    files.key.write_bytes(files.key.read_bytes()[:100])


def _half_a_certificate(authority: Authority, files: Files) -> None:
    files.write(authority.issue())
    files.cert.write_bytes(files.cert.read_bytes()[:300])


def _empty(authority: Authority, files: Files) -> None:
    files.write(authority.issue())
    files.cert.write_bytes(b"")


def _gone(authority: Authority, files: Files) -> None:
    files.write(authority.issue())
    files.key.unlink()


def _a_folder(authority: Authority, files: Files) -> None:
    files.write(authority.issue())
    files.cert.unlink()
    files.cert.mkdir()


def _huge(authority: Authority, files: Files) -> None:
    files.write(authority.issue())
    files.cert.write_bytes(files.cert.read_bytes() + b"\n" * 1024 * 1024)


BREAKAGES: dict[str, tuple[Breakage, str]] = {
    "expired": (_expired, "no caller would accept it: certificate has expired"),
    "not yet valid": (_not_yet_valid, "no caller would accept it: certificate is not yet valid"),
    "for clients": (_for_clients, "no caller would accept it: un(suitable|supported) certificate"),
    "another key": (_another_key, "are not a certificate and its key: .*mismatch"),
    "half a key": (_half_a_key, "are not a certificate and its key"),
    "half a certificate": (_half_a_certificate, "are not a certificate and its key"),
    "empty": (_empty, "are not a certificate and its key"),
    "gone": (_gone, "server.key: No such file"),
    "a folder": (_a_folder, "server.pem: Is a directory"),
    "huge": (_huge, "must be at most 1048576 bytes"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_file_is_refused_at_the_start(
    authority: Authority, files: Files, name: str
) -> None:
    break_it, reason = BREAKAGES[name]
    break_it(authority, files)
    with pytest.raises(AccessError, match=reason) as caught:
        load(files)
    assert "\n" not in str(caught.value)
    assert "PRIVATE KEY" not in str(caught.value)


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_file_is_refused_at_a_reload_and_the_old_one_stays(
    authority: Authority, files: Files, name: str
) -> None:
    files.write(authority.issue("old.test"))
    certificates = load(files)
    break_it, reason = BREAKAGES[name]
    break_it(authority, files)
    for _ in range(2):
        with pytest.raises(AccessError, match=reason):
            certificates.reload()
    assert certificates.names == ("old.test",)
    if files.cert.is_dir():
        files.cert.rmdir()
    files.write(authority.issue("new.test"))
    assert certificates.reload()
    assert certificates.names == ("new.test",)
    assert not certificates.reload()


def test_an_encrypted_key_is_an_error_and_no_prompt(authority: Authority, files: Files) -> None:
    from cryptography.hazmat.primitives import serialization

    pem = authority.issue()
    key = serialization.load_pem_private_key(pem.key, None)
    files.write(pem)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"a password"),
        )
    )
    with pytest.raises(AccessError, match="are not a certificate and its key"):
        load(files)


def test_roots_that_are_none_are_refused(
    authority: Authority, files: Files, tmp_path: Path
) -> None:
    files.write(authority.issue())
    roots = tmp_path / "roots.pem"
    roots.write_bytes(b"nothing")
    with pytest.raises(AccessError, match="holds no PEM roots"):
        load(files, roots)
    roots.write_bytes(authority.root)
    certificates = load(files, roots)
    roots.write_bytes(authority.root[:-100])
    with pytest.raises(AccessError, match="holds no PEM roots"):
        certificates.reload()


def test_files_that_change_under_the_check_are_refused(
    authority: Authority, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reads them by name, so it must have seen what is going to be used."""
    files.write(authority.issue("one.test"))
    rehearse = module._rehearse

    def rehearse_and_replace(*arguments: object) -> object:
        files.write(authority.issue("two.test"))
        return rehearse(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_rehearse", rehearse_and_replace)
    with pytest.raises(AccessError, match="change while they are read"):
        load(files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(authority: Authority, files: Files) -> None:
    files.write(authority.issue())
    files.key.chmod(0)
    with pytest.raises(AccessError, match=r"server\.key: Permission denied"):
        load(files)
