"""Settings of `gptjet serve`: one typed, bounded object from flags, environment and a TOML file.

A flag wins over the environment (`GPTJET_PORT`), that over the file (`--config` or
`GPTJET_CONFIG`), that over the default. A key that no field has is an error wherever it stands: a
misspelt limit that is silently ignored is found out in production. Only `load_config` looks at the
environment, so `ServerConfig(port=0)` means the same on every machine.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from gptjet.service.config_access import AccessSettings
from gptjet.service.config_governance import GovernanceConfig
from gptjet.service.config_gpu import GpuConfig
from gptjet.service.config_limits import LimitsConfig
from gptjet.service.config_observability import ObservabilitySettings
from gptjet.service.engine.config import EngineConfig

ENV_PREFIX = "GPTJET_"
CONFIG_FILE_VARIABLE = "GPTJET_CONFIG"
# Which server `gptjet generate` and the other callers ask; no setting of a server.
SERVER_VARIABLE = "GPTJET_SERVER"
# What those callers show, and where they find it.
TOKEN_VARIABLE = "GPTJET_TOKEN"
TOKEN_FILE_VARIABLE = "GPTJET_TOKEN_FILE"
# Which administration port or socket `gptjet admin` asks.
ADMIN_VARIABLE = "GPTJET_ADMIN"
# How the CPU kernels are compiled: the kernels read it themselves.
_CPU_ISA_VARIABLE = "GPTJET_CPU_ISA"
_NOT_SETTINGS = frozenset(
    (
        CONFIG_FILE_VARIABLE,
        SERVER_VARIABLE,
        TOKEN_VARIABLE,
        TOKEN_FILE_VARIABLE,
        ADMIN_VARIABLE,
        _CPU_ISA_VARIABLE,
    )
)

_ENGINE_DEFAULTS = EngineConfig()
_MIB = 1024 * 1024


class ConfigError(Exception):
    """The settings are not usable; the message names each bad key, its source and its limit."""


class ServerConfig(
    AccessSettings, LimitsConfig, ObservabilitySettings, GovernanceConfig, GpuConfig
):
    """Everything `gptjet serve` can be told. Limits of the model itself stand in BackendSpec."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # Model
    model: str = Field(
        default="embedded",
        min_length=1,
        description="checkpoint: a folder, a Hugging Face id, or 'embedded', the small one that "
        "ships with the package (the default, so that a first start needs no download)",
    )
    backend: str = Field(
        default="auto",
        min_length=1,
        description="fused, deepspeed, huggingface or mock; auto takes the first of the three that "
        "loads the model and computes what transformers computes",
    )
    device: str = Field(
        default="auto", min_length=1, description="auto (a GPU if there is one), cpu, cuda, cuda:1"
    )
    dtype: str = Field(
        default="auto",
        min_length=1,
        description="auto (float16 on a GPU, float32 on a CPU, which is slow in half precision), "
        "float32, float16, bfloat16; with the fused backend int8 and int4 too",
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="cores that a model on the CPU keeps busy (unset: OMP_NUM_THREADS, else those "
        "this process may use, by its affinity and its container's quota)",
    )
    deterministic: bool = Field(
        default=False,
        description="tokens never depend on what else is computed with them, also where the fused "
        "backend runs on PyTorch (off: slower there; its own kernels promise it anyway)",
    )
    allow_pickle: bool = Field(
        default=False,
        description="load weights from pickle files, which can run code (off: safetensors only)",
    )
    local_files_only: bool | None = Field(
        default=None,
        description="never ask the Hugging Face hub (unset: as HF_HUB_OFFLINE says)",
    )
    kv_cache_tokens: int | None = Field(
        default=None,
        ge=16,
        le=2**31 - 1,
        description="tokens that all KV caches together may hold (unset: what fits the device)",
    )
    kv_cache_dtype: Literal["auto", "float16", "float32", "int8"] = Field(
        default="auto",
        description="of the fused backend's KV cache: auto (what it computes in), float16, "
        "float32, or int8, which holds almost twice as many tokens as float16 (on a GPU; the CPU "
        "kernels have float32 alone)",
    )
    strict_parity: bool = Field(
        default=False,
        description="refuse to start where a fast backend's output differs from transformers' "
        "(off: serve with the huggingface backend instead, and say so)",
    )

    # Engine
    max_sequences: int = Field(
        default=_ENGINE_DEFAULTS.max_sequences,
        ge=1,
        le=4096,
        description="sequences that may hold a KV cache at once; the backend may allow fewer",
    )
    max_queue_size: int = Field(
        default=_ENGINE_DEFAULTS.max_queue_size,
        ge=1,
        le=1_000_000,
        description="requests that may wait; one more gets RESOURCE_EXHAUSTED (the default is "
        "more than any caller would wait behind on one card)",
    )
    max_n: int = Field(
        default=_ENGINE_DEFAULTS.max_n, ge=1, le=256, description="largest n of a request"
    )
    prefix_cache: bool = Field(
        default=_ENGINE_DEFAULTS.prefix_cache,
        description="keep the KV cache of prompts, so that one that begins alike is answered "
        "sooner (on backends with a paged KV cache)",
    )
    max_prefill_tokens: int | None = Field(
        default=_ENGINE_DEFAULTS.max_prefill_tokens,
        ge=1,
        le=1_000_000,
        description="most prompt tokens computed between two tokens of the running streams; fewer "
        "keep those steadier, more finish prompts sooner (unset: the backend's own limit, which "
        "this cannot raise)",
    )

    # Network
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to listen on (loopback, so that nothing is exposed by accident)",
    )
    port: int = Field(default=50051, ge=0, le=65535, description="port to listen on; 0 chooses one")
    port_file: Path | None = Field(
        default=None, description="file the bound port is written to, for scripts that use port 0"
    )
    max_message_bytes: int = Field(
        default=4 * _MIB,
        ge=64 * 1024,
        le=512 * _MIB,
        description="largest request; a full context of text is far below gRPC's usual 4 MiB",
    )
    keepalive_time_s: float = Field(
        default=30.0,
        ge=1.0,
        le=86_400.0,
        description="ping a silent connection after this long, so that a caller whose machine died "
        "does not hold its sequences for ever",
    )
    keepalive_timeout_s: float = Field(
        default=10.0,
        ge=0.1,
        le=3600.0,
        description="close the connection if no ping answer by then",
    )
    min_ping_interval_s: float = Field(
        default=5.0,
        ge=0.1,
        le=3600.0,
        description="callers that ping more often than this are disconnected (GOAWAY)",
    )
    reflection: bool = Field(
        default=True, description="serve gRPC reflection, so that grpcurl works without the .proto"
    )

    # Operation
    grace_s: float = Field(
        default=30.0,
        ge=0.0,
        le=3600.0,
        description="how long running requests may go on after SIGTERM (Kubernetes' own default)",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe level to log; request lines are info"
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console for people, json for log collectors"
    )
    log_prompts: bool = Field(
        default=False, description="log the prompts' text (off: prompts are the callers' business)"
    )

    @property
    def engine(self) -> EngineConfig:
        """The part that is the engine's."""
        return EngineConfig(
            max_queue_size=self.max_queue_size,
            max_n=self.max_n,
            max_sequences=self.max_sequences,
            prefix_cache=self.prefix_cache,
            max_prefill_tokens=self.max_prefill_tokens,
            max_queue_time_s=self.max_queue_time_s,
            max_tokens_in_flight=self.max_tokens_in_flight,
            step_timeout_s=self.step_timeout_s,
            max_failed_steps=self.max_failed_steps,
        )


def load_config(config_file: Path | None = None, **flags: Any) -> ServerConfig:
    """Settings from flags, the environment, the TOML file and the defaults, in that order.

    A flag that is None was not given. Raises ConfigError, one line for each problem.
    """
    file = config_file or _file_from_environment()
    names = frozenset(ServerConfig.model_fields)
    problems: list[str] = []
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def add(name: str, value: Any, source: str) -> None:
        if name in names:
            values[name], sources[name] = value, source
        else:
            problems.append(f"{source}: there is no such setting{_near_matches(name, names)}")

    # From the weakest source to the strongest: a later one overwrites.
    for name, value in _read_file(file).items():
        add(name, value, f"{file}: {name}")
    for variable, value in _environment().items():
        add(variable[len(ENV_PREFIX) :].lower(), value, variable)
    for name, value in flags.items():
        if value is not None:
            add(name, value, "--" + name.replace("_", "-"))

    config = None
    try:
        config = ServerConfig(**values)
    except ValidationError as error:
        problems += _describe(error, values, sources)
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    return config


def _environment() -> dict[str, str]:
    """The GPTJET_* variables. An empty one counts as absent, as compose files write "not set"."""
    return {
        variable: value
        for variable, value in os.environ.items()
        if variable.startswith(ENV_PREFIX) and variable not in _NOT_SETTINGS and value
    }


def _file_from_environment() -> Path | None:
    path = os.environ.get(CONFIG_FILE_VARIABLE)
    return Path(path) if path else None


def _read_file(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _near_matches(name: str, names: frozenset[str]) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), sorted(names))
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _describe(
    error: ValidationError, values: Mapping[str, Any], sources: Mapping[str, str]
) -> list[str]:
    """One line a problem: where the value came from, the limit, the value."""
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if name:
            message = f"{sources.get(name, name)}: {message}, got {values.get(name)!r}"
        lines.append(message)
    return lines
