"""Limits of `gptjet serve`: what it takes on, how long it waits, and when it gives a caller up."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from gptjet.service.engine.config import EngineConfig

_ENGINE_DEFAULTS = EngineConfig()


class LimitsConfig(BaseModel):
    """The part of ServerConfig that bounds what callers and faults can cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # Requests
    max_queue_time_s: float = Field(
        default=_ENGINE_DEFAULTS.max_queue_time_s,
        ge=0.01,
        le=86_400.0,
        description="a request that has waited so long gets RESOURCE_EXHAUSTED (the default is our "
        "client's own deadline: only callers without one can meet it)",
    )
    max_tokens_in_flight: int = Field(
        default=_ENGINE_DEFAULTS.max_tokens_in_flight,
        ge=1,
        le=2**40,
        description="tokens that the queued and running requests may become together, prompts "
        "included; one more gets RESOURCE_EXHAUSTED (the default is 512 full contexts of GPT-J, "
        "more than one card computes while a caller waits)",
    )
    max_concurrent_rpcs: int = Field(
        default=2048,
        ge=1,
        le=1_000_000,
        description="calls of every method at once; one more gets RESOURCE_EXHAUSTED (the default "
        "leaves room for many short calls beside a full queue)",
    )
    max_unread_tokens: int = Field(
        default=4096,
        ge=1,
        le=1_000_000_000,
        description="tokens that may wait for a caller who does not read its stream, beyond what "
        "the connection itself holds; then it is cut off (the default is two full contexts of "
        "GPT-J)",
    )
    slow_reader_timeout_s: float = Field(
        default=30.0,
        ge=0.01,
        le=86_400.0,
        description="a caller whose connection has taken nothing of its stream for so long is cut "
        "off (the default outlasts a hiccup of any network that callers wait through)",
    )

    # Connections
    max_connections: int = Field(
        default=900,
        ge=1,
        le=1_000_000,
        description="connections at once; one more is closed (the default leaves some of the usual "
        "1,024 open files for the rest)",
    )
    max_concurrent_streams: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="calls at once on one connection; further ones wait in the caller, or gRPC "
        "refuses them for the caller to retry (the default is more than the queue and the running "
        "sequences together)",
    )
    handshake_timeout_s: float = Field(
        default=20.0,
        ge=0.1,
        le=3600.0,
        description="close a connection that is not set up by then, TLS included: half-open ones "
        "cost a file each",
    )
    max_connection_idle_s: float | None = Field(
        default=3600.0,
        ge=0.1,
        le=31_536_000.0,
        description="close a connection without calls for so long; callers come back by themselves "
        "(the default frees what was forgotten, and spares a nightly job its handshakes)",
    )
    max_connection_age_s: float | None = Field(
        default=None,
        ge=1.0,
        le=31_536_000.0,
        description="ask callers to connect anew after so long, for a load balancer to spread; "
        "running calls finish (unset: never, since one server has nothing to spread; with "
        "reuse_port 10, or half of grace_s: a hand-over takes about so long)",
    )

    # Faults
    step_timeout_s: float = Field(
        default=_ENGINE_DEFAULTS.step_timeout_s,
        ge=0.01,
        le=86_400.0,
        description="a step of the backend that lasts longer hangs: callers are told and the "
        "process exits with code 6 (the default is longer than the longest prompt takes a 6B model "
        "on a few cores; on a GPU, 30 is plenty)",
    )
    max_failed_steps: int = Field(
        default=_ENGINE_DEFAULTS.max_failed_steps,
        ge=1,
        le=1_000_000,
        description="after so many failed steps in a row the process exits with code 6: the device "
        "has failed for good",
    )
    failure_grace_s: float = Field(
        default=5.0,
        ge=0.0,
        le=3600.0,
        description="how long health says NOT_SERVING before a process whose engine has failed "
        "exits, for callers to be told and a load balancer to notice",
    )

    # Upgrades
    reuse_port: bool = Field(
        default=False,
        description="share the port with other servers (SO_REUSEPORT), so that a new process takes "
        "over from an old one: it listens once its model is loaded, and SIGTERM sends callers over "
        "without refusing any (off: a second server on the port is refused)",
    )
