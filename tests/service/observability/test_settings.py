"""The settings of metrics and traces: which source wins, and one clear line where they fail."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.config import ConfigError, ServerConfig, load_config
from gptjet.service.observability.errors import ObservabilityError
from gptjet.service.rpc.process import serve
from gptjet.service.rpc.server import Server


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GPTJET_")]:
        monkeypatch.delenv(name)


def test_flag_wins_over_environment_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gptjet.toml"
    file.write_text(
        'metrics_port = 1\nmetrics_host = "::1"\notlp_endpoint = "http://file:4317"\n',
        encoding="utf-8",
    )
    monkeypatch.setenv("GPTJET_METRICS_PORT", "2")
    monkeypatch.setenv("GPTJET_OTLP_ENDPOINT", "https://environment:4317")
    config = load_config(file, metrics_port=3)
    assert config.metrics_port == 3
    assert config.metrics_host == "::1"
    assert config.otlp_endpoint == "https://environment:4317"
    assert config.trace_sample_ratio == 1.0


def test_tls_of_the_metrics_comes_from_any_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gptjet.toml"
    file.write_text(
        'metrics_port = 1\nmetrics_tls_cert = "/f"\nmetrics_tls_key = "/f"\n', encoding="utf-8"
    )
    monkeypatch.setenv("GPTJET_METRICS_TLS_KEY", "/environment")
    monkeypatch.setenv("GPTJET_METRICS_TLS_CLIENT_CA", "/environment")
    config = load_config(file, metrics_tls_client_ca=Path("/flag"))
    assert config.metrics_tls_cert == Path("/f")
    assert config.metrics_tls_key == Path("/environment")
    assert config.metrics_tls_client_ca == Path("/flag")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics_tls_cert": "/c"}, "metrics_tls_cert and metrics_tls_key must be given together"),
        ({"metrics_tls_key": "/k"}, "metrics_tls_cert and metrics_tls_key must be given together"),
        ({"metrics_tls_client_ca": "/r"}, "metrics_tls_client_ca needs metrics_tls_cert"),
        (
            {"metrics_tls_cert": "/c", "metrics_tls_key": "/k", "metrics_port": None},
            "metrics_tls_cert needs metrics_port",
        ),
    ],
)
def test_tls_of_the_metrics_that_would_not_be_used_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(**{"metrics_port": 0} | settings)
    assert message in str(caught.value)


def test_everything_is_off_by_default_and_on_loopback() -> None:
    config = ServerConfig()
    assert (config.metrics_port, config.otlp_endpoint) == (None, None)
    assert config.metrics_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("setting", "value", "limit"),
    [
        ("metrics_port", "65536", "less than or equal to 65535"),
        ("metrics_port", "-1", "greater than or equal to 0"),
        ("metrics_host", "", "at least 1 character"),
        ("trace_sample_ratio", "1.1", "less than or equal to 1"),
        ("trace_sample_ratio", "nan", "less than or equal to 1"),
        ("otlp_endpoint", "localhost:4317", "must be http://HOST:PORT"),
        ("otlp_endpoint", "http://localhost", "must be http://HOST:PORT"),
        ("otlp_endpoint", "http://:4317", "must be http://HOST:PORT"),
        ("otlp_endpoint", "grpc://localhost:4317", "must be http://HOST:PORT"),
        ("otlp_endpoint", "http://localhost:port", "must be http://HOST:PORT"),
    ],
)
def test_what_is_out_of_bounds_is_named_with_its_limit(
    setting: str, value: str, limit: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(**{setting: value})
    assert f"--{setting.replace('_', '-')}" in str(caught.value)
    assert limit in str(caught.value)


async def test_a_missing_extra_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "gptjet.service.observability.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    config = ServerConfig(port=0, otlp_endpoint="http://127.0.0.1:4317")
    with pytest.raises(ObservabilityError, match=r"pip install 'gptjet\[otel\]'"):
        Server(config)


def never(config: ServerConfig) -> Any:
    raise AssertionError("it must not come to loading")


@pytest.fixture
def quiet_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `serve` leaves the logs to the test."""
    monkeypatch.setattr("gptjet.service.rpc.process.configure_logging", lambda *_, **__: None)


async def test_serve_exits_2_where_an_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, quiet_logging: None, logs: list[MutableMapping[str, Any]]
) -> None:
    monkeypatch.delitem(sys.modules, "gptjet.service.observability.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    config = ServerConfig(port=0, otlp_endpoint="http://127.0.0.1:4317")
    assert await serve(config, loader=never) == 2
    assert "otlp_endpoint needs OpenTelemetry" in logs[-1]["event"]


async def test_serve_exits_2_where_the_metrics_port_is_taken_and_frees_its_own(
    quiet_logging: None, logs: list[MutableMapping[str, Any]], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = tmp_path / "port"
        config = ServerConfig(port=0, port_file=file, metrics_port=port)
        assert await serve(config, loader=never) == 2
    assert logs[-1]["event"] == (
        f"cannot serve: cannot serve metrics: port {port} on 127.0.0.1 is in use; choose another "
        "with --metrics-port"
    )
    assert not file.exists()


def test_what_is_off_is_not_imported() -> None:
    import subprocess

    script = (
        "import sys, asyncio\n"
        "from gptjet.service.config import ServerConfig\n"
        "from gptjet.service.rpc.server import Server\n"
        "async def main(): Server(ServerConfig(port=0))\n"
        "asyncio.run(main())\n"
        "print([name for name in ('prometheus_client', 'opentelemetry') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
