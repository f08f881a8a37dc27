"""Settings of metrics and traces, a part of ServerConfig; the logs' own stand there."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator


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
        description="address of the metrics (loopback, as they have no access control; 0.0.0.0 "
        "where Prometheus runs elsewhere)",
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
