"""The whole sweep: dry run, a killed and resumed one against a live server, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks.checkpoint_copy import copy_with_context
from gptjet.benchmarks.config import LevelName, SweepConfig, load_config
from gptjet.benchmarks.geometry import GeometryError
from gptjet.benchmarks.hardware import GIB
from gptjet.benchmarks.records import Results
from gptjet.benchmarks.server_process import ServerError, parse_endpoints
from gptjet.benchmarks.sweep import SweepOptions, check_model, dry_run, fingerprint
from gptjet.benchmarks.sweep import _together as together
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client_types import ModelInfo

PREFILL_MS, DECODE_MS = 8.0, 4.0
MINE = """
[hardware]
name = "cpu"
title = "a CPU"
kind = "cpu"
source = "test"
[model]
name = "mock"
checkpoint = "mock"
[design]
input_tokens = [4, 9, 510]
output_tokens = [3, 6]
runs = 5
seed = 1
[design.levels]
mock = ["fp32"]
[design.baseline]
backend = "mock"
weight_type = "fp32"
"""


def start_sweep(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gptjet.benchmarks.cli_sweep", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_cli(*arguments: str) -> tuple[int, str, str]:
    process = start_sweep(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def permits(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """The mock serves as many requests as there are permits: a sweep that is to be ended in the
    middle cannot come to its end first."""
    permits = threading.Semaphore(0)
    prefill = MockBackend.prefill

    def with_permit(self: MockBackend, batch: Any) -> Any:
        permits.acquire()
        return prefill(self, batch)

    monkeypatch.setattr(MockBackend, "prefill", with_permit)
    yield permits
    permits.release(10_000)


def num_samples(path: Path) -> int:
    return path.read_bytes().count(b'"kind":"sample"') if path.exists() else 0


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    return file


def test_killed_twice_and_resumed_it_is_whole_and_without_doubles(
    mock_server: Callable[[float, float], AbstractContextManager[str]],
    permits: threading.Semaphore,
    mine: Path,
    tmp_path: Path,
) -> None:
    """4 cells that fit x 5 runs; 2 cells of 510 + 3 and 510 + 6 are beyond the mock's 512."""
    out = tmp_path / "out.jsonl"
    with mock_server(PREFILL_MS, DECODE_MS) as target:
        arguments = ("--config", str(mine), "--out", str(out), "--endpoint", f"mock={target}")
        # Of what each of the first two is let do, some warms up; 8 and 11 are not 20 samples.
        for enough, requests in ((3, 8), (9, 11)):
            permits.release(requests)
            process = start_sweep(*arguments)
            while num_samples(out) < enough:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert num_samples(out) < 20
        permits.release(10_000)
        # As if the kill had hit the middle of a write.
        with out.open("ab") as file:
            file.write(b'{"schema":1,"kind":"sample","sess')
        code, text, _ = run_cli(*arguments)
    assert code == 0
    assert "2 cells are not feasible" in text
    results = Results.read([out])
    assert results.duplicates == 0
    assert num_samples(out) == len(results.samples) == 20
    per_cell = Counter((s.input_tokens, s.output_tokens) for s in results.samples.values())
    assert per_cell == {(4, 3): 5, (4, 6): 5, (9, 3): 5, (9, 6): 5}
    assert len(results.sessions) == 3
    assert {(c.input_tokens, c.output_tokens) for c in results.infeasible.values()} == {
        (510, 3),
        (510, 6),
    }
    for sample in results.samples.values():
        # Sleeping never takes less than was asked for, so these bounds hold on any machine.
        assert sample.ttft_ms >= PREFILL_MS
        assert sample.e2e_ms >= PREFILL_MS + (sample.output_tokens - 1) * DECODE_MS
        assert sample.server.e2e_ms <= sample.e2e_ms
        assert len(sample.itl_ms) == sample.output_tokens - 1


def test_sigterm_ends_a_session_in_order(
    mock_server: Callable[[float, float], AbstractContextManager[str]],
    permits: threading.Semaphore,
    mine: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.jsonl"
    with mock_server(PREFILL_MS, DECODE_MS) as target:
        process = start_sweep(
            *("--config", str(mine), "--out", str(out), "--endpoint", f"mock={target}")
        )
        permits.release(10)
        while num_samples(out) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.terminate()
        permits.release(5)  # what is running ends
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    last = json.loads(out.read_text().splitlines()[-1])
    assert (last["kind"], last["how"]) == ("end", "interrupted")


def test_dry_run_prints_the_64_cells_as_json_and_measures_nothing(tmp_path: Path) -> None:
    code, out, _ = run_cli("--config", "t4", "--config", "v100", "--dry-run", "--json")
    design = json.loads(out)
    assert code == 0
    assert (design["num_cells"], design["num_runs"]) == (64, 1280)
    for cell in design["cells"]:
        assert set(cell) == {
            *("config", "hardware", "model", "backend", "weight_type", "input_tokens"),
            *("output_tokens", "runs", "feasible", "reason", "modelled_floor"),
        }
        floor = cell["modelled_floor"]
        assert set(floor) == {"ttft_ms", "tpot_ms", "e2e_ms", "basis", "bound"}
        assert floor["basis"] == "datasheet"
        assert 0 < floor["ttft_ms"] < floor["e2e_ms"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_names_cells_that_cannot_run(tmp_path: Path) -> None:
    fields = {"model_type": "gptj", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"n_positions": 512}))
    config = load_config("t4").updated(model=str(tmp_path))
    rows = dry_run([config], SweepOptions())["cells"]
    cannot = {(r["input_tokens"], r["output_tokens"]) for r in rows if not r["feasible"]}
    assert cannot == {(500, 50), (500, 100), (500, 150), (500, 200)} | {
        (1000, tokens) for tokens in (50, 100, 150, 200)
    }
    assert all(r["runs"] == 0 and "> context" in r["reason"] for r in rows if not r["feasible"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nothing"], "no such file"),
        (["--config", "cpu", "--backends", "nothing"], "no backend 'nothing'"),
        (["--config", "cpu", "--json"], "--json is for --dry-run"),
        (["--config", "cpu", "--endpoint", "mock"], "give NAME=HOST:PORT"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    code, out, err = run_cli(*arguments, "--out", str(tmp_path / "x.jsonl"))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_hardware_that_is_not_here_is_an_error(mine: Path, tmp_path: Path) -> None:
    mine.write_text(MINE.replace('kind = "cpu"', "kind = 'gpu'\ndevice_pattern = 'No Such Card'"))
    code, out, err = run_cli("--config", str(mine), "--out", str(tmp_path / "x.jsonl"))
    assert (code, out) == (2, "")
    assert "--any-hardware measures what is here, labelled as such" in err


def test_endpoints_are_names_and_addresses() -> None:
    assert parse_endpoints(["a=h:1", "b/int8=[::1]:2"]) == {"a": "h:1", "b/int8": "[::1]:2"}
    for bad in ("a", "=h:1", "a=h", "a=:1", "a=h:x"):
        with pytest.raises(ServerError, match="NAME=HOST:PORT"):
            parse_endpoints([bad])


def test_a_server_that_is_not_the_level_is_refused(fake_model: ModelInfo) -> None:
    cpu, t4 = load_config("cpu"), load_config("t4")
    fused = LevelName(backend="fused", weight_type="fp16")
    with pytest.raises(ServerError, match="runs backend mock"):
        check_model(fake_model, fused, cpu)
    model = replace(fake_model, backend="fused")
    with pytest.raises(ServerError, match="computes in float32"):
        check_model(model, fused, cpu)
    model = replace(model, dtype="float16")
    check_model(model, fused, cpu)
    with pytest.raises(ServerError, match="runs on a CPU"):
        check_model(model, fused, t4)
    check_model(replace(model, device="cuda:0"), fused, t4)


def levels_of(config: SweepConfig) -> tuple[LevelName, ...]:
    return config.design.choose_levels()


def test_auto_keeps_servers_together_only_where_memory_allows_it() -> None:
    from gptjet.benchmarks.geometry import config_of, geometry_from_config

    big = geometry_from_config(config_of("gpt-j-6b"))
    h100, options = load_config("h100"), SweepOptions()
    roomy = {"gpus": [{"name": "NVIDIA H100", "memory_mib": 81559, "memory_used_mib": 0}]}
    tight = {"gpus": [{"name": "NVIDIA H100", "memory_mib": 81559, "memory_used_mib": 60000}]}
    assert together(h100, options, levels_of(h100), big, roomy)
    assert not together(h100, options, levels_of(h100), big, tight)
    assert not together(h100, options, levels_of(h100), None, roomy), "size unknown"
    t4 = load_config("t4")
    assert not together(t4, options, levels_of(t4), big, roomy), "the file says alternate"
    assert together(t4, SweepOptions(endpoints={"a": "b"}), levels_of(t4), big, roomy)
    cpu = load_config("cpu")
    assert together(cpu, options, levels_of(cpu), big, {"memory_available_gib": 120.0})
    assert not together(cpu, options, levels_of(cpu), big, {"memory_available_gib": 20.0})
    assert GIB == 2**30


def write_config(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "notes.md").write_text("not needed")
    return folder


def test_a_copy_claims_the_longer_context_and_nothing_else(tmp_path: Path) -> None:
    source = write_config(tmp_path / "a", model_type="gptj", n_positions=512, n_embd=8)
    note = copy_with_context(str(source), 2048, tmp_path / "b")
    assert note == "a copy with context 2048 instead of 512: speed only, not text"
    changed = json.loads((tmp_path / "b" / "config.json").read_text())
    assert changed == {"model_type": "gptj", "n_positions": 2048, "n_embd": 8}
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((source / "config.json").read_text())["n_positions"] == 512
    assert not (tmp_path / "b" / "notes.md").exists()


def test_a_context_is_never_stretched_where_it_would_be_a_lie(tmp_path: Path) -> None:
    learned = write_config(tmp_path / "a", model_type="gpt2", n_positions=512)
    with pytest.raises(GeometryError, match="has a table of positions"):
        copy_with_context(str(learned), 2048, tmp_path / "x")
    long = write_config(tmp_path / "b", model_type="gptj", n_positions=4096)
    with pytest.raises(GeometryError, match="its context is 4096"):
        copy_with_context(str(long), 2048, tmp_path / "x")
    with pytest.raises(GeometryError, match="needs a folder"):
        copy_with_context("EleutherAI/gpt-j-6b", 4096, tmp_path / "x")


def test_the_fingerprint_changes_with_configuration_and_weights(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "a", model_type="gptj")
    first = fingerprint(str(folder))
    (folder / "model.safetensors").write_bytes(b"weightz")
    second = fingerprint(str(folder))
    (folder / "config.json").write_text("{}")
    assert len({first, second, fingerprint(str(folder))}) == 3
    assert fingerprint("EleutherAI/gpt-j-6b") is None


def test_the_runner_starts_without_torch_or_the_server() -> None:
    """Loading a model stack beside the server would take the memory and the cores it needs."""
    heavy = ("torch", "transformers", "gptjet.service.engine", "gptjet.service.rpc", "matplotlib")
    script = (
        "import sys, gptjet.benchmarks.sweep, gptjet.benchmarks.cli_sweep\n"
        "import gptjet.benchmarks.plan\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")
