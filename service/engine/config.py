"""The engine's own limits: typed, bounded, and refused where a key is unknown."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """Limits of the engine; what the model itself allows stands in BackendSpec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_queue_size: int = Field(
        default=256, ge=1, le=1_000_000, description="requests that may wait; one more is refused"
    )
    max_n: int = Field(default=16, ge=1, le=256, description="largest n of a request")
    max_sequences: int = Field(
        default=64, ge=1, le=4096, description="sequences that may hold a KV cache at once"
    )
    prefix_cache: bool = Field(
        default=True,
        description="keep the KV cache of prompts, so that one that begins alike computes less "
        "(on backends with a paged KV cache)",
    )
    max_prefill_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="prompt tokens computed between two tokens of the running streams (unset, or "
        "above it: the backend's own limit)",
    )
    max_queue_time_s: float = Field(
        default=300.0, ge=0.01, le=86_400.0, description="longest wait for the first step"
    )
    max_tokens_in_flight: int = Field(
        default=1_048_576,
        ge=1,
        le=2**40,
        description="tokens, prompts and outputs, that the accepted requests may become together",
    )
    step_timeout_s: float = Field(
        default=600.0, ge=0.01, le=86_400.0, description="longest step of a backend that works"
    )
    max_failed_steps: int = Field(
        default=16, ge=1, le=1_000_000, description="steps in a row that may fail"
    )
