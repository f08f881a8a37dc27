"""TLS of the metrics port: the files are read for every connection, so that new ones need no word.

A scrape comes every few seconds, and reading them takes a millisecond.
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

from gptjet.service.observability.errors import ObservabilityError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MetricsTlsFiles:
    """PEM files. `client_ca`: who scrapes must show a certificate signed by one of these roots."""

    cert: Path
    key: Path
    client_ca: Path | None = None


class MetricsTls:
    """What the files held when they were last usable; for any thread."""

    def __init__(self, files: MetricsTlsFiles) -> None:
        """Read them. Raises ObservabilityError with one line."""
        self._files = files
        self._lock = threading.Lock()
        self._complaint: str | None = None
        self._in_use = _load(files)

    def context(self) -> ssl.SSLContext:
        """For one handshake, from what the files hold now; where that is not usable, the last."""
        with self._lock:
            try:
                self._in_use = _load(self._files)
                self._complaint = None
            except ObservabilityError as error:
                if str(error) != self._complaint:  # else each scrape would log it
                    self._complaint = str(error)
                    logger.error("metrics: the certificate in use stays: %s", error)
            return self._in_use


def _load(files: MetricsTlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password callback, so that an encrypted key is an error and not a prompt.
        context.load_cert_chain(files.cert, files.key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ObservabilityError(
            f"metrics_tls_cert {files.cert} and metrics_tls_key {files.key} are not a certificate "
            f"and its key: {error}"
        ) from error
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except (OSError, ValueError) as error:
            raise ObservabilityError(
                f"metrics_tls_client_ca {files.client_ca} holds no PEM roots: {error}"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context
