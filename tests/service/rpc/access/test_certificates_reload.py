"""Certificates that change under a running server, over real TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import (
    AsyncClient,
    TlsOptions,
    UnavailableError,
)
from gptjet.service.config import ServerConfig
from gptjet.service.rpc.access import control
from gptjet.service.rpc.access.control import Outcome
from gptjet.service.rpc.listen import ListenError
from gptjet.service.rpc.server import Server

from .conftest import DAY, NAME, Authority, Files, in_two_days

# Long enough that only what a test asks for is looked at.
NEVER_S = 3600.0


def trusting(authority: Authority, **options: Any) -> TlsOptions:
    return TlsOptions(root_ca=authority.root, server_name=NAME, **options)


def shown_to(port: int, authority: Authority) -> str:
    """The serial number of the certificate that a new connection is shown; blocks."""
    context = ssl.create_default_context(cadata=authority.root.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname=NAME) as secure,
    ):
        certificate = secure.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


def serial(files: Files) -> str:
    number = x509.load_pem_x509_certificate(files.cert.read_bytes()).serial_number
    text = f"{number:X}"
    return text if len(text) % 2 == 0 else "0" + text


async def test_certificates_are_changed_under_load_without_a_failed_request(
    start_server: Any, authority: Authority, files: Files
) -> None:
    """Calls without a pause on old and new connections, while the certificate changes five times
    and half of the times a broken one stands there first."""
    files.write(authority.issue())
    running = await start_server(
        **files.settings, access_reload_s=0.05, backend=MockBackend(decode_ms=1)
    )
    tls = trusting(authority)
    done, failures, stop = 0, [], asyncio.Event()

    async def call(new_connections: bool) -> None:
        nonlocal done
        kept = running.new_client(tls=tls, retry=None, timeout_s=20.0)
        while not stop.is_set():
            client = kept
            if new_connections:
                client = AsyncClient(running.target, tls=tls, retry=None, timeout_s=20.0)
            try:
                await client.generate("abc", max_new_tokens=3)
                done += 1
            except Exception as error:  # noqa: BLE001 - each is a failure of the test
                failures.append(error)
            if client is not kept:
                await client.close()

    # One stream from before the first change until after the last.
    long = running.new_client(tls=tls, retry=None, timeout_s=60.0).generate_stream(
        "abc", max_new_tokens=450
    )
    await anext(long)
    seen = {await asyncio.to_thread(shown_to, running.server.port, authority)}
    async with asyncio.TaskGroup() as group:
        for new_connections in (True, True, False):
            group.create_task(call(new_connections))
        for turn in range(5):
            if turn % 2:
                files.key.write_bytes(files.key.read_bytes()[: 40 * turn])
                await running.until(lambda: "certificates" in running.server.access.refused)
            pem = authority.issue()
            # As a slow copy would: the new key is there in part, then whole, then the certificate.
            files.key.write_bytes(pem.key[:60])
            await asyncio.sleep(0.07)
            files.write(pem)
            expected = serial(files)
            while expected not in seen:
                seen.add(await asyncio.to_thread(shown_to, running.server.port, authority))
            count = done
            await running.until(lambda count=count: done > count + 5)
        stop.set()
    assert failures == []
    assert len(seen) == 6
    assert len([chunk async for chunk in long]) == 449
    assert running.server.access.refused == {}


async def test_a_broken_certificate_leaves_the_old_one_and_is_logged_once(
    start_server: Any, authority: Authority, files: Files
) -> None:
    files.write(authority.issue())
    running = await start_server(**files.settings, access_reload_s=0.05)
    before = serial(files)
    expired = authority.issue(start=-2 * DAY, end=-DAY)
    files.write(expired)

    def complaints() -> list[Any]:
        return [
            line
            for line in running.logs
            if line["event"] == "certificates not reloaded, the old ones stay in use"
        ]

    await running.until(lambda: bool(complaints()) and "has expired" in complaints()[-1]["reason"])
    await asyncio.sleep(0.3)  # six more looks
    # In between the two files of `write`, they may have been seen not to belong together.
    assert 1 <= len(complaints()) <= 2
    assert complaints()[-1]["log_level"] == "error"
    assert "certificate has expired" in complaints()[-1]["reason"]
    assert await asyncio.to_thread(shown_to, running.server.port, authority) == before
    client = running.new_client(tls=trusting(authority), retry=None)
    assert (await client.generate("abc", max_new_tokens=2)).text == "de"
    files.write(authority.issue())
    await running.until(
        lambda: any(line["event"] == "certificates reloaded" for line in running.logs)
    )
    assert await asyncio.to_thread(shown_to, running.server.port, authority) == serial(files)


async def test_a_certificate_of_the_caller_is_asked_for_and_its_roots_can_change(
    start_server: Any, authority: Authority, files: Files, tmp_path: Path
) -> None:
    files.write(authority.issue())
    first, second = Authority("first callers"), Authority("second callers")
    roots = tmp_path / "callers.pem"
    roots.write_bytes(first.root)
    running = await start_server(**files.settings, tls_client_ca=roots, access_reload_s=NEVER_S)

    async def is_let_in(callers: Authority | None, **validity: timedelta) -> bool:
        options = {}
        if callers is not None:
            pem = callers.issue("caller", **validity)
            options = {"client_cert": pem.cert, "client_key": pem.key}
        client = running.new_client(tls=trusting(authority, **options), retry=None)
        try:
            await client.get_model(timeout_s=10)
        except UnavailableError:
            return False
        return True

    assert not await is_let_in(None)
    assert await is_let_in(first)
    assert not await is_let_in(first, start=-2 * DAY, end=-DAY)
    assert not await is_let_in(second)
    roots.write_bytes(second.root)
    (result,) = await running.server.access.reload()
    assert result.outcome is Outcome.RELOADED
    assert await is_let_in(second)
    assert not await is_let_in(first)
    assert not await is_let_in(None)
    roots.write_bytes(b"")
    (result,) = await running.server.access.reload()
    assert result.outcome is Outcome.REFUSED
    assert "holds no PEM roots" in result.reason
    assert await is_let_in(second)
    assert not await is_let_in(None)


async def test_an_expired_certificate_is_one_clear_line_at_the_start(
    authority: Authority, files: Files
) -> None:
    files.write(authority.issue(start=-2 * DAY, end=-DAY))
    server = Server(ServerConfig(port=0, **files.settings))
    with pytest.raises(ListenError, match=r"server\.pem: no caller would accept it: cert.*expired"):
        await server.start()
    await server.drain(0.0)


async def test_the_end_of_a_certificate_is_warned_of_once(
    start_server: Any, authority: Authority, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(authority.issue(end=13 * DAY))
    running = await start_server(**files.settings, access_reload_s=0.05)
    await asyncio.sleep(0.3)
    warnings = [line for line in running.logs if "certificate" in line["event"]]
    assert [line["event"] for line in warnings] == ["the certificate expires soon"]
    files.write(authority.issue(end=15 * DAY))
    await running.server.access.reload()
    files.write(authority.issue(end=DAY))
    await running.server.access.reload()
    monkeypatch.setattr(control, "datetime", in_two_days())
    await running.until(
        lambda: any(line["event"] == "the certificate has expired" for line in running.logs)
    )
