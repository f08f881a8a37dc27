"""Settings of `gptjet serve` that say who may call: TLS, bearer tokens, quotas, administration."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MAX_QUOTA = 10**9


class AccessSettings(BaseModel):
    """A part of ServerConfig."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # TLS
    tls_cert: Path | None = Field(
        default=None, description="PEM certificate chain; given with tls_key it turns TLS on"
    )
    tls_key: Path | None = Field(default=None, description="PEM private key of tls_cert")
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM roots; callers must show a certificate signed by one (mutual TLS)",
    )

    # Access
    tokens_file: Path | None = Field(
        default=None,
        description="file of bearer tokens, made by `gptjet tokens`; given, no RPC answers without "
        "one, reflection and health included",
    )
    open_health: bool = Field(
        default=False,
        description="with tokens_file: let grpc.health.v1 answer without a token, as the probes of "
        "Kubernetes and load balancers need",
    )
    token_requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=_MAX_QUOTA,
        description="requests a minute of each token that names no limit of its own (unset: any)",
    )
    token_tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=_MAX_QUOTA,
        description="prompt and generated tokens a minute of each bearer token that names no limit "
        "of its own (unset: any)",
    )
    token_concurrent_streams: int | None = Field(
        default=None,
        ge=1,
        le=_MAX_QUOTA,
        description="RPCs in flight of each token that names no limit of its own (unset: any)",
    )
    access_reload_s: float = Field(
        default=5.0,
        ge=0.05,
        le=3600.0,
        description="look this often whether certificates and tokens_file have changed; what "
        "cannot be used is logged, and the old one stays (a look costs next to nothing). Running "
        "calls of a token that is revoked, removed or expired end then, too",
    )

    # Administration
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="serve gptjet.v1.Admin here to tokens with the scope admin; needs tokens_file "
        "(unset: off; 0 chooses a port)",
    )
    admin_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address of admin_port; anything but loopback needs TLS",
    )
    admin_socket: Path | None = Field(
        default=None,
        description="serve gptjet.v1.Admin on this Unix socket, too, which its owner may open "
        "(unset: off)",
    )

    @model_validator(mode="after")
    def _tls_files_belong_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self

    @model_validator(mode="after")
    def _tokens_are_there_where_they_are_needed(self) -> Self:
        if self.tokens_file is not None:
            return self
        needing = [
            name
            for name in (
                "token_requests_per_minute",
                "token_tokens_per_minute",
                "token_concurrent_streams",
                "admin_port",
            )
            if getattr(self, name) is not None
        ]
        if needing:
            # A limit that is not applied, or a port that anyone may use, is found out too late.
            raise ValueError(f"{' and '.join(needing)}: tokens_file must be given, too")
        return self

    @model_validator(mode="after")
    def _administration_is_not_sent_in_the_clear(self) -> Self:
        if self.admin_port is None or self.tls_cert is not None:
            return self
        if self.admin_host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(
                f"admin_host must be 127.0.0.1, ::1 or localhost without tls_cert, "
                f"got {self.admin_host!r}"
            )
        return self
