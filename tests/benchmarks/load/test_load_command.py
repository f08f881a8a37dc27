"""`gptjet load` from end to end: worker processes, a server of the mock, files and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from gptjet.benchmarks.load import cli, validity
from gptjet.benchmarks.load.check_clock import known_server
from gptjet.benchmarks.load.coordinator import LoadError
from gptjet.benchmarks.results import read_records
from gptjet.service.cli import app


@pytest.fixture(autouse=True)
def quiet_server() -> Iterator[None]:
    """The server logs in this process, into what the command prints."""
    with structlog.testing.capture_logs():
        yield


def load(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["load", *arguments], env={"COLUMNS": "200"})


def test_an_open_loop_over_two_processes_loses_no_request(mock_server: Any, tmp_path: Path) -> None:
    out = tmp_path / "load.jsonl"
    with mock_server(1, 1) as target:
        result = load(
            *("--server", target, "--rate", "40", "--requests", "21", "--processes", "2"),
            *("--prompt-tokens", "uniform:4,20", "--output-tokens", "6", "--out", str(out)),
            *("--slo-e2e-ms", "60000", "--json"),
        )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["statuses"], summary["attainment"]) == ({"OK": 21}, 1.0)
    assert summary["latencies"]["itl"]["count"] == 21 * 5
    assert summary["latencies"]["ttft"]["min_ms"] >= 1.0
    kinds = [record["kind"] for record in read_records(out)]
    assert kinds == ["load_session", "load_run", *["load_request"] * 21, "load_summary"]
    session, run, *requests, _ = read_records(out)
    assert session["environment"]["packages"]
    assert run["spec"]["target"] == "this machine"
    assert [request["index"] for request in requests] == list(range(21))
    assert all(4 <= request["prompt_tokens"] <= 20 for request in requests)


def test_a_closed_loop_prints_its_table_and_its_limits(mock_server: Any, tmp_path: Path) -> None:
    with mock_server(1, 1) as target:
        result = load(
            *("--server", target, "--concurrency", "3", "--requests", "12"),
            *("--prompt-tokens", "4", "--output-tokens", "5", "--out", str(tmp_path / "l.jsonl")),
            *("--plot", str(tmp_path / "l.svg")),
        )
    assert result.exit_code == 0, result.output
    assert "12, 12 succeeded" in result.stdout
    assert "no capacity" in result.stdout
    assert (tmp_path / "l.svg").read_text().startswith("<?xml")


def test_a_missed_deadline_is_an_error_by_status_and_not_a_latency(
    mock_server: Any, tmp_path: Path
) -> None:
    """600 + 200 tokens do not fit the mock's context of 512, so lengths are cut; a deadline of
    100 ms is missed by all that take 400 ms to their first token."""
    with mock_server(400, 1) as target:
        result = load(
            *("--server", target, "--rate", "20", "--requests", "6", "--timeout", "0.1"),
            *("--prompt-tokens", "600", "--output-tokens", "200", "--warmup", "0"),
            *("--out", str(tmp_path / "l.jsonl"), "--json"),
        )
    assert result.exit_code == 1, result.output
    summary = json.loads(result.stdout)
    assert summary["statuses"] == {"DEADLINE_EXCEEDED": 6}
    assert (summary["cut"], summary["latencies"], summary["attainment"]) == (6, {}, 0.0)


def test_ctrl_c_keeps_a_partial_result(mock_server: Any, tmp_path: Path) -> None:
    out = tmp_path / "load.jsonl"
    command = [sys.executable, "-m", "gptjet.service.cli", "load", "--rate", "50"]
    command += [
        "--duration",
        "600",
        "--warmup",
        "0",
        "--prompt-tokens",
        "4",
        "--output-tokens",
        "400",
    ]
    with mock_server(1, 5) as target:
        process = subprocess.Popen(
            [*command, "--server", target, "--out", str(out), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        )
        assert process.stderr is not None
        first_line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert "running" in first_line, first_line + errors
    assert process.returncode == 130, errors
    summary = json.loads(output)
    assert summary["is_partial"] is True
    assert summary["interrupted"] > 0
    assert summary["window_s"] < 60
    *_, last = read_records(out)
    assert (last["kind"], last["is_partial"]) == ("load_summary", True)


def test_the_highest_rate_is_searched_with_runs_of_their_own(
    mock_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request cannot take less than 40 ms: with an SLO of 20 ms every rate fails."""
    monkeypatch.setattr(validity, "MAX_LAG_P99_MS", 1e9)  # not of a busy test machine
    out = tmp_path / "search.jsonl"
    with mock_server(40, 1) as target:
        result = load(
            *("--server", target, "--find-rate", "--slo-ttft-ms", "20", "--rate", "0.02"),
            *("--requests", "1", "--probes", "1", "--warmup", "0", "--out", str(out)),
            *("--prompt-tokens", "4", "--output-tokens", "2", "--arrivals", "constant"),
        )
    assert result.exit_code == 1, result.output
    assert "no rate was found" in result.stdout
    records = list(read_records(out))
    assert records[-1]["kind"] == "load_search"
    assert [v["rate"] for v in records[-1]["verdicts"]] == [0.02, 0.01]
    assert {r["rate"] for r in records if r["kind"] == "load_summary"} == {0.02, 0.01}
    # A second rate with the first one's prompts would be answered from a prefix cache.
    seeds = [r["spec"]["workload"]["seed"] for r in records if r["kind"] == "load_run"]
    assert len(set(seeds)) == len(seeds) == 2


def test_the_highest_rate_that_holds_is_found_and_is_below_what_the_server_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A served mock prefills one prompt at a time in 50 ms, so of 30 requests that come at 80 a
    second the last ten wait more than the 750 ms of the SLO, whatever the machine does."""
    # Not of a busy test machine: it may be late, and all the same the server is what fails.
    for limit in ("MAX_LAG_P99_MS", "MAX_LATE_SHARE", "MAX_CPU_SHARE"):
        monkeypatch.setattr(validity, limit, 1e9)
    out = tmp_path / "search.jsonl"
    with known_server(prefill_ms=50, decode_ms=1) as server:
        result = load(
            *("--server", server.target, "--find-rate", "--slo-ttft-ms", "750", "--rate", "10"),
            *("--requests", "30", "--probes", "1", "--tolerance", "2", "--warmup", "1"),
            *("--prompt-tokens", "4", "--output-tokens", "2", "--arrivals", "constant"),
            *("--out", str(out), "--json"),
        )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["limited_by"] == "server"
    assert 0 < found["rate"] < found["failed_rate"] <= 80
    held = [verdict for verdict in found["verdicts"] if verdict["holds"]]
    assert max(verdict["rate"] for verdict in held) == found["rate"]
    *_, last = read_records(out)
    assert (last["kind"], last["rate"]) == ("load_search", found["rate"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--rate: give --rate"),
        (["--rate", "1", "--concurrency", "2"], "--concurrency: an open loop has none"),
        (["--rate", "-1"], "--rate: must be above 0"),
        (["--rate", "1", "--arrivals", "burst"], "unknown arrival process 'burst'"),
        (["--rate", "1", "--prompt-tokens", "many"], "'many' is not a length"),
        (["--find-rate"], "--find-rate: give an SLO"),
        (["--concurrency", "1", "--processes", "2"], "--processes: more than"),
        (["--rate", "1", "--attainment", "2"], "--attainment: is a share"),
        (["--rate", "1", "--plot", "x.pdf"], "--plot: the file must end"),
        (["--find-rate", "--slo-e2e-ms", "9", "--plot", "x.png"], "--plot: it draws one run"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_anything_is_sent(
    arguments: list[str], words: str
) -> None:
    result = load(*arguments, "--server", "127.0.0.1:1")
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize("flag", ["--out", "--plot"])
def test_a_result_that_cannot_be_written_is_said_before_a_request_is_sent(
    mock_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("it was run"))
    with mock_server(1, 1) as target:
        result = load("--server", target, "--rate", "4", flag, str(tmp_path / "file" / "x.png"))
    assert result.exit_code == 2, result.output
    assert f"{tmp_path / 'file'}: " in result.output


def test_a_plot_that_cannot_be_drawn_is_said_before_a_request_is_sent(
    mock_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("it was run"))
    with mock_server(1, 1) as target:
        result = load("--server", target, "--rate", "4", "--plot", str(tmp_path / "x.png"))
    assert result.exit_code == 1, result.output
    assert "plots need matplotlib" in result.output


def test_a_search_that_loses_its_server_keeps_the_rates_it_has_tried(
    mock_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    run_load = cli.run_load

    async def lost_at_the_second(*arguments: Any) -> Any:
        if made:
            raise LoadError("the warm-up failed: UNAVAILABLE: gone")
        made.append(await run_load(*arguments))
        return made[0]

    monkeypatch.setattr(cli, "run_load", lost_at_the_second)
    out = tmp_path / "search.jsonl"
    with mock_server(1, 1) as target:
        result = load(
            *("--server", target, "--find-rate", "--slo-e2e-ms", "60000", "--rate", "20"),
            *("--requests", "3", "--probes", "1", "--warmup", "0", "--out", str(out)),
            *("--prompt-tokens", "4", "--output-tokens", "2"),
        )
    assert result.exit_code == 1, result.output
    assert "the warm-up failed: UNAVAILABLE: gone" in result.output
    kinds = [record["kind"] for record in read_records(out)]
    assert kinds == ["load_session", "load_run", *["load_request"] * 3, "load_summary"]


def test_no_server_is_said_as_every_client_command_says_it() -> None:
    result = load("--rate", "1", "--server", "127.0.0.1:1")
    assert result.exit_code == 3
    assert "no server answers at 127.0.0.1:1" in result.output
