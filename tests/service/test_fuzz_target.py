"""The fuzz target lets the statuses through that requests may end with, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service import fuzz_target
from gptjet.service.rpc import convert


@pytest.fixture
def target() -> Iterator[fuzz_target.Target]:
    target = fuzz_target.Target()
    yield target
    target.close()


def input_for(target: fuzz_target.Target, name: str, message: Any) -> bytes:
    index = next(i for i, path in enumerate(target.paths) if path.endswith(f"/{name}"))
    return bytes([index]) + message.SerializeToString()


def test_seeds_are_answered_by_every_method(target: fuzz_target.Target) -> None:
    seeds = fuzz_target.seeds(target.paths)
    assert len(seeds) == len(target.paths) - 1  # GetModel takes nothing
    assert {target.run(seed) for seed in seeds} == {"OK"}


def test_a_refusal_is_no_fault(target: fuzz_target.Target) -> None:
    params = pb.SamplingParams(temperature=-1)
    bad = pb.GenerateRequest(text="a", sampling_params=params)
    assert target.run(input_for(target, "Generate", bad)) == "INVALID_ARGUMENT"
    assert target.run(bytes([0]) + b"\xff\xff\xff") == "INVALID_ARGUMENT"
    assert target.run(b"") == "OK"


def test_a_bug_on_the_way_is_a_fault(
    target: fuzz_target.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(convert, "sampling_params_from_pb", broken)
    request = input_for(target, "Generate", pb.GenerateRequest(text="a"))
    with pytest.raises(fuzz_target.FaultError, match="INTERNAL"):
        target.run(request)
