"""Settings: which source wins, and that nothing unknown or out of bounds passes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gptjet.service.config import ConfigError, ServerConfig, load_config
from gptjet.service.engine.config import EngineConfig


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GPTJET_")]:
        monkeypatch.delenv(name)


def write(folder: Path, text: str) -> Path:
    path = folder / "gptjet.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flag_wins_over_environment_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, 'port = 1\nmax_n = 2\nmodel = "from-file"\n')
    monkeypatch.setenv("GPTJET_PORT", "3")
    monkeypatch.setenv("GPTJET_MAX_N", "4")
    config = load_config(file, port=5)
    assert (config.port, config.max_n, config.model) == (5, 4, "from-file")
    assert config.host == "127.0.0.1"


def test_cuda_graphs_are_switched_by_every_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load_config().cuda_graphs
    file = write(tmp_path, "cuda_graphs = false")
    assert not load_config(file).cuda_graphs
    monkeypatch.setenv("GPTJET_CUDA_GRAPHS", "true")
    assert load_config(file).cuda_graphs
    assert not load_config(file, cuda_graphs=False).cuda_graphs


def test_limits_come_from_every_source_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "max_queue_time_s = 1\nmax_connections = 2\nreuse_port = true\n")
    monkeypatch.setenv("GPTJET_MAX_QUEUE_TIME_S", "3")
    monkeypatch.setenv("GPTJET_MAX_CONNECTIONS", "4")
    config = load_config(file, max_queue_time_s=5.5)
    assert (config.max_queue_time_s, config.max_connections, config.reuse_port) == (5.5, 4, True)
    assert config.engine.max_queue_time_s == 5.5
    assert config.slow_reader_timeout_s == 30.0


def test_flag_that_is_none_was_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJET_PORT", "3")
    assert load_config(port=None).port == 3


def test_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJET_TLS_CERT", "")
    assert load_config().tls_cert is None


def test_environment_is_read_in_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJET_LOG_PROMPTS", "true")
    monkeypatch.setenv("GPTJET_GRACE_S", "2.5")
    monkeypatch.setenv("GPTJET_PORT_FILE", "/tmp/port")
    config = load_config()
    assert (config.log_prompts, config.grace_s) == (True, 2.5)
    assert config.port_file == Path("/tmp/port")


def test_file_can_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTJET_CONFIG", str(write(tmp_path, "port = 7")))
    assert load_config().port == 7


def test_only_load_config_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJET_PORT", "3")
    assert ServerConfig().port == 50051


def test_unknown_key_in_the_file_is_named_with_its_near_match(tmp_path: Path) -> None:
    file = write(tmp_path, "max_queue = 4\n")
    with pytest.raises(ConfigError, match=r"max_queue: there is no such setting; did you mean.*"):
        load_config(file)
    with pytest.raises(ConfigError, match="max_queue_size") as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_unknown_table_in_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="server: there is no such setting"):
        load_config(write(tmp_path, "[server]\nport = 1\n"))


def test_unknown_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJET_GRACE", "4")
    with pytest.raises(ConfigError, match="GPTJET_GRACE: there is no such setting; did you mean"):
        load_config()


def test_unknown_flag_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--prot: there is no such setting; did you mean port"):
        load_config(prot=3)


def test_value_out_of_bounds_is_named_with_source_limit_and_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTJET_MAX_N", "0")
    file = write(tmp_path, 'grace_s = -1\nlog_format = "xml"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(file, port=70000)
    assert sorted(str(caught.value).splitlines()) == sorted(
        [
            "--port: must be less than or equal to 65535, got 70000",
            f"{file}: grace_s: must be greater than or equal to 0, got -1",
            f"{file}: log_format: must be 'console' or 'json', got 'xml'",
            "GPTJET_MAX_N: must be greater than or equal to 1, got '0'",
        ]
    )


def test_unreadable_and_malformed_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not valid TOML: Invalid value"):
        load_config(write(tmp_path, "port ="))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tls_cert": "c"}, "tls_cert and tls_key must be given together"),
        ({"tls_key": "k"}, "tls_cert and tls_key must be given together"),
        ({"tls_client_ca": "a"}, "tls_client_ca needs tls_cert"),
    ],
)
def test_tls_files_belong_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(**flags)


def test_config_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServerConfig().port = 1


def test_the_engines_part_has_the_engines_defaults() -> None:
    assert ServerConfig().engine == EngineConfig()
    changed: dict[str, Any] = {
        "max_queue_size": 3,
        "max_n": 2,
        "max_sequences": 1,
        "prefix_cache": False,
        "max_prefill_tokens": 64,
        "max_queue_time_s": 2.5,
        "max_tokens_in_flight": 5000,
        "step_timeout_s": 7.5,
        "max_failed_steps": 3,
    }
    assert ServerConfig(**changed).engine == EngineConfig(**changed)
    assert changed.keys() == EngineConfig.model_fields.keys()


def test_every_setting_is_described() -> None:
    assert all(field.description for field in ServerConfig.model_fields.values())


def test_kv_cache_dtype_is_one_of_four_wherever_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's names are those that a loader takes."""
    from gptjet.service.backends.factory import KV_CACHE_DTYPES

    file = write(tmp_path, 'kv_cache_dtype = "float16"\n')
    assert load_config(file).kv_cache_dtype == "float16"
    for name in KV_CACHE_DTYPES:
        monkeypatch.setenv("GPTJET_KV_CACHE_DTYPE", name)
        assert load_config(file).kv_cache_dtype == name
    assert load_config(file, kv_cache_dtype="int8").kv_cache_dtype == "int8"
    with pytest.raises(ConfigError, match="--kv-cache-dtype: must be 'auto', 'float16', 'float32'"):
        load_config(kv_cache_dtype="int4")
