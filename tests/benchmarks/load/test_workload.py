"""What is sent: lengths, prompts, shares of workers, traces."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjet.benchmarks.load.lengths import parse_lengths
from gptjet.benchmarks.load.workload import (
    WorkloadError,
    WorkloadSpec,
    plan_requests,
    read_trace,
)

SPEC = WorkloadSpec(vocab_size=100, max_context=64, eos_token_id=7, requests=50)


def draws(text: str, count: int = 4000) -> list[int]:
    generator = random.Random(1)
    lengths = parse_lengths(text)
    return [lengths.draw(generator) for _ in range(count)]


def test_each_distribution_is_the_one_it_is_called() -> None:
    assert set(draws("128")) == {128}
    assert set(draws("uniform:3,6")) == {3, 4, 5, 6}
    assert set(draws("choice:50,200")) == {50, 200}
    assert statistics.mean(draws("normal:100,10")) == pytest.approx(100, rel=0.02)
    assert statistics.stdev(draws("normal:100,10")) == pytest.approx(10, rel=0.1)
    assert statistics.median(draws("lognormal:200,0.8")) == pytest.approx(200, rel=0.1)
    assert max(draws("lognormal:200,0.8,500")) == 500
    assert min(draws("normal:1,50")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "1.5",
        "uniform:5",
        "uniform:6,5",
        "normal:0,1",
        "lognormal:9",
        "zipf:2",
        "normal:nan,1",
    ],
)
def test_what_is_not_a_length_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="lognormal:MEDIAN,SIGMA"):
        parse_lengths(text)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(0, 1000), st.sampled_from([None, 20.0]))
def test_workers_share_a_plan_without_gap_or_overlap(
    workers: int, seed: int, rate: float | None
) -> None:
    spec = dataclasses.replace(SPEC, seed=seed, rate=rate, prompt_tokens="uniform:1,20")
    whole = list(plan_requests(spec))
    shares = [request for w in range(workers) for request in plan_requests(spec, w, workers)]
    assert sorted(shares, key=lambda request: request.index) == whole
    assert [request.index for request in whole] == list(range(50))


def test_prompts_differ_stay_in_the_vocabulary_and_never_hold_the_end_of_text() -> None:
    spec = dataclasses.replace(SPEC, prompt_tokens="40", output_tokens="5")
    prompts = [request.prompt for request in plan_requests(spec)]
    assert len(set(prompts)) == 50
    seen = {token for prompt in prompts for token in prompt}
    assert seen == set(range(100)) - {7}


def test_what_exceeds_the_context_is_cut_and_says_so() -> None:
    spec = dataclasses.replace(SPEC, prompt_tokens="choice:60,80", output_tokens="10")
    for request in plan_requests(spec):
        assert request.prompt_tokens in (60, 63)
        assert request.prompt_tokens + request.output_tokens == 64
        assert request.was_cut
    assert not any(r.was_cut for r in plan_requests(dataclasses.replace(spec, prompt_tokens="54")))


def test_an_open_loop_plans_what_is_intended_before_its_end() -> None:
    spec = dataclasses.replace(SPEC, requests=None, duration_s=2.0, rate=5.0, arrivals="constant")
    times = [request.intended_ns for request in plan_requests(spec)]
    assert times == [200_000_000 * i for i in range(10)]


def test_prompts_of_a_file_are_its_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    spec = dataclasses.replace(SPEC, prompts_file=str(tmp_path / "prompts.txt"))
    requests = list(plan_requests(spec))
    assert {request.prompt for request in requests} == {"one", "two"}
    assert {request.prompt_tokens for request in requests} == {None}


def trace_file(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trace_is_played_from_its_first_arrival_at_its_speed(tmp_path: Path) -> None:
    path = trace_file(
        tmp_path,
        {"arrival_s": 12.0, "prompt_tokens": 9, "output_tokens": 4},
        {"arrival_s": 10.0, "prompt": "Hello", "output_tokens": 3},
    )
    spec = dataclasses.replace(SPEC, requests=None, trace_file=str(path), trace_speed=4.0)
    first, second = plan_requests(spec)
    assert (first.intended_ns, first.prompt, first.output_tokens) == (0, "Hello", 3)
    assert (second.intended_ns, second.prompt_tokens, len(second.prompt)) == (500_000_000, 9, 9)
    closed = plan_requests(dataclasses.replace(spec, closed=True))
    assert [request.intended_ns for request in closed] == [None, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"arrival_s": 0, "output_tokens": 3}, "either prompt or prompt_tokens"),
        ({"arrival_s": -1, "prompt": "a", "output_tokens": 3}, "arrival_s must be 0 or more"),
        ({"arrival_s": 0, "prompt": "a", "output_tokens": 0}, "output_tokens must be"),
        ({"arrival_s": 0, "prompt_tokens": True, "output_tokens": 1}, "prompt_tokens must be"),
        ({"arrival_s": 0, "prompt": "a"}, "needs 'output_tokens'"),
        ({"arrival_s": 0, "prompt": "a", "output_tokens": 1, "x": 1}, "unknown field x"),
        ([], "a JSON object is needed"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: Any, message: str) -> None:
    good = {"arrival_s": 0, "prompt": "a", "output_tokens": 1}
    with pytest.raises(WorkloadError, match=f"trace.jsonl: line 2: .*{message}"):
        read_trace(trace_file(tmp_path, good, line))


def test_a_file_that_is_missing_or_empty_is_named_without_its_folder(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, prompts_file=str(tmp_path / "none.txt"))
    with pytest.raises(WorkloadError, match=r"^none\.txt: No such file"):
        next(plan_requests(spec))
    with pytest.raises(WorkloadError, match="holds no requests"):
        read_trace(trace_file(tmp_path))
