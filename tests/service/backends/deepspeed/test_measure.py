"""The measuring entry on the stand-in: what the evidence command will see on a card."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptjet.service.backends import measure
from gptjet.service.backends.deepspeed import injection
from gptjet.service.backends.deepspeed.guards import Platform
from gptjet.service.engine.errors import BackendLoadError


def stand_in_platform(free_bytes: int = 10**12) -> Platform:
    return Platform(
        device=torch.device("cpu"),
        dtype=torch.float32,
        name="stand-in",
        capability=None,
        free_bytes=lambda: free_bytes,
        is_stand_in=True,
    )


def run(**changes: Any) -> Any:
    options = {"geometry": "tiny", "device_name": "cpu", "cells": [(5, 4)], "repeats": 2}
    return measure.measure("deepspeed", **{"platform": stand_in_platform(), **options, **changes})


def test_deepspeed_gives_model_parity_cells_and_memory_in_this_order(op: Any) -> None:
    records = list(run())
    assert [record["kind"] for record in records] == ["model", "parity", "cell", "memory"]
    assert records[1]["status"] == "passed"
    cell = records[2]
    assert cell["backend"] == "deepspeed"
    assert [len(itl) for itl in cell["itl_ms"]] == [3, 3]
    json.dumps(records, allow_nan=False)
    assert injection._open_model is None


def test_no_time_is_taken_where_parity_is_red(
    stand_in_module: Any, install_op: Callable[[Any], Any]
) -> None:
    install_op(stand_in_module.WrongRotaryOp())
    records: list[dict[str, Any]] = []
    with pytest.raises(measure.ParityFailedError, match="largest relative error"):
        records.extend(run())
    assert [record["kind"] for record in records] == ["model", "parity"]
    assert records[1]["status"] == "failed"


def test_card_without_room_is_unavailable_before_any_weight_is_made(op: Any) -> None:
    with pytest.raises(BackendLoadError, match="does not fit stand-in"):
        list(run(platform=stand_in_platform(free_bytes=1000)))


def test_same_seed_same_weights_and_gpt_j_6b_has_its_sizes() -> None:
    cpu = torch.device("cpu")
    first, second = (measure.make_random_model("tiny", cpu, torch.float32) for _ in range(2))
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)
    from transformers import GPTJConfig

    config = GPTJConfig(**measure.GEOMETRIES["gpt-j-6b"])
    assert (config.n_layer, config.n_embd, config.n_head, config.rotary_dim) == (28, 4096, 16, 64)
    assert (config.n_positions, config.vocab_size) == (2048, 50400)


def test_command_prints_one_line_and_exit_code_2_where_there_is_no_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = measure.main(["--backend", "deepspeed", "--geometry", "tiny", "--device", "cpu"])
    (line,) = capsys.readouterr().out.splitlines()
    assert code == 2
    assert json.loads(line)["unavailable"] is True
