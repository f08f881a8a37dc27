"""Settings of the server as flags, made from ServerConfig, so that the two cannot drift apart."""

from __future__ import annotations

import inspect
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from gptjet.service.commands.flags import with_parameters
from gptjet.service.commands.terminal import ExitCode, fail
from gptjet.service.config import (
    CONFIG_FILE_VARIABLE,
    ENV_PREFIX,
    ConfigError,
    ServerConfig,
    load_config,
)

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

# The help panels, in their order. A setting that is not named here is in the last one.
_PANELS = {
    "Model": (
        "model",
        "backend",
        "device",
        "dtype",
        "cpu_threads",
        "deterministic",
        "allow_pickle",
        "local_files_only",
        "kv_cache_tokens",
        "kv_cache_dtype",
        "cuda_graphs",
        "strict_parity",
    ),
    "Limits": (
        "max_sequences",
        "max_queue_size",
        "max_n",
        "prefix_cache",
        "max_prefill_tokens",
        "max_queue_time_s",
        "max_tokens_in_flight",
        "max_concurrent_rpcs",
        "max_unread_tokens",
        "slow_reader_timeout_s",
    ),
    "Network": (
        "host",
        "port",
        "port_file",
        "max_message_bytes",
        "keepalive_time_s",
        "keepalive_timeout_s",
        "min_ping_interval_s",
        "max_connections",
        "max_concurrent_streams",
        "handshake_timeout_s",
        "max_connection_idle_s",
        "max_connection_age_s",
        "reuse_port",
        "reflection",
    ),
    "TLS": ("tls_cert", "tls_key", "tls_client_ca"),
    "Observability": (
        *("metrics_port", "metrics_host"),
        *("metrics_tls_cert", "metrics_tls_key", "metrics_tls_client_ca"),
        *("otlp_endpoint", "trace_sample_ratio"),
    ),
    "Access": (
        "tokens_file",
        "open_health",
        "token_requests_per_minute",
        "token_tokens_per_minute",
        "token_concurrent_streams",
        "access_reload_s",
    ),
    "Administration": ("admin_port", "admin_host", "admin_socket"),
    "Governance": (
        "governance_policy",
        "governance_dir",
        "governance_fail_open",
        "governance_timeout_s",
        "governance_excerpts",
        "governance_audit_max_bytes",
        "governance_audit_files",
        "governance_audit_fsync",
    ),
}
_LAST_PANEL = "Operation"


# What loading a model needs, for commands that do it without a server.
MODEL_SETTINGS = _PANELS["Model"]


def with_server_settings(
    *names: str, panel: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each of these settings (none named: for every one).

    The command takes them as one parameter `settings: dict[str, Any]`, holding those that were
    given, ready for `load_config(**settings)`. `panel` overrides the help panel.
    """
    chosen = names or setting_names()

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for name, p in signature.parameters.items() if name != "settings"]
        flags = [_flag(name, ServerConfig.model_fields[name], panel) for name in chosen]

        def call(values: dict[str, Any]) -> None:
            given = {name: values.pop(name) for name in chosen}
            settings = {name: value for name, value in given.items() if value is not None}
            function(**values, settings=settings)

        return with_parameters(function, [*own, *flags], call)

    return decorate


def resolve(config_file: Path | None, settings: Mapping[str, Any]) -> ServerConfig:
    """`load_config`, with its error as one of the command line."""
    try:
        return load_config(config_file, **settings)
    except ConfigError as error:
        fail(str(error), ExitCode.USAGE)


def sources(config_file: Path | None, settings: Mapping[str, Any]) -> dict[str, str]:
    """Where each setting's value comes from: a flag, a variable, the file, or "default"."""
    from_environment = os.environ.get(CONFIG_FILE_VARIABLE)
    file = config_file or (Path(from_environment) if from_environment else None)
    in_file = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}

    def source(name: str) -> str:
        variable = ENV_PREFIX + name.upper()
        if name in settings:
            return flag_name(name)
        if os.environ.get(variable):
            return variable
        return str(file) if name in in_file else "default"

    return {name: source(name) for name in setting_names()}


def setting_names() -> tuple[str, ...]:
    """Every setting, in the order of the help panels."""
    order = [*_PANELS, _LAST_PANEL]
    return tuple(sorted(ServerConfig.model_fields, key=lambda name: order.index(_panel_of(name))))


def flag_name(setting: str) -> str:
    """`tls_cert` -> `--tls-cert`."""
    return "--" + setting.replace("_", "-")


def _flag(name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    """The setting as an optional flag. None means: not given, ask the next source.

    Bounds are only described: `load_config` checks them, wherever the value came from.
    """
    annotation = field.annotation
    is_switch = annotation is bool or bool in get_args(annotation)
    option = typer.Option(
        f"{flag_name(name)}/--no-{name.replace('_', '-')}" if is_switch else flag_name(name),
        help=_help(field),
        show_default=False,
        rich_help_panel=panel or _panel_of(name),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation | None, option],  # type: ignore[operator]
    )


def _help(field: FieldInfo) -> str:
    text = "; ".join(part for part in (field.description, _limits(field.metadata)) if part)
    if field.default is not None:
        default = field.default
        shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
        text += f" [dim]\\[default: {shown}][/dim]"
    return text


def _limits(metadata: Iterable[Any]) -> str:
    bounds = {
        bound: value
        for constraint in metadata
        for bound in ("ge", "le")
        if (value := getattr(constraint, bound, None)) is not None
    }
    match bounds:
        case {"ge": low, "le": high}:
            return f"{low:g} to {high:g}" if isinstance(low, float) else f"{low} to {high}"
        case {"ge": low}:
            return f"{low} or more"
        case {"le": high}:
            return f"{high} or less"
    return ""


def _panel_of(name: str) -> str:
    return next((panel for panel, names in _PANELS.items() if name in names), _LAST_PANEL)
