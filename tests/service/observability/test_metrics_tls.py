"""The metrics port behind TLS, as Prometheus would scrape it."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.observability.errors import ObservabilityError
from gptjet.service.observability.exposition import MetricsServer
from gptjet.service.observability.metrics import Metrics
from gptjet.service.observability.tls import MetricsTlsFiles

StartServer = Callable[..., Awaitable[Any]]
MakeCertificate = Callable[[str], Any]


@contextmanager
def serving(files: MetricsTlsFiles) -> Iterator[int]:
    server = MetricsServer("127.0.0.1", 0, Metrics().registry, files)
    try:
        yield server.port
    finally:
        server.close()


def scrape(port: int, root: Path, client: Any = None) -> bytes:
    """The metrics, read by somebody who trusts `root` and shows `client`'s certificate."""
    context = ssl.create_default_context(cafile=str(root))
    context.check_hostname = False
    if client is not None:
        context.load_cert_chain(client.cert, client.key)
    url = f"https://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=20, context=context) as answer:
        body: bytes = answer.read()
    return body


@pytest.fixture
def files(make_certificate: MakeCertificate, tmp_path: Path) -> MetricsTlsFiles:
    made = make_certificate("gptjet.test")
    return MetricsTlsFiles(
        shutil.copy(made.cert, tmp_path / "cert.pem"), shutil.copy(made.key, tmp_path / "key.pem")
    )


async def test_the_settings_put_the_metrics_behind_tls(
    start_server: StartServer, files: MetricsTlsFiles
) -> None:
    running = await start_server(
        metrics_port=0, metrics_tls_cert=files.cert, metrics_tls_key=files.key
    )
    port = running.server.observability.metrics_port
    body = await asyncio.to_thread(scrape, port, files.cert)
    assert b"gptjet_serving 1.0" in body
    (line,) = (line for line in running.logs if line["event"] == "metrics")
    assert line["url"] == f"https://127.0.0.1:{port}/metrics"
    plain = f"http://127.0.0.1:{port}/metrics"
    with pytest.raises(OSError, match=r"reset|closed|Remote end"):
        await asyncio.to_thread(urllib.request.urlopen, plain, timeout=20)


def test_without_a_certificate_of_the_roots_nobody_reads_the_metrics(
    files: MetricsTlsFiles, make_certificate: MakeCertificate
) -> None:
    prometheus, stranger = make_certificate("prometheus"), make_certificate("stranger")
    with serving(MetricsTlsFiles(files.cert, files.key, prometheus.cert)) as port:
        for shown in (None, stranger):
            with pytest.raises(OSError, match=r"alert|reset|EOF|unknown ca"):
                scrape(port, files.cert, shown)
        assert b"gptjet_serving" in scrape(port, files.cert, prometheus)


def test_a_client_that_does_not_shake_hands_holds_up_no_other(files: MetricsTlsFiles) -> None:
    with serving(files) as port, socket.create_connection(("127.0.0.1", port), 20):
        assert b"gptjet_serving" in scrape(port, files.cert)


def test_a_client_that_never_shakes_hands_is_let_go(
    files: MetricsTlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptjet.service.observability.exposition._CLIENT_TIMEOUT_S", 0.1)
    with serving(files) as port, socket.create_connection(("127.0.0.1", port), 20) as silent:
        assert silent.recv(1) == b""


def test_a_new_certificate_is_used_for_the_next_scrape_and_a_broken_one_is_not(
    files: MetricsTlsFiles, make_certificate: MakeCertificate, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Path(f"{files.cert}.old"), make_certificate("gptjet.test")
    shutil.copy(files.cert, old)
    with serving(files) as port, caplog.at_level(logging.ERROR):
        assert scrape(port, old)
        # The certificate is there before its key.
        shutil.copy(new.cert, files.cert)
        for _ in range(2):
            assert scrape(port, old)
        assert len(caplog.records) == 1
        assert "the certificate in use stays" in caplog.text
        shutil.copy(new.key, files.key)
        assert scrape(port, new.cert)
        with pytest.raises(urllib.error.URLError, match="self-signed"):
            scrape(port, old)
        assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "broken", ["no file", "no PEM", "another key", "an encrypted key", "no CA"]
)
def test_files_that_cannot_be_used_are_one_line_that_names_the_setting(
    files: MetricsTlsFiles, make_certificate: MakeCertificate, broken: str, tmp_path: Path
) -> None:
    setting, client_ca = "metrics_tls_cert", None
    match broken:
        case "no file":
            files.cert.unlink()
        case "no PEM":
            files.cert.write_text("nothing")
        case "another key":
            shutil.copy(make_certificate("other").key, files.key)
        case "an encrypted key":
            command = ["openssl", "ec", "-in", str(files.key), "-aes256", "-passout", "pass:x"]
            subprocess.run([*command, "-out", str(files.key)], check=True, capture_output=True)
        case "no CA":
            setting, client_ca = "metrics_tls_client_ca", tmp_path / "none.pem"
    with pytest.raises(ObservabilityError, match=f"{setting} {tmp_path}") as caught:
        MetricsServer(
            "127.0.0.1", 0, Metrics().registry, MetricsTlsFiles(files.cert, files.key, client_ca)
        )
    assert "\n" not in str(caught.value)
