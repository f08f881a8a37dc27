"""The environment record, and that it names no machine."""

from __future__ import annotations

import getpass
import json
import platform
import socket
from pathlib import Path

import pytest

from gptjet.benchmarks.environment import parse_gpus, record_environment, without_paths


def test_the_record_is_json_and_says_what_results_depend_on() -> None:
    record = record_environment()
    assert json.loads(json.dumps(record)) == record
    assert record["python"] == platform.python_version()
    assert record["cpu"]["logical_cores"] >= 1
    assert record["packages"]["numpy"]
    assert len(record["load_average"]) == 3
    assert set(record) >= {"gpus", "git", "os", "kernel", "memory_gib", "recorded_at"}


def test_the_record_names_no_machine_user_or_path() -> None:
    text = json.dumps(record_environment())
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[2]) not in text
    for name in (socket.gethostname(), getpass.getuser()):
        assert f'"{name}"' not in text
    assert "/" not in text


def test_nvidia_smi_rows_are_read() -> None:
    row = (
        "Tesla T4, 550.54.15, 15360, 3, 7.5, 585, 5001, 1590, 5001, 41, 70.00, Enabled, "
        "Enabled, [N/A], 3, 16\n"
    )
    (card,) = parse_gpus(row)
    assert card["name"] == "Tesla T4"
    assert (card["driver"], card["compute_capability"]) == ("550.54.15", "7.5")
    assert (card["memory_mib"], card["sm_clock_mhz"], card["max_sm_clock_mhz"]) == (
        15360,
        585,
        1590,
    )
    assert card["power_limit_w"] == 70
    assert card["mig"] is None
    assert parse_gpus("No devices were found") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot open /home/anna/models/gpt-j/config.json: gone", "cannot open config.json: gone"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("50/100 of huggingface/fp16", "50/100 of huggingface/fp16"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, expected: str) -> None:
    assert without_paths(text) == expected
