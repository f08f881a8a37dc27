"""Metrics and traces as the settings ask for them; what is off is not even imported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptjet.service.observability.errors import ObservabilityError

if TYPE_CHECKING:
    from gptjet.service.config import ServerConfig
    from gptjet.service.engine.async_engine import AsyncEngine
    from gptjet.service.engine.observer import RequestObserver
    from gptjet.service.observability.exposition import MetricsServer
    from gptjet.service.observability.governance import Governed
    from gptjet.service.observability.metrics import Metrics
    from gptjet.service.observability.tracing import Tracing


@dataclass(slots=True)
class Observability:
    """What watches one server: both, one or none. `metrics_port` is 0 where nothing listens."""

    metrics: Metrics | None = None
    tracing: Tracing | None = None
    metrics_port: int = 0
    _http: MetricsServer | None = field(default=None, repr=False)

    @property
    def request_observers(self) -> tuple[RequestObserver, ...]:
        """For the AsyncEngine; the metrics are its step observer too."""
        return tuple(one for one in (self.metrics, self.tracing) if one is not None)

    def listen(self, config: ServerConfig) -> str:
        """Serve the metrics; "http" or "https". Raises ObservabilityError."""
        from gptjet.service.observability.exposition import MetricsServer
        from gptjet.service.observability.tls import MetricsTlsFiles

        assert self.metrics is not None
        assert config.metrics_port is not None
        tls = None
        if config.metrics_tls_cert is not None and config.metrics_tls_key is not None:
            tls = MetricsTlsFiles(
                config.metrics_tls_cert, config.metrics_tls_key, config.metrics_tls_client_ca
            )
        self._http = MetricsServer(
            config.metrics_host, config.metrics_port, self.metrics.registry, tls
        )
        self.metrics_port = self._http.port
        return "http" if tls is None else "https"

    def govern(self, governed: Governed) -> None:
        """Watch what a policy decides."""
        if self.metrics is not None:
            self.metrics.govern(governed)

    def attach(self, engine: AsyncEngine, model: str) -> None:
        """Watch a loaded model's engine."""
        if self.metrics is not None:
            self.metrics.attach(engine, model)

    async def close(self) -> None:
        """Send the last spans and stop listening, the metrics last. Safe to call again."""
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        if self._http is not None:
            http, self._http = self._http, None
            await asyncio.to_thread(http.close)


def set_up(
    config: ServerConfig, *, version: str, methods: Iterable[str], is_serving: Callable[[], bool]
) -> Observability:
    """Make what `config` asks for; nothing listens and nothing is sent yet.

    Raises ObservabilityError where an extra is missing.
    """
    watching = Observability()
    if config.metrics_port is not None:
        from gptjet.service.observability.metrics import Metrics

        watching.metrics = Metrics(methods, is_serving)
    if config.otlp_endpoint is not None:
        watching.tracing = _tracing(
            config.otlp_endpoint, config.trace_sample_ratio, config.model, version
        )
    return watching


def _tracing(endpoint: str, sample_ratio: float, model: str, version: str) -> Tracing:
    try:
        from gptjet.service.observability.tracing import Tracing, otlp_provider
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ObservabilityError(
            "otlp_endpoint needs OpenTelemetry: pip install 'gptjet[otel]' "
            f"(there is no module {error.name})"
        ) from error
    return Tracing(otlp_provider(endpoint, sample_ratio, version), model)
