"""Settings of metrics and traces, a part of ServerConfig; the logs' own stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class ObservabilitySettings(BaseModel):
    """Off by default: what nobody collects costs nothing."""

    model_config = ConfigDict(frozen=True)

    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="serve Prometheus metrics over HTTP on this port, at /metrics; 0 chooses one "
        "(unset: no metrics, and nothing is counted)",
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address of the metrics (loopback, as anyone may read them unless "
        "metrics_tls_client_ca is given; 0.0.0.0 where Prometheus runs elsewhere)",
    )
    metrics_tls_cert: Path | None = Field(
        default=None,
        description="PEM certificate chain of the metrics port, may be tls_cert's; given with "
        "metrics_tls_key it turns HTTPS on. Read again for each scrape",
    )
    metrics_tls_key: Path | None = Field(
        default=None, description="PEM private key of metrics_tls_cert"
    )
    metrics_tls_client_ca: Path | None = Field(
        default=None,
        description="PEM roots; Prometheus must show a certificate signed by one (the metrics port "
        "knows no bearer tokens)",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="send OpenTelemetry spans of each request to this collector by OTLP over gRPC, "
        "such as http://localhost:4317 (unset: no spans); needs the extra 'otel'",
    )
    trace_sample_ratio: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="share of the requests that are traced, of those whose caller has not decided "
        "it in its trace context",
    )

    @model_validator(mode="after")
    def _metrics_tls_files_belong_together(self) -> Self:
        if (self.metrics_tls_cert is None) != (self.metrics_tls_key is None):
            raise ValueError("metrics_tls_cert and metrics_tls_key must be given together")
        if self.metrics_tls_client_ca is not None and self.metrics_tls_cert is None:
            raise ValueError("metrics_tls_client_ca needs metrics_tls_cert and metrics_tls_key")
        if self.metrics_tls_cert is not None and self.metrics_port is None:
            raise ValueError("metrics_tls_cert needs metrics_port")
        return self

    @field_validator("otlp_endpoint")
    @classmethod
    def _has_scheme_host_and_port(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        try:
            port = parts.port
        except ValueError:  # not a number, or over 65535
            port = None
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT")
        return endpoint
